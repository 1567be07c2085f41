"""Checkpoints of torch.distributed.checkpoint: written on one layout, read on another, and equal to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from processes import in_processes
from torch import Tensor
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict import set_state_dict

import rewriter
from rewriter import DynamicMask
from rewriter import SlidingWindow


def llama() -> nn.Module:
    from transformers import LlamaConfig
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes))


def made(layout: str, policy: Any) -> tuple[Any, torch.optim.Optimizer]:
    """A model on a layout of processes, with other weights than those that are saved, and its optimizer."""
    ids = torch.arange(16)[None]
    examples: dict[str, Any] = {"example_inputs": {"input_ids": ids}} if policy.adds_parameters else {}
    fast: Any = rewriter.optimize(llama(), policy, strict=True, backend="eager", **examples)
    if layout != "alone":
        size = torch.distributed.get_world_size()
        mesh = torch.distributed.init_device_mesh("cpu", (size,), mesh_dim_names=(layout,))
        plan = None
        if layout == "tp":
            from torch.distributed.tensor.parallel import ColwiseParallel
            from torch.distributed.tensor.parallel import RowwiseParallel

            columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
            plan = {f"model.layers.*.{name}": ColwiseParallel() for name in columns}
            plan |= {f"model.layers.*.{name}": RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
        rewriter.distribute(fast, mesh, tp_plan=plan)
    return fast, torch.optim.AdamW(fast.parameters(), lr=1e-2)


def step(fast: Any, optimizer: torch.optim.Optimizer) -> float:
    ids = torch.randint(64, (1, 16), generator=torch.Generator().manual_seed(0))
    loss = fast(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def save(fast: Any, optimizer: torch.optim.Optimizer, folder: str) -> None:
    model_state, optimizer_state = get_state_dict(rewriter.for_checkpoint(fast), optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)


def load(fast: Any, optimizer: torch.optim.Optimizer, folder: str) -> None:
    model_state, optimizer_state = get_state_dict(rewriter.for_checkpoint(fast), optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        rewriter.for_checkpoint(fast), optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )


def everything(fast: Any, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All weights and moments, whole."""
    model, moments = get_state_dict(
        rewriter.for_checkpoint(fast), optimizer, options=StateDictOptions(full_state_dict=True)
    )
    found = dict(model)
    for name, own in moments["state"].items():
        found |= {f"{name}.{kind}": value for kind, value in own.items()}
    return {name: value.clone() for name, value in found.items()}


def write(rank: int, layout: str, policy: Any, folder: str) -> tuple[dict[str, Tensor], float]:
    fast, optimizer = made(layout, policy)
    step(fast, optimizer)
    save(fast, optimizer, folder)
    return everything(fast, optimizer), step(fast, optimizer)


def read(rank: int, layout: str, policy: Any, folder: str) -> tuple[dict[str, Tensor], float]:
    fast, optimizer = made(layout, policy)
    load(fast, optimizer, folder)
    return everything(fast, optimizer), step(fast, optimizer)


WAYS = [
    (("alone", 1), SlidingWindow(4), (("tp", 2),)),
    (("cp", 2), DynamicMask(4), (("alone", 1),)),
    pytest.param(("dp", 4), SlidingWindow(4), (("alone", 1), ("tp", 2), ("cp", 2)), marks=pytest.mark.soak),
]


@pytest.mark.parametrize(("layout", "policy", "readers"), WAYS)
def test_what_one_layout_writes_another_reads(
    layout: tuple[str, int], policy: Any, readers: tuple[tuple[str, int], ...], tmp_path: Path
) -> None:
    name, number = layout
    (written, loss), *_ = in_processes(write, name, policy, str(tmp_path), number=number)
    assert len(written) > 50
    for other, its_number in readers:
        for found, its_loss in in_processes(read, other, policy, str(tmp_path), number=its_number):
            assert found.keys() == written.keys()
            assert all(torch.equal(found[name], value) for name, value in written.items())
            assert its_loss == pytest.approx(loss, abs=1e-5)


def interrupt(rank: int, folder: str) -> tuple[bool, str]:
    """A save that ends in its middle, over a checkpoint that is there."""
    fast, optimizer = made("dp", SlidingWindow(4))
    save(fast, optimizer, f"{folder}/1")
    before = everything(fast, optimizer)
    step(fast, optimizer)
    broken = mock.patch.object(dcp.FileSystemWriter, "finish", side_effect=OSError("the disk is full"))
    with broken, pytest.raises(dcp.api.CheckpointException):
        save(fast, optimizer, f"{folder}/2")
    torch.distributed.barrier()
    with pytest.raises(dcp.api.CheckpointException) as error:
        load(fast, optimizer, f"{folder}/2")
    load(fast, optimizer, f"{folder}/1")
    after = everything(fast, optimizer)
    with pytest.raises(rewriter.RewriteError, match="for_checkpoint"):
        get_state_dict(fast, optimizer)
    return all(torch.equal(after[name], value) for name, value in before.items()), str(error.value)


def test_an_interrupted_save_leaves_the_last_one(tmp_path: Path) -> None:
    for same, error in in_processes(interrupt, str(tmp_path)):
        assert same and ".metadata" in error
