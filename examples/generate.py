"""Several turns on one KV cache, whose size does not depend on how long the text gets.

Under a sliding window with a few first keys, a key that no later query sees gives its slot to a new one. The cache is made once,
with as many slots as keys are ever alive, and each turn goes on from it. (The bundled model has read Python's standard library,
so Python is what it writes.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import typer
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer

import rewriter
from rewriter import SlidingWindow

MODEL = Path(rewriter.__file__).parent / "demo" / "model"
TURNS = (
    'import os\nimport sys\n\n\ndef read_lines(path):\n    """Return the lines of a text file."""',
    "\n\n\ndef write_lines(path, lines):",
    "\n\n\nclass Reader:\n    def __init__(self, path):",
)


def main(
    window: int = 124, sinks: int = 4, max_new_tokens: int = 48, backend: str = "inductor"
) -> tuple[torch.Tensor, list[tuple[int, int]], list[int], Any]:
    """Prints the turns and the size of the cache.

    Returns all token ids, where each reply begins and ends, the cache's bytes after each, and the cache.
    """
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    fast = rewriter.optimize(model, SlidingWindow(window, sinks=sinks), backend=backend, strict=True)
    cache = fast.new_cache()
    text = torch.tensor([[tokenizer.bos_token_id]])
    replies, sizes = [], []
    for turn in TURNS:
        text = torch.cat((text, tokenizer(turn, return_tensors="pt").input_ids), dim=1)
        begin = text.size(1)
        text = fast.generate(text, past_key_values=cache, max_new_tokens=max_new_tokens, do_sample=False)
        replies.append((begin, text.size(1)))
        sizes.append(cache.num_bytes)
        print(f"> {turn.strip()}\n{tokenizer.decode(text[0, begin:])}")
        print(f"[{text.size(1)} tokens so far; the cache: {cache.capacities[0]} slots, {sizes[-1]:,} bytes]\n")
    return text, replies, sizes, cache


if __name__ == "__main__":
    typer.run(main)
