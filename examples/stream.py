"""Reads a text that is far longer than what the model was trained for, token by token, in constant memory.

The cache keeps the first keys, the newest separators (punctuation) and a window; when it is full it is compacted. Keys are
numbered by their place in the cache, so positions never leave what the model knows. `rewriter.stream` takes any iterable of token
ids, also one without an end, and gives the log-probability of each token.
"""

from __future__ import annotations

import itertools
import math
import resource
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import typer
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer

import rewriter
from rewriter import SeparatorMask

MODEL = Path(rewriter.__file__).parent / "demo" / "model"


def source_code(tokenizer: Any) -> Iterator[int]:
    """Python's standard library, one file after the other; a file is read when its tokens are needed."""
    for path in itertools.cycle(sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))):
        yield from tokenizer(path.read_text(encoding="utf-8", errors="ignore")).input_ids


def main(
    tokens: int = 50_000, capacity: int = 512, window: int = 224, report: int = 5_000, backend: str = "inductor"
) -> list[float]:
    """Prints, after each `report` tokens, how well they were predicted; returns the log-probabilities."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    policy = SeparatorMask.from_tokenizer(
        tokenizer, initial=4, window=window, max_separators=window // 4, capacity=capacity, positions="cache"
    )
    print(policy)
    fast = rewriter.optimize(model, policy, backend=backend, strict=True)
    stream = rewriter.stream(fast, None, itertools.islice(source_code(tokenizer), tokens))
    log_probabilities: list[float] = []
    while part := list(itertools.islice(stream, report)):
        log_probabilities += part
        bits = -sum(part) / len(part) / math.log(2)
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # KiB on Linux
        print(f"{len(log_probabilities):9,} tokens: {bits:.2f} bits per token, {most:,} MiB of memory at most so far")
    return log_probabilities


if __name__ == "__main__":
    typer.run(main)
