"""Trains a model that is cut into stages, one for each process, where the slowest of them is as fast as it can be.

torchrun --nproc-per-node 2 examples/train_in_stages.py
"""

from __future__ import annotations

from pathlib import Path

import torch
import typer
from torch import Tensor
from torch import nn
from torch.distributed.pipelining import Schedule1F1B
from transformers import AutoModelForCausalLM

import rewriter
from rewriter import Exact
from rewriter import PerLayer
from rewriter import SlidingWindow

MODEL = Path(rewriter.__file__).parent / "demo" / "model"


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def main(length: int = 1024, steps: int = 3, backend: str = "inductor") -> list[float]:
    """Prints and returns the mean loss of each step, in the process of the last stage."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    torch.distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.cuda.set_device(rank) if kind == "cuda" else torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).to(kind)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # no longer that of another stage
    fast = rewriter.optimize(model, PerLayer({0: Exact(), "default": SlidingWindow(128)}), strict=True, backend=backend)
    plan = rewriter.plan_stages(fast, [1.0] * size, length=length, rows=2, microbatches=4)
    part = rewriter.stage(fast, plan, rank)
    print(plan if rank == 0 else "", flush=True)
    optimizer = torch.optim.AdamW(part.submod.parameters(), lr=1e-4)
    schedule = Schedule1F1B(part, plan.microbatches, loss_fn=loss_of)
    results: list[float] = []
    for step in range(steps):
        ids = (torch.arange(8 * length, device=kind).view(8, length) * (step + 7)) % 97
        losses: list[Tensor] = []
        schedule.step(input_ids=ids, target=ids, losses=losses)
        optimizer.step()
        optimizer.zero_grad()
        if losses:
            results.append(float(torch.stack(losses).detach().mean()))
            print(f"step {step}: loss {results[-1]:.4f}", flush=True)
    torch.distributed.destroy_process_group()
    return results


if __name__ == "__main__":
    typer.run(main)
