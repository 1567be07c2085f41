"""How many kernels each operator launches on a GPU: this project's, and those of torch's operators around them.

Counted without a GPU, on tensors without data. What a launch takes of the CPU, some 5 to 10 microseconds in eager mode, is what a
short attention takes on the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rewriter.kernels import LiveRanges
from rewriter.kernels.arguments import AttentionArguments
from rewriter.kernels.gpu import shared_schedule
from rewriter.kernels.gpu.backward import backward
from rewriter.kernels.gpu.decode import decode
from rewriter.kernels.gpu.forward import forward
from rewriter.kernels.gpu.kernel_inputs import KernelInputs
from rewriter.kernels.gpu.key_scores import key_scores
from rewriter.kernels.gpu.launch import record_launches
from rewriter.kernels.gpu.running_topk import ends
from rewriter.kernels.topk import best_first

QUERY_HEADS, KV_HEADS, TOKENS, HEAD_DIM, KEEP = 8, 2, 2048, 64, 64


@dataclass(frozen=True)
class LaunchCount:
    """Launches of one call: kernels of this project by name, in their order, and torch's operators that compute something."""

    operator: str
    own: tuple[str, ...]
    of_torch: tuple[str, ...]

    @property
    def total(self) -> int:
        return len(self.own) + len(self.of_torch)


class _Computing(TorchDispatchMode):
    """Torch's operators that read or write memory: no views, and no allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        is_own = func.namespace == "rewriter"
        if not (is_own or func.is_view or "empty" in name or name in ("detach", "_unsafe_view", "alias", "lift_fresh")):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def launch_counts(architecture: str = "sm90") -> Iterator[LaunchCount]:
    """Of each operator, for bf16 tensors of one row of 2,048 tokens."""

    def tensor(heads: int, length: int) -> Tensor:
        return torch.empty(1, heads, length, HEAD_DIM, dtype=torch.bfloat16, device="meta")

    query, key, value = tensor(QUERY_HEADS, TOKENS), tensor(KV_HEADS, TOKENS), tensor(KV_HEADS, TOKENS)
    live, score = LiveRanges.causal(TOKENS, device="meta"), torch.empty(1, KV_HEADS, TOKENS, device="meta")
    lse = torch.empty(1, QUERY_HEADS, TOKENS, device="meta")
    sizes = (TOKENS, QUERY_HEADS // KV_HEADS, HEAD_DIM, 2)

    def schedule(backward: bool) -> list[Tensor]:
        return shared_schedule.make(live.start, live.end, None, *sizes, backward)

    def inputs(given: list[Tensor] | None, rows: Tensor = query) -> KernelInputs:
        arguments = AttentionArguments(rows, key, value, live.start, live.end, schedule=given)
        return KernelInputs.make(arguments, sort=rows is query)

    def gradients(given: list[Tensor] | None) -> Any:
        return backward(inputs(given), query, lse, query, lse)

    with record_launches(architecture):
        made = schedule(True)
    calls: dict[str, tuple[list[Tensor] | None, Callable[[Any], Any]]] = {
        "schedule of a forward": (None, lambda _: schedule(False)),
        "schedules of a forward and its gradients": (None, lambda _: schedule(True)),
        "attention, a layer of a model": (made, lambda given: forward(inputs(given))),
        "its gradients": (made, gradients),
        "attention by itself": (None, lambda given: forward(inputs(given))),
        "gradients by themselves": (None, gradients),
        "attention of one token": (None, lambda given: decode(inputs(given, tensor(QUERY_HEADS, 1)))),
        "scores of keys": (None, lambda given: key_scores(inputs(given), lse, "mean")),
        "ranges of a running top-k": (None, lambda _: ends(best_first(score, None), KEEP)),
    }
    for name, (given, call) in calls.items():
        with _Computing() as computing, record_launches(architecture) as recorded:
            call(given)
        yield LaunchCount(name, tuple(launch.kernel.__name__ for launch in recorded), tuple(computing.names))


def launch_table() -> Table:
    table = Table(title="launches of one call, 2,048 tokens", title_justify="left")
    for name in ("operator", "kernels of ours", "operators of torch", "together"):
        table.add_column(name, justify="left" if name == "operator" else "right")
    for count in launch_counts():
        table.add_row(count.operator, str(len(count.own)), str(len(count.of_torch)), str(count.total))
    return table
