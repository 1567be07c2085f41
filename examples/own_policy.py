"""A policy of one's own: what is far away is seen more thinly, so that few keys reach far back.

Every key lives for `window` queries, every second one twice as long, every fourth four times, and so on. A policy is a frozen
dataclass with one method, `live_ranges`; because each key's range comes from its own place alone (`per_key_ranges`), the policy
generates over a cache, too, and `pressure` says how many slots that cache needs.
"""

from __future__ import annotations

import argparse
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import typer
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer

import rewriter

MODEL = Path(rewriter.__file__).parent / "demo" / "model"


@dataclass(frozen=True)
class Fading(rewriter.Policy):
    per_key_ranges: ClassVar[bool] = True

    window: int
    levels: int

    def live_ranges(self, site: rewriter.SiteTensors) -> rewriter.kernels.LiveRanges:
        place = site.index - site.origin  # padding on the left is not counted
        life = sum((place % 2**level == 0).int() * (self.window * 2**level // 2) for level in range(1, self.levels + 1))
        return rewriter.kernels.LiveRanges(site.index, site.index + self.window + life)

    def pressure(self, max_length: int) -> int:
        return self.window + self.levels * -(-self.window // 2)


@torch.no_grad()
def main(window: int = 64, levels: int = 4, tokens: int = 2048, backend: str = "inductor") -> dict[str, float]:
    """Prints and returns the loss under the policy, beside that of a plain window of as many keys."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer(inspect.getsource(argparse), return_tensors="pt").input_ids[:, :tokens]
    own = Fading(window, levels)
    losses = {}
    for policy in (own, rewriter.SlidingWindow(own.pressure(tokens)), rewriter.Exact()):
        fast = rewriter.optimize(model, policy, backend=backend, strict=True)
        losses[str(policy)] = fast(input_ids=ids, labels=ids, use_cache=False).loss.item()
        print(f"{policy}: {losses[str(policy)]:.3f} nats per token; {fast.report.summary()}")
    print(f"{own} reaches {window * 2**levels} tokens back with {own.pressure(tokens)} keys")
    return losses


if __name__ == "__main__":
    typer.run(main)
