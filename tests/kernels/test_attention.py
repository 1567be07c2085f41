"""Live-range attention against the dense reference: output, log-sum-exp, all gradients, on ranges that are meant to hurt.

The kernel is the CPU's; with `TRITON_INTERPRET=1` the Triton kernels in the interpreter, on smaller cases; on a machine with
a GPU, the Triton kernels there.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from rewriter.kernels import FOREVER
from rewriter.kernels import LiveRanges
from rewriter.kernels import key_scores
from rewriter.kernels import live_range_attention
from rewriter.kernels import reference
from rewriter.kernels import running_topk_ranges
from rewriter.kernels.dispatch import INTERPRETED
from rewriter.kernels.gpu import decode as gpu_decode

from rewriter.testing import ADVERSARIAL_RANGES
from rewriter.testing import Case
from rewriter.testing import assert_equivalent
from rewriter.testing import assert_within_budget
from rewriter.testing import attention_cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = attention_cases(max_keys=40, max_head_dim=20) if INTERPRETED else attention_cases()
EXAMPLES = 10 if INTERPRETED else 25 if DEVICE == "cuda" else 150  # on a GPU nearly each is compiled first
# One slow example is not a fault: the interpreter takes seconds.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@contextmanager
def small_blocks() -> Iterator[None]:
    """Several splits of few keys in the Triton kernels: what is merged, on small inputs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_decode, "MAX_QUERIES", 1)
        patch.setattr(gpu_decode, "SPLIT", 16)
        yield


def equals_the_dense_reference(case: Case) -> None:
    assert_equivalent(live_range_attention, case, device=DEVICE)


def equals_the_dense_reference_in_many_small_blocks(case: Case) -> None:
    with small_blocks():
        assert_equivalent(live_range_attention, case, device=DEVICE)


@pytest.mark.parametrize("examples", [EXAMPLES, pytest.param(8 * EXAMPLES, marks=pytest.mark.soak)])
@pytest.mark.parametrize(
    "check",
    [
        equals_the_dense_reference,
        equals_the_dense_reference_in_many_small_blocks,
    ],
)
def test_random_cases(check: Callable[[Case], None], examples: int) -> None:
    settings(patient, max_examples=examples)(given(case=CASES)(check))()


def test_the_terms_of_a_logit_may_cancel() -> None:
    """Its sum is then smaller than the rounding of its terms allows for."""
    assert_equivalent(live_range_attention, Case(seed=26, queries=1, keys=1, head_dim=13, value_dim=1), device=DEVICE)


@pytest.mark.parametrize("name", ADVERSARIAL_RANGES)
@pytest.mark.parametrize("queries", [14, 9], ids=["Q=K", "Q<K"])
def test_adversarial_ranges(name: str, queries: int) -> None:
    ranges = ADVERSARIAL_RANGES[name]
    case = Case(
        queries=queries, kv_heads=2, group=2, keys=len(ranges), head_dim=12, value_dim=5, ranges=ranges, bias="head"
    )
    with small_blocks():
        assert_equivalent(live_range_attention, case, device=DEVICE)
        assert_equivalent(live_range_attention, replace(case, sinks=True, softcap=2.0), device=DEVICE)


@pytest.mark.parametrize("group", [1, 5, 33])
@pytest.mark.parametrize("queries", [1, 2, 20])
def test_groups_and_few_queries(group: int, queries: int) -> None:
    """A group larger than a tile, a group that does not divide it, and the decode kernel."""
    case = Case(seed=group, group=group, queries=queries, keys=37, head_dim=8, ranges="topk", bias="head", sinks=True)
    assert_equivalent(live_range_attention, case, device=DEVICE)


def test_a_row_without_keys_returns_zero_and_takes_no_gradient() -> None:
    query, key, value = (torch.randn(1, 2, 6, 4, device=DEVICE, requires_grad=True) for _ in range(3))
    start = torch.full((1, 1, 6), 3, dtype=torch.int32, device=DEVICE)
    live = LiveRanges(start, torch.full_like(start, FOREVER))
    output, lse = live_range_attention(query, key, value, live, return_lse=True)
    assert (output[:, :, :3] == 0).all()
    assert (lse[:, :, :3] == -torch.inf).all()
    (grad,) = torch.autograd.grad(output.sum(), query)
    assert (grad[:, :, :3] == 0).all()
    assert (grad[:, :, 3:] != 0).any()


@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
def test_empty_inputs(empty: str) -> None:
    batch, queries, keys = (0 if empty == name else 2 for name in ("batch", "queries", "keys"))
    query = torch.randn(batch, 2, queries, 4, device=DEVICE, requires_grad=True)
    key, value = (torch.randn(batch, 2, keys, 4, device=DEVICE, requires_grad=True) for _ in range(2))
    sinks = torch.randn(2, device=DEVICE, requires_grad=True)
    live = LiveRanges.causal(keys, device=DEVICE)
    output, lse = live_range_attention(query, key, value, live, sinks=sinks, return_lse=True)
    *grads, grad_sinks = torch.autograd.grad(output.sum() + lse.sum(), (query, key, value, sinks))
    assert output.shape == (batch, 2, queries, 4)
    assert (output == 0).all()
    assert torch.equal(lse, sinks.detach()[:, None].expand(batch, 2, queries))
    assert [g.shape for g in grads] == [t.shape for t in (query, key, value)]
    assert all((g == 0).all() for g in grads)
    # Every row that there is has its sink for log-sum-exp.
    assert (grad_sinks == batch * queries).all()
    scores = key_scores(query.detach(), key.detach(), lse.detach(), live)
    assert scores.shape == (batch, 2, keys)
    assert (scores == 0).all()


def test_strided_vectors_and_indices() -> None:
    """Every other sink and slope, a transposed index: read by their strides."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, h, 20, 8, device=DEVICE) for h in (4, 2, 2))
    live = LiveRanges.sliding_window(20, 6, device=DEVICE)
    index = torch.randint(0, 20, (20, 3), device=DEVICE).t()
    wide = torch.rand(8, device=DEVICE)
    for options in (
        {"sinks": wide[::2], "alibi_slopes": wide[1::2], "query_index": index},
        {"sinks": wide[:1].expand(4)},
    ):
        for few in (20, 3):
            own = {k: v[:, :few] if k == "query_index" else v for k, v in options.items()}
            dense = {k: v.contiguous() for k, v in own.items()}
            actual = live_range_attention(query[:, :, :few], key, value, live, **own)
            expected = live_range_attention(query[:, :, :few].contiguous(), key, value, live, **dense)
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_the_gradient_of_an_infinite_lse_may_be_nan() -> None:
    """Merging two states with logaddexp gives such gradients for rows without keys; nothing depends on them."""
    query, key, value = (torch.randn(1, 1, 6, 4, device=DEVICE, requires_grad=True) for _ in range(3))
    start = torch.full((1, 1, 6), 3, dtype=torch.int32, device=DEVICE)
    live = LiveRanges(start, torch.full_like(start, FOREVER))
    output, lse = live_range_attention(query, key, value, live, return_lse=True)
    grad_lse = torch.where(lse == -torch.inf, torch.nan, 1.0)
    grads = torch.autograd.grad((output, lse), (query, key, value), (torch.ones_like(output), grad_lse))
    assert all(torch.isfinite(g).all() for g in grads)
    assert (grads[0][:, :, :3] == 0).all()


def test_runs_are_bitwise_equal() -> None:
    length = 60 if INTERPRETED else 300
    live = running_topk_ranges(torch.rand(2, 2, length, device=DEVICE), 40)
    query, key, value = (torch.randn(2, h, length, 16, device=DEVICE, requires_grad=True) for h in (4, 2, 2))
    runs = []
    for _ in range(2):
        output = live_range_attention(query, key, value, live)
        runs.append([output, *torch.autograd.grad(output.square().sum(), (query, key, value))])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_head_dim_256_and_many_keys_in_one_row() -> None:
    keys = 600 if INTERPRETED else 2500
    case = Case(group=2, queries=3, keys=keys, head_dim=256, value_dim=256)
    assert_equivalent(live_range_attention, case, device=DEVICE)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter is too slow for many tiles and segments")
@pytest.mark.parametrize("kind", ["topk", "separators", "window", "documents", "scattered"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_many_tiles_and_segments(kind: str, dtype: str) -> None:
    case = Case(
        dtype=dtype, kv_heads=2, group=4, queries=3000, keys=3000, head_dim=64, value_dim=64, ranges=kind, bias="head"
    )
    assert_equivalent(live_range_attention, case, device=DEVICE)


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="counts allocations of the CPU kernel")
def test_memory_grows_with_the_length_and_not_with_its_square() -> None:
    """A mask or a score array of S x S would be 4 GiB here; the largest allocation is a few times the inputs."""
    length = 32768
    live = LiveRanges.sliding_window(length, 16)
    query, key, value = (torch.randn(1, 1, length, 4, requires_grad=True) for _ in range(3))
    with torch.profiler.profile(profile_memory=True) as profile:
        live_range_attention(query, key, value, live).sum().backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < 64 * query.numel() * query.element_size()


def test_a_row_over_slots_whatever_their_strides_and_what_dead_ones_hold() -> None:
    """Decoding: inputs whose last dimension is not contiguous, a bias of 16-bit models' size, NaN in the bias of dead keys."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        query = torch.randn(2, 4, 8, 1).to(dtype).transpose(2, 3)
        key, value = (torch.randn(2, 2, 8, 40).to(dtype).transpose(2, 3) for _ in range(2))
        bias = 20 * torch.randn(2, 2, 40)
        end = torch.full((2, 1, 40), FOREVER, dtype=torch.int32)
        end[0, 0, 5:9] = 0
        live = LiveRanges(torch.zeros_like(end), end)
        index = torch.tensor([40])
        exact = reference.live_range_attention(
            query.double(), key.double(), value.double(), live, bias=bias.double(), query_index=index
        )
        dense = reference.live_range_attention(query, key, value, live, bias=bias, query_index=index)
        bias[0, :, 5:9] = float("nan")
        actual = live_range_attention(query, key, value, live, bias=bias, query_index=index)
        assert_within_budget(actual, dense, exact, str(dtype))
