"""Finds the right place in a context that is far longer than a row that the model can read well, and goes on from there.

`ChunkedEviction` reads the context in chunks, each with the query behind it. The chunks under which the query is most likely are
kept, and of their keys those that the query attends to most. Here the context is source code, and the query is a piece of it: the
chunk that holds it should win.
"""

from __future__ import annotations

import argparse
import configparser
import inspect
import tarfile
from pathlib import Path
from typing import Any

import torch
import typer
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer

import rewriter
from rewriter import ChunkedEviction

MODEL = Path(rewriter.__file__).parent / "demo" / "model"


def main(
    tokens: int = 20_000,
    chunk: int = 1024,
    capacity: int = 256,
    query: int = 48,
    at: float = 0.6,
    backend: str = "inductor",
) -> tuple[Any, int, torch.Tensor]:
    """Prints what was kept and how the model goes on; returns the reading, the chunk that holds the query, and the ids."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    source = "".join(inspect.getsource(module) for module in (argparse, configparser, tarfile))
    context = torch.tensor([tokenizer.bos_token_id, *tokenizer(source).input_ids[: tokens - 1]])
    place = int(at * len(context))
    fast = rewriter.optimize(model, ChunkedEviction(chunk, keep_chunks=2, capacity=capacity), backend=backend)

    reading = fast.read(context, context[place : place + query], max_new_tokens=32)
    right = (place - 1) // (len(reading.chunks[0][0]) - 1)  # each chunk begins with the context's first token
    for number, score in enumerate(reading.scores[0]):
        notes = ["kept"] * (number in reading.kept[0]) + ["holds the query"] * (number == right)
        print(f"chunk {number:2d}: {score:.2f} nats per token of the query  {', '.join(notes)}")
    print(f"of {len(context):,} tokens the cache keeps {reading.cache.length:,} keys in each head")

    ids = fast.generate(
        reading.query_ids, attention_mask=reading.attention_mask, past_key_values=reading.cache, max_new_tokens=32
    )
    print(f"the query:\n{tokenizer.decode(ids[0, :query])}\nand on:\n{tokenizer.decode(ids[0, query:])}")
    return reading, right, ids


if __name__ == "__main__":
    typer.run(main)
