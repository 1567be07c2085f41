"""Trains on texts whose tokens are spread over processes; only keys travel that rows elsewhere still see.

    torchrun --nproc-per-node 2 examples/spread_a_text.py

On CPUs with gloo, or on as many GPUs with nccl. Each process reads the same texts, computes its tokens, and gets the loss of all.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer

import rewriter
from rewriter import SlidingWindow

MODEL = Path(rewriter.__file__).parent / "demo" / "model"


def source_code(tokenizer: Any, length: int, steps: int) -> Tensor:
    """Token ids of Python's standard library, `[steps, 1, length]`."""
    ids: list[int] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[: 1 + length * steps // 1000]:
        ids += tokenizer(path.read_text(encoding="utf-8", errors="ignore")).input_ids
    return torch.tensor(ids[: length * steps]).view(steps, 1, length)


def main(length: int = 4096, window: int = 256, steps: int = 3, backend: str = "inductor") -> list[float]:
    """Prints and returns the loss of each step."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    torch.distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.cuda.set_device(rank) if kind == "cuda" else torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).to(kind)
    mesh = torch.distributed.init_device_mesh(kind, (size,), mesh_dim_names=("cp",))
    fast = rewriter.optimize(model, SlidingWindow(window, sinks=4), strict=True, backend=backend)
    fast = rewriter.distribute(fast, mesh, gather_outputs=False)
    optimizer = torch.optim.AdamW(fast.parameters(), lr=1e-4)
    losses = []
    for step, ids in enumerate(source_code(AutoTokenizer.from_pretrained(MODEL), length, steps).to(kind)):
        loss = fast(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if rank == 0:
            print(f"step {step}: loss {losses[-1]:.4f} of {length:,} tokens over {size} processes", flush=True)
    torch.distributed.destroy_process_group()
    return losses


if __name__ == "__main__":
    typer.run(main)
