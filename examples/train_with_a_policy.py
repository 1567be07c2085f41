"""Trains a small model while each query sees only the keys that a trained score ranks best, and its nearest neighbours.

`DynamicMask` adds parameters of its own, a score for each attention. They belong to the optimized model, not to the model, and
want a larger learning rate, so they get a group of their own in the optimizer. Everything else is an ordinary training loop.
"""

from __future__ import annotations

import argparse
import inspect
import sysconfig
from pathlib import Path

import torch
import typer
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer

import rewriter
from rewriter import DynamicMask

MODEL = Path(rewriter.__file__).parent / "demo" / "model"  # 3.3 M parameters, trained on Python's standard library


def main(
    steps: int = 100, length: int = 512, rows: int = 4, keep: int = 64, lr: float = 3e-4, backend: str = "inductor"
) -> tuple[float, float]:
    """Prints the loss on a file that the model has never seen, before and after; returns both."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[b-d]*.py"))
    text = torch.tensor([token for file in files for token in tokenizer(file.read_text("utf-8")).input_ids])
    unseen = torch.tensor(tokenizer(inspect.getsource(argparse)).input_ids)
    held_out = unseen[: rows * length].view(rows, length)

    fast = rewriter.optimize(model, DynamicMask(keep=keep, local=keep), backend=backend, strict=True)
    policy_parameters = list(fast.policy_parameters.parameters())
    groups = [{"params": fast.model.parameters()}, {"params": policy_parameters, "lr": 30 * lr}]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    print(f"{fast.policy}: {sum(p.numel() for p in policy_parameters):,} parameters of its own")

    before = fast(input_ids=held_out, labels=held_out, use_cache=False).loss.item()
    for step in range(1, steps + 1):
        starts = torch.randint(len(text) - length, (rows,)).tolist()
        ids = torch.stack([text[start : start + length] for start in starts])
        loss = fast(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}: {loss.item():.3f}")
    after = fast(input_ids=held_out, labels=held_out, use_cache=False).loss.item()
    print(f"nats per token of a file that was not trained on: {before:.3f} before, {after:.3f} after")
    return before, after


if __name__ == "__main__":
    typer.run(main)
