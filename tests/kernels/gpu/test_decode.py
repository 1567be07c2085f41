"""How a cache is split over programs: as many as the GPU runs at once, where there are keys for them."""

from __future__ import annotations

import pytest
import torch
from rewriter.kernels.arguments import AttentionArguments
from rewriter.kernels.gpu.decode import SMALLEST_SPLIT
from rewriter.kernels.gpu.decode import SPLIT
from rewriter.kernels.gpu.decode import split_keys
from rewriter.kernels.gpu.kernel_inputs import KernelInputs
from rewriter.kernels.gpu.launch import record_launches
from rewriter.kernels.live_ranges import LiveRanges
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv


def inputs(rows: int, heads: int, keys: int) -> KernelInputs:
    meta = torch.device("meta")
    query = torch.empty(rows, 4 * heads, 1, 128, dtype=torch.bfloat16, device=meta)
    key = torch.empty(rows, heads, keys, 128, dtype=torch.bfloat16, device=meta)
    live = LiveRanges.causal(keys, device=meta)
    return KernelInputs.make(AttentionArguments(query, key, key, live.start, live.end), sort=False)


@pytest.mark.parametrize(
    ("rows", "heads", "keys", "expected"),
    [
        (1, 8, 1024, SMALLEST_SPLIT),  # 128 programs, of 16 in splits of 512
        (1, 8, 4096, 64),
        (1, 8, 8192, 128),  # 512 programs; of 256 keys they would be 256, fewer than two a processor
        (32, 8, 1024, SPLIT),
        (64, 8, 256, SPLIT),
        (1, 1, 16, SMALLEST_SPLIT),
    ],
)
def test_splits_fill_the_gpu(rows: int, heads: int, keys: int, expected: int) -> None:
    with record_launches("sm90"):
        split = split_keys(inputs(rows, heads, keys), 1, 64)
    assert split == expected


def test_a_split_is_whole_blocks() -> None:
    with record_launches("sm90"):
        assert split_keys(inputs(1, 1, 4096), 1, 128) == 128


def test_sizes_that_are_symbols_choose_nothing() -> None:
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    live = LiveRanges.causal(70)
    tensors = (torch.empty(2, 4, 1, 64), torch.empty(2, 2, 70, 64), torch.empty(2, 2, 70, 64), live.start, live.end)
    fakes = [mode.from_tensor(t, static_shapes=False) for t in tensors]
    with mode, record_launches("sm90"):
        given = KernelInputs.make(AttentionArguments(*fakes), sort=False)
        guards = len(env.guards)
        assert split_keys(given, 1, 64) == SPLIT
    assert len(env.guards) == guards
