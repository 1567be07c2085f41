"""Launches are counted here, and a change may not add one without a word."""

from __future__ import annotations

import pytest
from rewriter.kernels.dispatch import INTERPRETED
from rewriter.kernels.gpu.schedule import SCHEDULE_KERNELS

from rewriter.testing.launch_counts import launch_counts

pytestmark = pytest.mark.skipif(INTERPRETED, reason="in the interpreter tensors without data are no GPU's")

MOST = {
    "schedule of a forward": (7, 1),
    "schedules of a forward and its gradients": (14, 9),
    "attention, a layer of a model": (1, 0),
    "its gradients": (3, 0),
    "attention by itself": (8, 1),
    "gradients by themselves": (10, 9),
    "attention of one token": (2, 1),
    "scores of keys": (1, 1),
    "ranges of a running top-k": (2, 3),
}
"""Kernels of this project, and operators of torch."""


def test_no_operator_launches_more() -> None:
    counts = {count.operator: count for count in launch_counts()}
    assert {name: (len(count.own), len(count.of_torch)) for name, count in counts.items()} == MOST
    assert counts["schedule of a forward"].own == SCHEDULE_KERNELS
    assert counts["attention, a layer of a model"].own == ("_forward",)
    assert counts["its gradients"].own == ("_query_gradient", "_list_gradients", "_key_gradients")
