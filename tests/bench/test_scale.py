"""The simulation of many GPUs: its formulas at places where the answer is known."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

_SPEC = importlib.util.spec_from_file_location("bench_scale", Path(__file__).parents[2] / "bench" / "scale.py")
assert _SPEC is not None and _SPEC.loader is not None
scale: Any = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = scale  # where dataclasses look for it
_SPEC.loader.exec_module(scale)

GPU = scale.Gpu(1e15, {"causal": (0.010, 0.030), "less": (0.001, 0.003)}, {"causal": 1.0, "less": 0.1})
MODEL = scale.Model("8B", 8e9, 32, 4096, 32, 8)


def test_a_step_is_products_and_attention() -> None:
    found = scale.step(MODEL, 64, "causal", GPU, scale.Between())
    tokens = 512 / 64 * 32_768
    assert found.compute == pytest.approx(8 * 8e9 * tokens / 1e15 + 32 * (512 / 64) * (2 * 0.010 + 0.030))
    assert found.between == 0.0 and found.between_bytes == 0.0
    assert found.inside_bytes == pytest.approx(6 * 8e9 * (1 - 8 / 64) * 8)  # eight rows, one after the other
    assert found.memory == pytest.approx(16 * 8e9 / 64 + 32 * 32_768 * 4096 * 2)


def test_keys_travel_where_a_row_has_several_nodes() -> None:
    sent = {
        (gpus, mask): scale.step(MODEL, gpus, mask, GPU, scale.Between()).inside_bytes
        for gpus in (512, 4096, 10240)
        for mask in ("causal", "less")
    }
    assert sent[512, "causal"] == sent[512, "less"] and sent[4096, "causal"] == sent[4096, "less"]  # a node has a row
    keys = 4 * (1 - 8 / 20) * 32_768 * 2 * 8 * 128 * 2 * 32
    assert sent[10240, "causal"] - sent[10240, "less"] == pytest.approx(0.9 * keys)


def test_sites_send_what_a_ring_of_them_does() -> None:
    slow = scale.Between(sites=4, bandwidth=8e9, round_trip=0.1)
    each = scale.step(MODEL, 512, "causal", GPU, slow)
    assert each.between_bytes == pytest.approx(1.5 * 8e9 * 4)
    assert each.between == pytest.approx(1.5 * 8e9 * 4 / 1e9 + 2 * 3 * 0.1 - each.compute / 2)
    rare = scale.step(MODEL, 512, "causal", GPU, dataclasses.replace(slow, every=100))
    assert rare.between_bytes == pytest.approx(each.between_bytes / 100)
    assert rare.between == pytest.approx((1.5 * 8e9 * 4 / 1e9 + 2 * 3 * 0.1) / 100)
    assert rare.memory == pytest.approx(each.memory + 8 * 8e9 / 128)
    streamed = scale.step(MODEL, 512, "causal", GPU, dataclasses.replace(slow, every=100, fragments=4))
    assert streamed.between == 0.0 and streamed.efficiency == 1.0


def test_the_link_that_is_needed_is_the_least() -> None:
    between = scale.Between(sites=2, round_trip=0.015)
    needed = scale.needed_bandwidth(MODEL, 2048, GPU, between, 0.95)
    alone = scale.step(MODEL, 2048, "causal", GPU, scale.Between()).seconds
    speeds = [
        alone / scale.step(MODEL, 2048, "causal", GPU, dataclasses.replace(between, bandwidth=needed * part)).seconds
        for part in (0.99, 1.0)
    ]
    assert speeds[0] < 0.95 <= speeds[1]
    far = dataclasses.replace(between, round_trip=1e6)
    assert scale.needed_bandwidth(MODEL, 2048, GPU, far, 0.95) == float("inf")


def test_what_was_measured_is_read() -> None:
    gpu = scale.measured()
    assert set(gpu.attention) == set(gpu.keys_sent) == set(scale.MASKS)
    assert all(0 < forward < backward for forward, backward in gpu.attention.values())
    assert gpu.attention["a window"] < gpu.attention["causal"] and gpu.keys_sent["a window"] < 0.02


def test_what_does_not_fit_is_said() -> None:
    results = scale.simulate()
    fits = {(r["model"], r["gpus"]): r["fits"] for r in results["steps"] if r["place"] == "one site"}
    assert not fits["405B", 8] and fits["405B", 2048] and fits["1B", 64]
    assert all(r["seconds"] >= r["compute"] > 0 for r in results["steps"])
