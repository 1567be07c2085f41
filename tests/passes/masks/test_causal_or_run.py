"""`j <= i or i // c == j // c` is one interval for each key; with a gap between the two it is two."""

from __future__ import annotations

import pytest
import torch
from rewriter.kernels import FOREVER
from rewriter.passes.attention.site import AttentionSite
from rewriter.passes.attention.site import MaskTerm
from rewriter.passes.masks.evaluate import key_bounds
from rewriter.passes.masks.evaluate import key_grid
from rewriter.passes.masks.interpret import IndexFunctions
from rewriter.passes.masks.intervals import MaskProof
from rewriter.passes.masks.prove import prove_mask
from torch.fx.experimental.proxy_tensor import make_fx

LENGTH, CHUNK = 14, 4


def proof(chunk_first: bool, behind: int) -> MaskProof:
    def mask(query: torch.Tensor) -> torch.Tensor:
        row, key = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None, :]
        causal, chunk = key + behind <= row, row // CHUNK == key // CHUNK
        return (chunk | causal) if chunk_first else (causal | chunk)

    query = torch.zeros(1, 1, LENGTH, 8)
    nodes = list(make_fx(mask, pre_dispatch=True)(query).graph.nodes)
    term = MaskTerm("keep", nodes[-1].args[0])
    return prove_mask(
        AttentionSite(term.node, "sdpa", nodes[0], nodes[0], nodes[0], masks=(term,)), IndexFunctions(), {}
    )


@pytest.mark.parametrize("chunk_first", [False, True])
def test_a_key_is_seen_from_the_begin_of_its_chunk_for_ever(chunk_first: bool) -> None:
    interval = proof(chunk_first, 0).interval
    grid = key_grid(1, 1, LENGTH, torch.device("cpu"))
    start, end = (key_bounds(e, {}, grid).flatten() for e in (interval.start, interval.end))
    index = torch.arange(LENGTH)
    assert start.tolist() == (index // CHUNK * CHUNK).tolist() and end.tolist() == [FOREVER] * LENGTH
    visible = (start[None] <= index[:, None]) & (index[:, None] < end[None])
    assert torch.equal(visible, (index[None] <= index[:, None]) | (index[:, None] // CHUNK == index[None] // CHUNK))
    assert not interval.causal and interval.traits == ("causal", "chunks of 4")


def test_a_gap_leaves_two_ranges() -> None:
    grid = key_grid(1, 1, LENGTH, torch.device("cpu"))
    index = torch.arange(LENGTH)[:, None]
    found = proof(True, CHUNK + 2)
    holds = []
    for interval in found.intervals:
        start, end = (key_bounds(e, {}, grid).flatten() for e in (interval.start, interval.end))
        holds.append((start <= index) & (index < end))
    key = index.T
    assert 2 <= len(holds) <= 3 and int(torch.stack(holds).sum(dim=0).max()) == 1
    expected = (key + CHUNK + 2 <= index) | (index // CHUNK == key // CHUNK)
    assert torch.equal(torch.stack(holds).any(dim=0), expected)
