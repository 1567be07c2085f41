"""Attention over keys of other processes: outputs and gradients of the dense reference, and no byte too many."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from processes import in_processes
from rewriter.kernels import LiveRanges
from rewriter.kernels import reference
from rewriter.kernels.context_parallel import needed_keys
from torch import Tensor

LENGTH, DIM, VALUE_DIM = 24, 8, 4
KINDS = ("causal", "window", "random", "per_head", "bias", "sinks", "softcap", "nothing")


def inputs(kind: str) -> tuple[dict[str, Tensor], LiveRanges, float | None]:
    generator = torch.Generator().manual_seed(KINDS.index(kind))

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).requires_grad_()

    tensors = {
        "query": random(2, 4, LENGTH, DIM),
        "key": random(2, 2, LENGTH, DIM),
        "value": random(2, 2, LENGTH, VALUE_DIM),
    }
    live = LiveRanges.sliding_window(LENGTH, 5) if kind == "window" else LiveRanges.causal(LENGTH)
    if kind in ("random", "per_head", "nothing"):
        sizes = (2, 2 if kind == "per_head" else 1, LENGTH)
        start = torch.randint(0, LENGTH, sizes, generator=generator, dtype=torch.int32)
        length = torch.randint(0, LENGTH, sizes, generator=generator, dtype=torch.int32)
        live = LiveRanges(start, start + (0 if kind == "nothing" else 1) * length)
    if kind == "bias":
        tensors["bias"] = random(1, 2, LENGTH)
    if kind == "sinks":
        tensors["sinks"] = random(4)
    return tensors, live, 2.0 if kind == "softcap" else None


def attend(rank: int, number: int) -> dict[str, tuple[float, int, int]]:
    """Of each kind: how far output and gradients are from the reference's, the bytes that left, and those that had to."""
    tokens = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(7)).view(number, -1).sort(dim=1).values
    own = tokens[rank]
    group = torch.distributed.group.WORLD.group_name  # type: ignore[union-attr]
    found = {}
    for kind in KINDS:
        tensors, live, softcap = inputs(kind)
        extra = {name: tensors.get(name) for name in ("bias", "sinks")}
        expected = reference.live_range_attention(
            tensors["query"], tensors["key"], tensors["value"], live, softcap=softcap, **extra
        )
        weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
        wanted = torch.autograd.grad((expected * weight).sum(), list(tensors.values()))
        here = {n: t[:, :, own].detach().requires_grad_() for n, t in tensors.items() if n in ("query", "key", "value")}
        needed = needed_keys(live.start, live.end, tokens)
        sent: list[int] = []
        send = torch.distributed.all_to_all_single

        def counted(output: Tensor, rows: Tensor, *rest: Any, **options: Any) -> Any:
            sent.append(rows.numel() * rows.element_size())  # noqa: B023
            return send(output, rows, *rest, **options)  # noqa: B023

        with mock.patch.object(torch.distributed, "all_to_all_single", counted):
            output = torch.ops.rewriter.context_attention(
                *here.values(),
                live.start,
                live.end,
                needed,
                tokens,
                extra["bias"],
                extra["sinks"],
                None,
                softcap,
                group,
            )
            leaves = {**here, **{name: t for name, t in extra.items() if t is not None}}
            own_grads = torch.autograd.grad((output * weight[:, :, own]).sum(), list(leaves.values()))
            grads = dict(zip(leaves, own_grads, strict=True))
        differences = [(output - expected[:, :, own]).abs().max()]
        for name, full in zip(tensors, wanted, strict=True):
            if name in here:
                differences.append((grads[name] - full[:, :, own]).abs().max())
            else:  # each process has a part of the sum
                torch.distributed.all_reduce(grads[name])
                differences.append((grads[name] - full).abs().max())
        others = [r for r in range(number) if r != rank]
        leaving = needed.expand(-1, 2, 2, -1)[others][..., own].sum()
        arriving = sum(needed.expand(-1, 2, 2, -1)[rank][..., tokens[r]].sum() for r in others)
        row_bytes = 4 * (DIM + VALUE_DIM)
        found[kind] = (float(max(differences).detach()), sum(sent), int(leaving + arriving) * row_bytes)
    return found


@pytest.mark.parametrize("number", [2, 3])
def test_attention_is_the_reference_and_sends_what_is_seen(number: int) -> None:
    for of_rank in in_processes(attend, number, number=number):
        for kind, (difference, sent, needed) in of_rank.items():
            assert difference <= 1e-5, kind
            assert sent == needed, kind
        assert of_rank["nothing"][1] == 0 < of_rank["causal"][1]
