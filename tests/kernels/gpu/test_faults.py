"""Deliberate faults in the schedule, each of which the comparison with the dense reference must find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from rewriter.kernels import live_range_attention
from rewriter.kernels.dispatch import INTERPRETED
from rewriter.kernels.gpu import schedule
from rewriter.kernels.gpu import shared_schedule
from rewriter.kernels.gpu.schedule import Schedule

from rewriter.testing import Case
from rewriter.testing import assert_equivalent

pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="the Triton kernels run on a GPU, or with TRITON_INTERPRET=1"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = 40 if INTERPRETED else 400  # several of the larger tiles of a GPU
CASES = [
    Case(queries=SIZE, keys=SIZE, ranges="topk", seed=1),
    Case(queries=SIZE, keys=SIZE, ranges="separators", seed=1),
    Case(queries=SIZE, keys=SIZE, ranges="window", seed=2),
    Case(queries=SIZE, keys=SIZE, ranges="scattered", seed=1),
]


def end_off_by_one(s: Schedule) -> Schedule:
    return replace(s, end=torch.where(s.end < SIZE, s.end + 1, s.end))


def listed_keys_without_a_mask(s: Schedule) -> Schedule:
    return replace(s, list_full=s.list_begin.diff(dim=2).contiguous())


def run_without_its_right_border(s: Schedule) -> Schedule:
    return replace(s, run_end=s.full_end.clone())


def list_without_its_last_key(s: Schedule) -> Schedule:
    shorter = s.list_begin.clone()
    shorter[:, :, 1:] = torch.maximum(shorter[:, :, 1:] - 1, shorter[:, :, :-1])
    return replace(s, list_begin=shorter)


@pytest.mark.parametrize("kernel", ["forward", "backward_query"])
@pytest.mark.parametrize(
    "fault", [end_off_by_one, listed_keys_without_a_mask, run_without_its_right_border, list_without_its_last_key]
)
def test_faults_are_found(kernel: str, fault: Callable[[Schedule], Schedule], monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*arguments: Any) -> Schedule:
        made = schedule.build(*arguments)
        return fault(made) if arguments[-1] == shared_schedule.CAPACITY[kernel] else made

    monkeypatch.setattr(shared_schedule, "build", build)
    messages = []
    for case in CASES:
        try:
            assert_equivalent(live_range_attention, case, device=DEVICE)
        except AssertionError as error:
            messages.append(str(error))
    assert [message for message in messages if "off, more than" in message or "is not finite" in message]
