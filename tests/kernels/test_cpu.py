"""The CPU kernel against the dense reference: output, log-sum-exp, all gradients, on ranges that are meant to hurt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from rewriter.kernels import FOREVER
from rewriter.kernels import LiveRanges
from rewriter.kernels import cpu
from rewriter.kernels import live_range_attention
from rewriter.kernels import reference
from rewriter.kernels import running_topk_ranges
from rewriter.kernels import schedule
from torch import Tensor

from rewriter.testing import assert_within_budget


@dataclass
class Case:
    """Inputs in fp64 whose values are exact in `dtype`."""

    dtype: torch.dtype
    tensors: dict[str, Tensor]
    live: LiveRanges
    options: dict[str, Any] = field(default_factory=dict)


KINDS = ("causal", "window", "separators", "topk", "padding", "documents", "bidirectional", "scattered", "nothing")


def random_ranges(kind: str, batch: int, heads: int, keys: int, random: torch.Generator) -> LiveRanges:
    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=random))

    if kind == "causal":
        return LiveRanges.causal(keys)
    if kind == "window":
        return LiveRanges.sliding_window(keys, integer(1, keys + 1), sinks=integer(0, 3))
    if kind == "separators":
        return LiveRanges.separators(
            torch.rand(batch, keys, generator=random) < 0.2, window=integer(1, 9), initial=integer(0, 3)
        )
    if kind == "topk":
        return running_topk_ranges(torch.rand(batch, heads, keys, generator=random), integer(1, keys))
    if kind == "padding":
        return LiveRanges.causal(keys) & LiveRanges.padding(torch.rand(batch, keys, generator=random) < 0.6)
    if kind == "documents":
        ids = (torch.rand(batch, keys, generator=random) < 0.2).cumsum(1)
        return LiveRanges.documents(ids) & LiveRanges.causal(keys)
    if kind == "bidirectional":
        return LiveRanges.bidirectional(keys)
    if kind == "nothing":
        start = torch.zeros(1, 1, keys, dtype=torch.int32)
        return LiveRanges(start, start)
    start = torch.randint(-2, keys + 2, (batch, heads, keys), generator=random).int()
    end = start + torch.randint(0, keys, (batch, heads, keys), generator=random).int()
    return LiveRanges(start, torch.where(torch.rand(batch, heads, keys, generator=random) < 0.1, FOREVER, end).int())


@st.composite
def cases(draw: st.DrawFn) -> Case:
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    keys = draw(st.integers(1, 70))
    queries = draw(st.one_of(st.just(keys), st.integers(1, 70)))
    head_dim, value_dim = draw(st.integers(1, 24)), draw(st.integers(1, 24))

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(dtype).double()

    tensors = {
        "query": values(batch, kv_heads * group, queries, head_dim),
        "key": values(batch, kv_heads, keys, head_dim),
        "value": values(batch, kv_heads, keys, value_dim),
    }
    if draw(st.booleans()):
        tensors = {name: t.transpose(1, 2).contiguous().transpose(1, 2) for name, t in tensors.items()}
    if draw(st.booleans()):
        rows, heads = draw(st.sampled_from([(1, 1), (batch, 1), (batch, kv_heads)]))
        tensors["bias"] = values(rows, heads, keys)
    if draw(st.booleans()):
        tensors["sinks"] = values(kv_heads * group)
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([0.25, 1.0]))
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from([0.5, 30.0]))
    if draw(st.booleans()):
        options["alibi_slopes"] = values(kv_heads * group).abs()
        options["key_index"] = torch.randint(0, 99, draw(st.sampled_from([(keys,), (batch, keys)])), generator=random)
    if draw(st.booleans()):
        shape = draw(st.sampled_from([(queries,), (batch, queries)]))
        options["query_index"] = torch.randint(-2, keys + 2, shape, generator=random)
    kind = draw(st.sampled_from(KINDS))
    return Case(dtype, tensors, random_ranges(kind, batch, kv_heads, keys, random), options)


def evaluate(attention: Any, case: Case, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Output, finite log-sum-exp and gradients of all differentiable inputs."""
    leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in case.tensors.items()}
    options = {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in case.options.items()
    }
    positional = [leaves[name] for name in ("query", "key", "value")]
    rest = {name: t for name, t in leaves.items() if name in ("bias", "sinks")}
    output, lse = attention(*positional, case.live, **rest, **options, return_lse=True)
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(output.shape, generator=random).to(case.dtype).to(output.dtype)
    lse_weight = torch.randn(lse.shape, generator=random).to(lse.dtype)
    finite = torch.isfinite(lse)
    loss = (output * weight).sum() + torch.where(finite, lse * lse_weight, 0).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    results = {"output": output, "lse": torch.where(finite, lse, -1e30 * (lse == -torch.inf))}
    results.update({f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)})
    return {name: result.detach() for name, result in results.items()}


def magnitudes(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """The sums behind each result with their terms in absolute value, in fp64: what their rounding errors scale with."""
    query, key, value = (case.tensors[name] for name in ("query", "key", "value"))
    group = query.size(1) // key.size(1)
    scale = case.options.get("scale", query.size(3) ** -0.5)
    identity = torch.eye(key.size(2), dtype=torch.float64).expand(*key.shape[:3], -1)
    rest = {name: t for name, t in case.tensors.items() if name in ("bias", "sinks")}
    weights, lse = reference.live_range_attention(
        query, key, identity, case.live, **rest, **case.options, return_lse=True
    )
    # A weight is exp(logit - lse): the rounding of the two is a relative error of the weight.
    lse_size = lse.abs().nan_to_num(posinf=0)[..., None]
    weights = weights * (1 + 2 * lse_size - weights.clamp(min=1e-300).log())
    random = torch.Generator().manual_seed(seed)
    shape = (*query.shape[:3], value.size(3))
    grad = torch.randn(shape, generator=random).to(case.dtype).double().abs()
    grad_lse = torch.randn(lse.shape, generator=random).double().abs()
    wide_key, wide_value = (t.abs().repeat_interleave(group, dim=1) for t in (key, value))
    from_values = grad @ wide_value.transpose(2, 3)
    delta = (weights * from_values).sum(dim=-1) + grad_lse
    scores = weights * (from_values + delta[..., None])

    def per_kv_head(t: Tensor) -> Tensor:
        return t.unflatten(1, (-1, group)).sum(dim=2)

    result = {
        "output": weights @ wide_value,
        "dquery": scale * scores @ wide_key,
        "dkey": per_kv_head(scale * scores.transpose(2, 3) @ query.abs()),
        "dvalue": per_kv_head(weights.transpose(2, 3) @ grad),
    }
    if "bias" in rest:
        result["dbias"] = per_kv_head(scores.sum(dim=2)).sum_to_size(rest["bias"].shape)
    if "sinks" in rest:
        result["dsinks"] = (torch.exp(rest["sinks"][:, None] - lse) * delta).nan_to_num(posinf=0).sum(dim=(0, 2))
    return result


def check(case: Case) -> None:
    exact = evaluate(reference.live_range_attention, case, torch.float64)
    dense = evaluate(reference.live_range_attention, case, case.dtype)
    actual = evaluate(live_range_attention, case, case.dtype)
    sums = magnitudes(case)
    for name in exact:
        assert_within_budget(actual[name], dense[name], exact[name], name, magnitude=sums.get(name))


@settings(max_examples=150)
@given(case=cases())
def test_equals_the_dense_reference(case: Case) -> None:
    check(case)


@contextmanager
def small_blocks() -> Iterator[None]:
    """Several blocks per tile, dense runs and tiles of few rows: the online softmax and the run path on small inputs."""
    saved = cpu.BLOCK, schedule.MIN_RUN, cpu.tile_rows
    cpu.BLOCK, schedule.MIN_RUN, cpu.tile_rows = 5, 4, lambda group, queries, shared: 7
    try:
        yield
    finally:
        cpu.BLOCK, schedule.MIN_RUN, cpu.tile_rows = saved


@settings(max_examples=80)
@given(case=cases())
def test_equals_the_dense_reference_with_many_small_blocks(case: Case) -> None:
    with small_blocks():
        check(case)


def ranges_of(visible: list[tuple[int, int]]) -> LiveRanges:
    start, end = (torch.tensor(part, dtype=torch.int32)[None, None] for part in zip(*visible, strict=True))
    return LiveRanges(start, end)


# Ranges that broke other kernels: NaN after an empty first tile, gradients lost after a skipped one, borders of tiles.
AWKWARD = {
    "first tile empty": ranges_of([(7, FOREVER)] * 14),
    "skip then live": ranges_of([(0, 0)] * 7 + [(j, FOREVER) for j in range(7, 14)]),
    "live then skip": ranges_of([(j, 7) for j in range(7)] + [(0, 0)] * 7),
    "live, skip, live": ranges_of([(0, FOREVER)] * 5 + [(0, 0)] * 5 + [(0, FOREVER)] * 4),
    "ends at tile borders": ranges_of([(0, 7), (0, 8), (6, 7), (7, 14), (7, 8), (0, 14), (13, 14)] * 2),
    "one key": ranges_of([(0, 0)] * 13 + [(0, FOREVER)]),
    "no key": ranges_of([(3, 3)] * 14),
    "only between two queries": ranges_of([(3, 4)] * 14),
}


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("queries", [14, 9], ids=["Q=K", "Q<K"])
def test_awkward_ranges(name: str, queries: int) -> None:
    shapes = {
        "query": (1, 4, queries, 12),
        "key": (1, 2, 14, 12),
        "value": (1, 2, 14, 5),
        "bias": (1, 2, 14),
        "sinks": (4,),
    }
    tensors = {k: torch.randn(s).double() for k, s in shapes.items() if k != "sinks"}
    with small_blocks():
        check(Case(torch.float32, tensors, AWKWARD[name]))
        check(Case(torch.float32, {**tensors, "sinks": torch.randn(4).double()}, AWKWARD[name], {"softcap": 2.0}))


def test_a_row_without_keys_returns_zero_and_takes_no_gradient() -> None:
    query, key, value = (torch.randn(1, 2, 6, 4, requires_grad=True) for _ in range(3))
    live = ranges_of([(3, FOREVER)] * 6)
    output, lse = live_range_attention(query, key, value, live, return_lse=True)
    assert (output[:, :, :3] == 0).all()
    assert (lse[:, :, :3] == -torch.inf).all()
    (grad,) = torch.autograd.grad(output.sum(), query)
    assert (grad[:, :, :3] == 0).all()
    assert (grad[:, :, 3:] != 0).any()


def test_runs_are_bitwise_equal() -> None:
    live = running_topk_ranges(torch.rand(2, 2, 300), 40)
    query, key, value = (torch.randn(2, h, 300, 16, requires_grad=True) for h in (4, 2, 2))
    runs = []
    for _ in range(2):
        output = live_range_attention(query, key, value, live)
        runs.append([output, *torch.autograd.grad(output.square().sum(), (query, key, value))])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_head_dim_256_and_many_keys_in_one_row() -> None:
    shapes = {"query": (1, 2, 3, 256), "key": (1, 1, 2500, 256), "value": (1, 1, 2500, 256)}
    check(Case(torch.float32, {k: torch.randn(s).double() for k, s in shapes.items()}, LiveRanges.causal(2500)))


def test_memory_grows_with_the_length_and_not_with_its_square() -> None:
    """A mask or a score array of S x S would be 4 GiB here; the largest allocation is a few times the inputs."""
    length = 32768
    live = LiveRanges.sliding_window(length, 16)
    query, key, value = (torch.randn(1, 1, length, 4, requires_grad=True) for _ in range(3))
    with torch.profiler.profile(profile_memory=True) as profile:
        live_range_attention(query, key, value, live).sum().backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < 64 * query.numel() * query.element_size()
