"""What a kernel remembers of live ranges that it has seen: by their values, and only so much."""

from __future__ import annotations

import threading

import pytest
import torch
from rewriter.kernels import LiveRanges
from rewriter.kernels import live_range_attention
from rewriter.kernels import reference
from rewriter.kernels.cpu import dense
from rewriter.kernels.cpu import fused_tiles
from rewriter.kernels.cpu.remembered import ENTRIES
from rewriter.kernels.cpu.remembered import Remembered
from rewriter.kernels.dispatch import INTERPRETED


def test_by_values_and_not_by_identity() -> None:
    known: Remembered[str] = Remembered()
    tensor = torch.arange(4)
    known.keep("sizes", [tensor], "first")
    assert known.find("sizes", [torch.arange(4)]) == "first"
    assert known.find("other sizes", [tensor]) is None
    tensor[2] = 7  # as compiled code writes into the tensors that it has
    assert known.find("sizes", [tensor]) is None
    assert known.find("sizes", [torch.arange(4)]) == "first"
    assert known.find("sizes", [torch.arange(5)]) is None


def test_the_oldest_is_forgotten() -> None:
    known: Remembered[int] = Remembered()
    for number in range(ENTRIES + 1):
        known.keep(number, [], number)
    assert known.find(0, []) is None and known.find(ENTRIES, []) == ENTRIES
    known.clear()
    assert known.find(ENTRIES, []) is None


def test_threads_share_it() -> None:
    known: Remembered[int] = Remembered()
    wrong: list[int | None] = []

    def use(number: int) -> None:
        for _ in range(200):
            known.keep(number, [torch.tensor([number])], number)
            found = known.find(number, [torch.tensor([number])])
            if found not in (None, number):  # others may have taken the places
                wrong.append(found)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


through_the_operator = pytest.mark.skipif(INTERPRETED, reason="the operator runs the Triton kernels in the interpreter")


@through_the_operator
def test_layers_and_a_backward_share_one_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """A count, as the times that it saves are not to be measured here."""
    fused_tiles._KNOWN.clear()
    dense._KNOWN.clear()
    made: list[str] = []
    for module, name in ((fused_tiles, "_make_pieces"), (dense, "_find_parts")):
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, own=own, name=name: made.append(name) or own(*args))
    tensors = [torch.randn(1, 2, 24, 8, requires_grad=True) for _ in range(3)]
    for _ in range(3):
        live = LiveRanges.sliding_window(24, 5)  # new tensors of the same values
        live_range_attention(*tensors, live).sum().backward()
    assert sorted(made) == ["_find_parts", "_make_pieces"]


@through_the_operator
def test_other_ranges_of_the_same_sizes_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """And masks that take too much memory are made again."""
    tensors = [torch.randn(2, 2, 24, 8) for _ in range(3)]
    for most in (fused_tiles.MAX_REMEMBERED, 40):
        monkeypatch.setattr(fused_tiles, "MAX_REMEMBERED", most)
        fused_tiles._KNOWN.clear()
        for window in (5, 6, 5, 7):
            live = LiveRanges.sliding_window(24, window)
            expected = reference.live_range_attention(*tensors, live)
            torch.testing.assert_close(live_range_attention(*tensors, live), expected)
    assert fused_tiles._KNOWN.find((tensors[0].shape[:3], 2, torch.float32, 24), [live.start, live.end]) is None


@through_the_operator
def test_what_was_made_in_inference_mode_serves_training() -> None:
    fused_tiles._KNOWN.clear()
    live = LiveRanges.sliding_window(24, 5)
    tensors = [torch.randn(1, 2, 24, 8) for _ in range(3)]
    with torch.inference_mode():
        first = live_range_attention(*tensors, live)
    learning = [t.clone().requires_grad_() for t in tensors]
    output = live_range_attention(*learning, live)
    output.sum().backward()
    torch.testing.assert_close(output.detach(), first.clone(), rtol=0, atol=0)
    assert all(torch.isfinite(t.grad).all() for t in learning)
