"""The kernel in C++, and PyTorch's operators where it cannot be compiled, against the dense reference, in small blocks too.

Constants of the kernel are changed in its text, so that small inputs have several blocks, panels and sums.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from attention_by import Attention
from attention_by import in_torch
from attention_by import native_variant
from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from rewriter.kernels import FOREVER
from rewriter.kernels import LiveRanges
from rewriter.kernels import live_range_attention
from rewriter.kernels.cpu import attention as cpu
from rewriter.kernels.cpu import native
from rewriter.kernels.cpu import schedule
from rewriter.kernels.dispatch import INTERPRETED

from rewriter.testing import ADVERSARIAL_RANGES
from rewriter.testing import Case
from rewriter.testing import assert_equivalent
from rewriter.testing import attention_cases

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the kernels are Triton's here")

SMALL = (
    ("kBlock = 128", "kBlock = 5"),
    ("kScan = 64", "kScan = 3"),
    ("kPanels = 8", "kPanels = 2"),
    ("kVectors = 2", "kVectors = 1"),
)


@functools.cache
def small() -> Attention:
    return native_variant("rewriter_small", *SMALL)


@functools.cache
def narrow() -> Attention:
    """For a machine with AVX2; the same as ever on one without AVX-512."""
    return native_variant("rewriter_narrow", bits=256)


@functools.cache
def panels() -> Attention:
    """Panels alone: no few rows are treated apart."""
    return native_variant("rewriter_panels", ("kMost = 8", "kMost = 0"), *SMALL)


def small_tiles() -> Attention:
    """Tiles of few rows, runs and blocks of few keys, by PyTorch's operators."""

    def attention(*args: object, **options: object) -> object:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu, "BLOCK", 5)
            patch.setattr(schedule, "MIN_RUN", 4)
            patch.setattr(cpu, "tile_rows", lambda group, queries, shared: 7)
            return in_torch()(*args, **options)

    return attention


KERNELS: dict[str, Callable[[], Attention]] = {
    "small": small,
    "narrow": narrow,
    "panels": panels,
    "torch": in_torch,
    "torch, small": small_tiles,
}


@pytest.mark.parametrize("name", KERNELS)
def test_random_cases(name: str) -> None:
    kernel = KERNELS[name]()
    patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=100)
    patient(given(case=attention_cases())(lambda case: assert_equivalent(kernel, case)))()


@pytest.mark.parametrize("ranges", ADVERSARIAL_RANGES)
@pytest.mark.parametrize("name", ["small", "panels", "torch, small"])
def test_adversarial_ranges(name: str, ranges: str) -> None:
    keys = ADVERSARIAL_RANGES[ranges]
    case = Case(queries=14, kv_heads=2, group=2, keys=len(keys), head_dim=12, value_dim=5, ranges=keys, bias="head")
    for queries in (14, 9, 2):
        assert_equivalent(KERNELS[name](), replace(case, queries=queries))
        assert_equivalent(KERNELS[name](), replace(case, queries=queries, sinks=True, softcap=2.0))


def test_gradients_do_not_depend_on_the_threads_but_for_their_rounding() -> None:
    live = LiveRanges.sliding_window(700, 90)
    tensors = [torch.randn(1, heads, 700, 24, dtype=torch.float64, requires_grad=True) for heads in (6, 3, 3)]
    results = []
    for threads in (1, 2, 5):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            output = live_range_attention(*tensors, live)
            results.append([output, *torch.autograd.grad(output.square().sum(), tensors)])
        finally:
            torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0]) and torch.equal(other[1], results[0][1])
        for a, b in zip(other[2:], results[0][2:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("few", [True, False])
def test_a_dead_key_between_the_rows_of_a_panel_is_not_touched(few: bool) -> None:
    """Alive at an index that no row has: what it holds, NaN here, must reach nothing."""
    query, key, value = (torch.randn(1, 2, size, 8) for size in (3 if few else 40, 50, 50))
    index = torch.arange(0, 2 * query.size(2), 2)
    start = torch.zeros(1, 1, 50, dtype=torch.int32)
    end = torch.full_like(start, FOREVER)
    start[..., 7], end[..., 7] = 3, 4
    expected = live_range_attention(query, key, value, LiveRanges(start, end), query_index=index)
    key[:, :, 7] = value[:, :, 7] = torch.nan
    actual = live_range_attention(query, key, value, LiveRanges(start, end), query_index=index)
    assert torch.equal(actual, expected) and bool(actual.isfinite().all())


def test_it_is_loaded_once_by_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the background, and by the first calls of an operator, whichever comes first: registering it twice is an error."""
    loaded: list[str] = []

    def slowly(*_: object, **__: object) -> None:
        time.sleep(0.1)
        loaded.append(threading.current_thread().name)

    native._loaded.cache_clear()
    monkeypatch.setattr(native, "_in_background", [])
    monkeypatch.setattr("torch._inductor.codecache.CppCodeCache.load", slowly)
    native.load_in_background()
    native.load_in_background()
    assert native.load() and len(loaded) == 1 and len(native._in_background) == 1
    native._in_background[0].join()
    assert len(loaded) == 1
    native._loaded.cache_clear()


def test_it_goes_on_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a warning that says what is missing."""

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler here")

    native._loaded.cache_clear()
    monkeypatch.setattr("torch._inductor.codecache.CppCodeCache.load", fails)
    with pytest.warns(
        UserWarning, match=r"cannot be compiled \(RuntimeError: no compiler here\).*needs a C\+\+ compiler"
    ):
        assert not native.load()
    native._loaded.cache_clear()
