"""The checks of `rewriter verify`, as a pytest module: a kernel against the dense reference on everything that broke others.

Run through `rewriter.testing.verify.run_suite`, which passes the kernel and the device in `config.verification`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from rewriter.kernels import LiveRanges
from rewriter.kernels import key_scores
from rewriter.kernels import live_range_attention
from rewriter.kernels import reference
from rewriter.kernels import running_topk_ranges
from rewriter.testing.budgets import assert_within_budget
from rewriter.testing.cases import ADVERSARIAL_RANGES
from rewriter.testing.cases import RANGE_KINDS
from rewriter.testing.cases import Case
from rewriter.testing.strategies import attention_cases

if TYPE_CHECKING:
    from rewriter.testing.verify import Verification


@pytest.fixture
def verification(pytestconfig: pytest.Config) -> Verification:
    return pytestconfig.verification  # type: ignore[attr-defined]


def patient(v: Verification, examples: int) -> settings:
    """No deadline, no files written; the failing case is printed in one line by `assert_equivalent`."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=checks,
        print_blob=False,
        report_multiple_bugs=False,
        derandomize=v.derandomize,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_random_cases(verification: Verification, dtype: str) -> None:
    v = verification
    if dtype not in v.dtypes:
        pytest.skip(f"the kernel was not asked for {dtype}")

    @patient(v, v.examples)
    @given(
        case=attention_cases(
            features=v.features, dtypes=[dtype], max_keys=v.max_keys, max_head_dim=24 if v.max_keys < 100 else 128
        )
    )
    def check(case: Case) -> None:
        v.check(case)

    check()


@pytest.mark.parametrize("name", ADVERSARIAL_RANGES)
def test_adversarial_ranges(verification: Verification, name: str) -> None:
    ranges = ADVERSARIAL_RANGES[name]
    case = Case(
        dtype=verification.dtypes[0], kv_heads=2, group=2, keys=len(ranges), head_dim=16, value_dim=16, ranges=ranges
    )
    for queries in (len(ranges), 9):
        verification.check(replace(case, queries=queries))


@pytest.mark.parametrize("size", [1, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129])
def test_sizes_around_tile_borders(verification: Verification, size: int) -> None:
    case = Case(dtype=verification.dtypes[0], keys=size, queries=size, head_dim=16, value_dim=16, ranges="window")
    verification.check(case)
    verification.check(replace(case, queries=max(1, size - 1), ranges="topk"))


@pytest.mark.parametrize("head_dim", [16, 40, 64, 96, 128, 256])
def test_head_dims(verification: Verification, head_dim: int) -> None:
    case = Case(keys=33, queries=33, group=2, head_dim=head_dim, value_dim=head_dim, ranges="separators")
    for dtype in verification.dtypes:
        verification.check(replace(case, dtype=dtype))


@pytest.mark.parametrize("kind", RANGE_KINDS)
def test_many_tiles(verification: Verification, kind: str) -> None:
    """Runs, lists and several segments at once: more keys than any tile."""
    if verification.max_keys < 70:
        pytest.skip("the interpreter is too slow for many tiles")
    size = 700 if verification.device == "cpu" else 3000
    for dtype in verification.dtypes:
        case = Case(dtype=dtype, kv_heads=2, group=2, queries=size, keys=size, head_dim=16, value_dim=16, ranges=kind)
        verification.check(case)


def test_results_are_bitwise_equal_from_run_to_run(verification: Verification) -> None:
    v = verification
    size = min(300, 4 * v.max_keys)
    case = Case(
        dtype=v.dtypes[0], kv_heads=2, group=2, queries=size, keys=size, head_dim=16, value_dim=16, ranges="topk"
    )
    live = case.live()
    live = LiveRanges(live.start.to(v.device), live.end.to(v.device))
    runs = []
    for _ in range(2):
        leaves = [
            t.to(v.device, case.torch_dtype).requires_grad_(v.features.gradients) for t in case.tensors().values()
        ]
        output = v.kernel(*leaves, live)
        grads = torch.autograd.grad(output.square().sum(), leaves) if v.features.gradients else ()
        runs.append([output, *grads])
    v.count += 1
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second), "two runs on the same inputs differ; is something accumulated by atomics?"


@pytest.mark.parametrize("length", [16384, 131072])
def test_long_inputs(verification: Verification, length: int) -> None:
    """Against the dense form of some rows at a time, on a GPU."""
    v = verification
    if v.device != "cuda":
        pytest.skip("only a GPU is fast enough for long inputs")
    if "bfloat16" not in v.dtypes:
        pytest.skip("the kernel was not asked for bfloat16")
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, h, length, 64, dtype=torch.bfloat16, device="cuda") for h in (4, 2, 2))
    live = running_topk_ranges(torch.randn(1, 2, length, device="cuda"), 512)
    output = v.kernel(query, key, value, live)
    for rows in torch.arange(length, device="cuda").split(2048)[:: max(1, length // 16384)]:
        part = query[:, :, rows]
        exact = reference.live_range_attention(part.double(), key.double(), value.double(), live, query_index=rows)
        dense = reference.live_range_attention(part, key, value, live, query_index=rows, operands=torch.bfloat16)
        assert isinstance(exact, torch.Tensor) and isinstance(dense, torch.Tensor)
        assert_within_budget(output[:, :, rows].cpu(), dense.cpu(), exact.cpu(), f"rows {int(rows[0])} on")
        v.count += 1


@pytest.mark.parametrize("group", ["mean", "max", "per_query_head"])
def test_key_scores(verification: Verification, group: str) -> None:
    v = verification
    if v.kernel is not live_range_attention:
        pytest.skip("only for the built-in kernels")

    @patient(v, v.examples // 2 + 1)
    @given(case=attention_cases(max_keys=v.max_keys))
    def check(case: Case) -> None:
        tensors, live = case.tensors(), case.live()
        options: dict[str, Any] = case.options()
        if "bias" in tensors:
            options["bias"] = tensors["bias"]
        query, key, value = (tensors[name] for name in ("query", "key", "value"))
        _, lse = reference.live_range_attention(
            query, key, value, live, sinks=tensors.get("sinks"), return_lse=True, **options
        )

        def run(scores: Callable[..., Any], dtype: torch.dtype, device: str) -> torch.Tensor:
            moved = {
                name: t.to(device, dtype if t.is_floating_point() else t.dtype) if isinstance(t, torch.Tensor) else t
                for name, t in options.items()
            }
            own_live = LiveRanges(live.start.to(device), live.end.to(device))
            own_lse = lse.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
            return scores(query.to(device, dtype), key.to(device, dtype), own_lse, own_live, group=group, **moved).cpu()

        actual = run(key_scores, case.torch_dtype, v.device)
        dense = run(reference.key_scores, torch.float32, "cpu")
        exact = run(reference.key_scores, torch.float64, "cpu")
        # A weight is exp(logit - lse): the rounding of the two is a relative error of the weight.
        size = 1 + lse.abs().nan_to_num(posinf=0).max()
        assert_within_budget(actual, dense, exact, f"key scores of {case!r}", magnitude=exact * size * 2)
        v.count += 1

    check()


def test_running_topk_ranges(verification: Verification) -> None:
    v = verification
    if v.kernel is not live_range_attention:
        pytest.skip("only for the built-in kernels")

    @patient(v, v.examples)
    @given(seed=st.integers(0, 2**16), keys=st.integers(1, 90), keep=st.integers(1, 95), values=st.integers(1, 200))
    def check(seed: int, keys: int, keep: int, values: int) -> None:
        score = torch.randint(0, values, (2, 2, keys), generator=torch.Generator().manual_seed(seed)).float()
        score[0, 0, seed % keys] = torch.nan
        segment = torch.arange(keys, dtype=torch.int32)[None, None, :] // (1 + seed % 40)
        for given_segment in (None, segment):
            on_device = None if given_segment is None else given_segment.to(v.device)
            actual = running_topk_ranges(score.to(v.device), keep, segment=on_device)
            assert torch.equal(actual.end.cpu(), reference.running_topk_ranges(score, keep, segment=given_segment).end)
        v.count += 1

    check()
