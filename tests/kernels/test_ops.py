"""The operator as torch sees it: schema, fake, autograd, compilation; and its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rewriter.kernels import AttentionInputError
from rewriter.kernels import LiveRanges
from rewriter.kernels import live_range_attention
from rewriter.kernels.dispatch import INTERPRETED


def inputs(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "query": torch.randn(2, 4, 6, 8),
        "key": torch.randn(2, 2, 6, 8),
        "value": torch.randn(2, 2, 6, 8),
        "live": LiveRanges.causal(6),
    }
    return {**arguments, **changes}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "everything"])
def test_opcheck(dtype: torch.dtype, extras: bool) -> None:
    live = LiveRanges.sliding_window(7, 3) & LiveRanges.padding(torch.rand(2, 7) < 0.8)
    query, key, value = (torch.randn(2, h, 7, d, dtype=dtype, requires_grad=True) for h, d in ((4, 8), (2, 8), (2, 5)))
    rest: list[Any] = [None, None, None, None, None, 0.5, None]
    if extras:
        rest = [
            torch.arange(7),
            torch.arange(7),
            torch.randn(2, 1, 7, dtype=dtype, requires_grad=True),
            torch.randn(4, dtype=dtype, requires_grad=True),
            torch.rand(4),
            None,
            20.0,
        ]
    arguments = (query, key, value, live.start, live.end, *rest)
    torch.library.opcheck(torch.ops.rewriter.live_range_attention.default, arguments)


def test_compile_keeps_it_in_one_graph_for_several_lengths() -> None:
    graphs = []

    def count(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(module)
        return module.forward

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        live = LiveRanges.sliding_window(key.size(2), 3)
        return live_range_attention(query, key, value, live)

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend=count, fullgraph=True, dynamic=True)
    for batch, length in ((3, 6), (5, 11), (7, 30)):
        query, key, value = (torch.randn(batch, h, length, 8) for h in (4, 2, 2))
        assert torch.equal(compiled(query, key, value), attend(query, key, value))
    assert len(graphs) == 1


def test_inductor_trains_through_it() -> None:
    def loss(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        live = LiveRanges.causal(key.size(2)) & LiveRanges.sliding_window(key.size(2), 5, sinks=1)
        return live_range_attention(query * 2, key, value, live, bias=bias.sin()).square().mean()

    torch._dynamo.reset()
    leaves = [torch.randn(s, requires_grad=True) for s in ((2, 4, 20, 8), (2, 2, 20, 8), (2, 2, 20, 8), (1, 2, 20))]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    actual = torch.autograd.grad(torch.compile(loss, fullgraph=True, dynamic=True)(*leaves), leaves)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


ERRORS = {
    "live of another type": ({"live": torch.zeros(1, 1, 6)}, "live must be LiveRanges, got Tensor"),
    "query of rank 3": ({"query": torch.randn(2, 6, 8)}, r"query must be \[B, H, S, D\], got shape \[2, 6, 8\]"),
    "integer key": (
        {"key": torch.zeros(2, 2, 6, 8, dtype=torch.int64)},
        "key must be fp16, bf16, fp32 or fp64, got torch.int64",
    ),
    "mixed dtypes": ({"value": torch.randn(2, 2, 6, 8).half()}, "query is torch.float32 and value torch.float16"),
    "head_dim of key": ({"key": torch.randn(2, 2, 6, 7)}, "query has head_dim 8 and key 7"),
    "head_dim 257": (
        {"query": torch.randn(2, 4, 6, 257), "key": torch.randn(2, 2, 6, 257)},
        "head dims must be 1 to 256, got 257",
    ),
    "batch": ({"key": torch.randn(3, 2, 6, 8)}, "batch sizes differ: query 2, key 3"),
    "number of values": ({"value": torch.randn(2, 2, 5, 8)}, "must agree in KV heads and number of keys"),
    "heads": ({"query": torch.randn(2, 3, 6, 8)}, "3 query heads are not a multiple of 2 KV heads"),
    "ends of the wrong length": (
        {"live": LiveRanges.causal(5)},
        r"start must be \[B\|1, Hkv\|1, K\] with K = 6 keys, got \[1, 1, 5\]",
    ),
    "ranges for 3 rows": (
        {"live": LiveRanges.padding(torch.ones(3, 6))},
        "start has 3 batch rows, expected 2 or 1",
    ),
    "bias shape": ({"bias": torch.randn(2, 6)}, r"bias must be a float tensor \[B\|1, Hkv\|1, 6\]"),
    "sinks shape": ({"sinks": torch.randn(2)}, r"sinks must be \[4\]"),
    "query_index size": ({"query_index": torch.arange(5)}, r"query_index must be int32 or int64 \[6\]"),
    "float key_index": ({"key_index": torch.rand(6)}, "key_index must be int32 or int64"),
    "softcap": ({"softcap": 0.0}, "softcap must be positive, got 0.0"),
    "trainable slopes": (
        {"alibi_slopes": torch.rand(4, requires_grad=True)},
        "alibi_slopes must not require a gradient",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_named(name: str) -> None:
    changes, message = ERRORS[name]
    with pytest.raises(AttentionInputError, match=message):
        live_range_attention(**inputs(**changes))


def test_ends_that_are_not_int32_are_named() -> None:
    arguments = inputs()
    live = arguments.pop("live")
    with pytest.raises(
        AttentionInputError, match=r"end must be int32, got torch.int64; convert with .to\(torch.int32\)"
    ):
        torch.ops.rewriter.live_range_attention(*arguments.values(), live.start, live.end.long(), *[None] * 7)


def test_more_keys_than_int32_counts_are_named() -> None:
    key = torch.empty(1, 1, 2**31, 1, device="meta")
    end = torch.empty(1, 1, 2**31, dtype=torch.int32, device="meta")
    with pytest.raises(
        AttentionInputError, match="2147483648 keys are too many for int32 indices; give fewer than 2147483648"
    ):
        live_range_attention(key[:, :, :4], key, key, LiveRanges(end, end))


def test_inputs_on_different_devices_are_named() -> None:
    with pytest.raises(AttentionInputError, match="query is on cpu, another input on meta; move them together"):
        live_range_attention(**inputs(key=torch.empty(2, 2, 6, 8, device="meta")))


@pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="the CPU kernel takes fp64")
def test_the_triton_kernels_refuse_fp64() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    query, key, value = (torch.randn(1, 2, 4, 8, dtype=torch.float64, device=device) for _ in range(3))
    with pytest.raises(AttentionInputError, match="query is fp64, which the Triton kernels do not take; use fp32"):
        live_range_attention(query, key, value, LiveRanges.causal(4, device=device))
