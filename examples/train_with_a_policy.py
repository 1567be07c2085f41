"""Trains a small model while each query sees only the keys that a trained score ranks best.

`DynamicMask` adds parameters of its own, one score for each attention. They belong to the optimized model, not to the model, and
want a larger learning rate, so they get a group of their own in the optimizer. Everything else is an ordinary training loop.

    python examples/train_with_a_policy.py --steps 100
"""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path

import torch
import typer
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer

import rewriter
from rewriter import DynamicMask

MODEL = Path(rewriter.__file__).parent / "demo" / "model"  # 3.3 M parameters, trained on Python's standard library


def main(
    steps: int = 50, length: int = 512, rows: int = 4, keep: int = 64, lr: float = 1e-4, backend: str = "inductor"
) -> tuple[float, float]:
    """Prints the loss on a file that the model has never seen, before and after; returns both."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text, unseen = (torch.tensor(tokenizer(inspect.getsource(module)).input_ids) for module in (json.decoder, argparse))
    held_out = unseen[: 4 * length].view(4, length)

    fast = rewriter.optimize(model, DynamicMask(keep=keep, local=keep), backend=backend)
    own = fast.policy_parameters
    print(
        f"each query sees {keep} keys that score best and the last {keep}; the scores are {len(list(own.parameters()))}"
    )
    optimizer = torch.optim.AdamW(
        [{"params": fast.model.parameters()}, {"params": own.parameters(), "lr": 30 * lr}], lr=lr, weight_decay=0.0
    )

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        return fast(input_ids=ids, labels=ids, use_cache=False).loss

    with torch.no_grad():
        before = loss_of(held_out).item()
    for step in range(1, steps + 1):
        starts = torch.randint(len(text) - length, (rows,))
        loss = loss_of(torch.stack([text[s : s + length] for s in starts.tolist()]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:4d}: loss {loss.item():.3f}")
    with torch.no_grad():
        after = loss_of(held_out).item()
    print(f"nats per token of a file that was not trained on: {before:.3f} before, {after:.3f} after")
    return before, after


if __name__ == "__main__":
    typer.run(main)
