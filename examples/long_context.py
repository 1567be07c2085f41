"""Finds the right place in a context that is longer than what the model was trained for, and goes on from there.

`ChunkedEviction` reads a context in chunks, each with the query behind it. The chunks under which the query is most likely are
kept, and of their keys the ones that the query attends to most. The context here is source code; the query is the first lines of a
function somewhere in it, which the model can only continue if the chunk with the function was kept.

    python examples/long_context.py
"""

from __future__ import annotations

import argparse
import configparser
import inspect
import tarfile
from pathlib import Path

import torch
import typer
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer

import rewriter
from rewriter import ChunkedEviction

MODEL = Path(rewriter.__file__).parent / "demo" / "model"
CONTEXT = "".join(inspect.getsource(module) for module in (argparse, configparser, tarfile))  # not trained on


def main(
    tokens: int = 40_000, chunk: int = 1024, keep_chunks: int = 3, capacity: int = 256, query: int = 32, new: int = 48,
    at: float = 0.6, backend: str = "inductor",
) -> tuple[rewriter.OptimizedModel, torch.Tensor, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    context = torch.tensor([tokenizer.bos_token_id, *tokenizer(CONTEXT).input_ids[:tokens]])
    place = int(at * len(context))
    query_ids, expected = context[place:place + query], context[place + query: place + query + new]
    policy = ChunkedEviction(chunk, keep_chunks=keep_chunks, capacity=capacity)
    fast = rewriter.optimize(model, policy, backend=backend)
    reading = fast.read(context, query_ids, max_new_tokens=new)
    print(len(context), 'tokens')
    print(reading.kept, [round(s, 2) for s in reading.scores[0]], [len(c) for c in reading.chunks[0]], place)
    print(reading.cache.capacities, reading.cache.num_bytes)
    ids = fast.generate(
        reading.query_ids, attention_mask=reading.attention_mask, past_key_values=reading.cache, max_new_tokens=new, do_sample=False)
    print("QUERY", tokenizer.decode(query_ids))
    print("ANSWER", tokenizer.decode(ids[0, query:]))
    print("EXPECTED", tokenizer.decode(expected))
    print((ids[0, query:] == expected[:ids.size(1)-query]).float().mean())
    return fast


if __name__ == "__main__":
    typer.run(main)
