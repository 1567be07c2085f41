from __future__ import annotations

import pytest
from rewriter.kernels.gpu.launch import HEAD_DIMS
from rewriter.kernels.gpu.launch import LaunchConfig
from rewriter.kernels.gpu.launch import launch_config
from rewriter.kernels.gpu.launch import table
from rewriter.kernels.gpu.launch import use_table
from rewriter.kernels.gpu.targets import TARGETS

KERNELS = ("forward", "backward_query", "backward_key", "decode", "key_scores")


@pytest.mark.parametrize("architecture", TARGETS)
def test_the_table_is_complete(architecture: str) -> None:
    for kernel in KERNELS:
        for element_size in (2, 4):
            for head_dim in HEAD_DIMS:
                config = launch_config(architecture, kernel, element_size, head_dim)
                # A matrix product takes at least 16 of each; powers of two, as Triton's tiles are.
                assert config.block_m in (16, 32, 64, 128)
                assert config.block_n in (16, 32, 64, 128)
                assert config.num_warps in (1, 2, 4, 8)


@pytest.mark.parametrize("architecture", TARGETS)
def test_a_tile_of_the_querys_gradient_is_whole_tiles_of_the_keys(architecture: str) -> None:
    for bits, entries in table()[architecture]["backward_query"].items():
        for head_dim, entry in entries.items():
            assert entry[0] % table()[architecture]["backward_key"][bits][head_dim][0] == 0


def test_a_head_dim_takes_the_next_larger_entry() -> None:
    for head_dim, entry in ((1, 64), (64, 64), (65, 128), (129, 256), (256, 256)):
        assert launch_config("sm90", "forward", 2, head_dim) == launch_config("sm90", "forward", 2, entry)


def test_another_table_holds_inside_the_block_only() -> None:
    before = launch_config("sm90", "forward", 2, 64)
    with use_table({"sm90": {"forward": {"16": {"64": [16, 16, 1, 1]}}}}):
        assert launch_config("sm90", "forward", 2, 64) == LaunchConfig(16, 16, 1, 1)
    assert launch_config("sm90", "forward", 2, 64) == before
