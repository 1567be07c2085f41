"""The operators as a compiler for GPUs sees them: Triton kernels in the graph, no size fixed. Traced without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rewriter.kernels import arguments
from rewriter.kernels import dispatch
from rewriter.kernels import ops
from rewriter.kernels import topk
from rewriter.kernels.gpu import launch
from rewriter.kernels.gpu.compiled import standing_in
from rewriter.kernels.gpu.schedule import SCHEDULE_KERNELS
from torch._dynamo.source import LocalSource
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.experimental.symbolic_shapes import StatelessSymbolicContext

pytestmark = pytest.mark.skipif(
    dispatch.INTERPRETED or torch.cuda.is_available(), reason="stands in for a GPU; there are real graphs on a real one"
)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (arguments, ops, topk):
        monkeypatch.setattr(module, "runs_triton", lambda tensor: True)
    monkeypatch.setattr(launch, "_architecture", lambda device: "sm90")
    with standing_in("sm90"):
        yield


def symbolic(mode: FakeTensorMode, name: str, dynamic: str, tensor: torch.Tensor) -> torch.Tensor:
    """A fake tensor; the dimensions marked "d" are dynamic."""
    sizes = [DimDynamic.DYNAMIC if mark == "d" else DimDynamic.STATIC for mark in dynamic]
    return mode.from_tensor(
        tensor, source=LocalSource(name), symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes)
    )


def triton_kernels(module: torch.fx.GraphModule) -> list[str]:
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    nodes = [node for node in module.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    kernels = [kernel_side_table.get_kernel(node.kwargs["kernel_idx"]) for node in nodes]
    return [getattr(kernel, "fn", kernel).__name__ for kernel in kernels]  # one with num_warps is in an Autotuner


def test_attention_and_its_gradients(as_on_a_gpu: None) -> None:
    class Attention(torch.nn.Module):
        def forward(self, query: Any, key: Any, value: Any, start: Any, end: Any, bias: Any) -> tuple[torch.Tensor]:
            output, lse = torch.ops.rewriter.live_range_attention(
                query, key, value, start, end, None, None, bias, None, None, None, None
            )
            return (output.float().sum() + lse.sum(),)

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    inputs = [
        symbolic(mode, name, "d.d." if name in "qkv" else "d.d", tensor)
        for name, tensor in {
            "q": torch.empty(3, 8, 200, 64, dtype=torch.bfloat16, requires_grad=True),
            "k": torch.empty(3, 2, 300, 64, dtype=torch.bfloat16, requires_grad=True),
            "v": torch.empty(3, 2, 300, 64, dtype=torch.bfloat16, requires_grad=True),
            "s": torch.empty(3, 2, 300, dtype=torch.int32),
            "e": torch.empty(3, 2, 300, dtype=torch.int32),
            "b": torch.empty(3, 2, 300, requires_grad=True),
        }.items()
    ]
    with mode:
        module, _ = aot_export_module(Attention(), inputs, trace_joint=True, output_loss_index=0)
    schedule = list(SCHEDULE_KERNELS)
    assert triton_kernels(module) == [
        *schedule,
        "_forward",
        *schedule,
        "_query_gradient",
        "_list_gradients",
        "_key_gradients",
    ]
    assert not [node for node in module.graph.nodes if "rewriter" in str(node.target)]
    query = next(node for node in module.graph.nodes if node.op == "placeholder").meta["val"]
    batch, _, length, _ = query.shape
    assert len(batch.node.expr.free_symbols) == len(length.node.expr.free_symbols) == 1
    assert "Min(" not in str(module.code)


def test_layers_that_share_a_schedule(as_on_a_gpu: None) -> None:
    class Layers(torch.nn.Module):
        def forward(self, query: Any, key: Any, start: Any, end: Any) -> tuple[torch.Tensor]:
            schedule = torch.ops.rewriter.schedule(start, end, None, query.size(2), 1, 64, 2, True)
            for _ in range(3):
                ranges = (start, end, *[None] * 7)
                query, _ = torch.ops.rewriter.live_range_attention(query, key, key, *ranges, schedule)
            return (query.float().sum(),)

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    inputs = [
        symbolic(mode, name, "d.d." if name in "qk" else "..d", tensor)
        for name, tensor in {
            "q": torch.empty(3, 2, 200, 64, dtype=torch.bfloat16, requires_grad=True),
            "k": torch.empty(3, 2, 300, 64, dtype=torch.bfloat16, requires_grad=True),
            "s": torch.empty(1, 1, 300, dtype=torch.int32),
            "e": torch.empty(1, 1, 300, dtype=torch.int32),
        }.items()
    ]
    with mode:
        module, _ = aot_export_module(Layers(), inputs, trace_joint=True, output_loss_index=0)
    gradients = ["_query_gradient", "_list_gradients", "_key_gradients"]
    assert triton_kernels(module) == [*SCHEDULE_KERNELS * 2, *["_forward"] * 3, *gradients * 3]


@pytest.mark.parametrize("segments", [False, True])
def test_running_topk_ranges(segments: bool, as_on_a_gpu: None) -> None:
    class TopK(torch.nn.Module):
        def forward(self, score: Any) -> tuple[torch.Tensor]:
            segment = (score[:1, :1] > 0).int().cumsum(2, dtype=torch.int32) if segments else None
            return (torch.ops.rewriter.running_topk_end(score, 16, segment),)

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    score = symbolic(mode, "s", "d.d", torch.empty(3, 2, 300))
    with mode:
        module, _ = aot_export_module(TopK(), [score], trace_joint=False)
    assert triton_kernels(module) == ["_count_older", "_ends"]
    (length,) = next(node for node in module.graph.nodes if node.op == "placeholder").meta["val"].shape[2:]
    assert len(length.node.expr.free_symbols) == 1
