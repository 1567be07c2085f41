"""Each form of a mask by itself: what it proves is what the mask shows, and what is not one interval is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rewriter.kernels import FOREVER
from rewriter.passes.attention.site import AttentionSite
from rewriter.passes.attention.site import MaskTerm
from rewriter.passes.masks.evaluate import key_bounds
from rewriter.passes.masks.evaluate import key_grid
from rewriter.passes.masks.interpret import IndexFunctions
from rewriter.passes.masks.intervals import MaskProof
from rewriter.passes.masks.intervals import Unproven
from rewriter.passes.masks.prove import prove_mask
from torch import Tensor
from torch.fx import GraphModule
from torch.fx import Interpreter
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

BATCH, HEADS, LENGTH = 2, 2, 12

Mask = Callable[..., Tensor]


def row() -> Tensor:
    return torch.arange(LENGTH)[:, None]


def key() -> Tensor:
    return torch.arange(LENGTH)[None, :]


def causal() -> Tensor:
    return key() <= row()


class Traced:
    """A mask's graph, and a site that it is the mask of. The last inputs are buffers of the model where that is asked for."""

    def __init__(self, mask: Mask, *data: Tensor, buffers: int = 0) -> None:
        query = torch.zeros(BATCH, HEADS, LENGTH, 8)
        self.inputs = (query, *data)
        self.module: GraphModule = make_fx(lambda query, *data: mask(*data), pre_dispatch=True)(*self.inputs)
        placeholders = [node for node in self.module.graph.nodes if node.op == "placeholder"]
        (output,) = (node for node in self.module.graph.nodes if node.op == "output")
        self.constants = dict(zip(placeholders[-buffers:], data[-buffers:], strict=True)) if buffers else {}
        own = placeholders[0]
        term = MaskTerm("keep", output.args[0])
        self.site = AttentionSite(term.node, "sdpa", query=own, key=own, value=own, masks=(term,))

    def prove(self) -> MaskProof:
        return prove_mask(self.site, IndexFunctions(), self.constants)

    def values(self, *data: Tensor) -> dict[Node, Any]:
        """Of all nodes, for these inputs or those of the trace."""
        interpreter = Interpreter(self.module, garbage_collect_values=False)
        interpreter.run(*((self.inputs[0], *data) if data else self.inputs))
        return interpreter.env


def bounds(proof: MaskProof, env: dict[Node, Any]) -> tuple[Tensor, Tensor]:
    """Start and end `[B, H, K]`."""
    grid = key_grid(BATCH, HEADS, LENGTH, torch.device("cpu"))
    start, end = (key_bounds(e, env, grid) for e in (proof.interval.start, proof.interval.end))
    return start.expand(BATCH, HEADS, -1), end.expand(BATCH, HEADS, -1)


def seen(visible: Tensor) -> list[list[int]]:
    """Of each column the rows that see it."""
    return [[i for i in range(LENGTH) if visible[i, j]] for j in range(LENGTH)]


def assert_proven(traced: Traced, name: str, *others: tuple[Tensor, ...]) -> MaskProof:
    """Each column's rows, by brute force, are those from the proven start to the proven end, whatever the data."""
    proof = traced.prove()
    assert proof.name == name
    for data in ((), *others):
        env = traced.values(*data)
        visible = env[traced.site.masks[0].node].expand(BATCH, HEADS, LENGTH, LENGTH)
        start, end = bounds(proof, env)
        for b in range(BATCH):
            for h in range(HEADS):
                ranges = zip(start[b, h].tolist(), end[b, h].tolist(), strict=True)
                claimed = [list(range(max(begin, 0), min(after, LENGTH))) for begin, after in ranges]
                assert claimed == seen(visible[b, h])
    return proof


# Chunks.


def chunks(size: int, shift: Tensor | int = 0) -> Tensor:
    return (row() + shift) // size == (key() + shift) // size


def test_chunks() -> None:
    proof = assert_proven(Traced(lambda: chunks(5)), "chunks of 5")
    start, end = bounds(proof, {})
    assert start[0, 0].tolist() == [0] * 5 + [5] * 5 + [10] * 2
    assert end[0, 0].tolist() == [5] * 5 + [10] * 5 + [15] * 2
    assert not proof.interval.causal and not proof.interval.sliding


def test_causal_chunks_begin_at_their_own_key() -> None:
    proof = assert_proven(Traced(lambda: causal() & chunks(4)), "causal + chunks of 4")
    start, _ = bounds(proof, {})
    assert start[0, 0].tolist() == list(range(LENGTH))
    assert proof.interval.causal


def test_chunks_from_an_offset_that_is_data() -> None:
    def mask(offset: Tensor) -> Tensor:
        return chunks(4, offset[:, None, None, None])

    offsets = [(torch.tensor(pair),) for pair in ((1, 2), (-3, 7), (0, 0))]
    assert_proven(Traced(mask, *offsets[0]), "chunks of 4 from an offset", *offsets[1:])


@pytest.mark.parametrize(
    "mask",
    [
        lambda: key() // 4 <= row() // 4,
        lambda: row() // 4 >= key() // 4,
        lambda: key() // 3 < row() // 3,
        lambda: row() // 3 > key() // 3 - 2,
        lambda: row() // 4 <= key() // 4,
        lambda: (row() + 2) // 4 < key(),
    ],
)
def test_blocks(mask: Mask) -> None:
    """Comparisons of `i // c` with what the key alone decides."""
    traced = Traced(mask)
    assert_proven(traced, traced.prove().name)
    assert traced.prove().name.startswith("blocks of ")


@pytest.mark.parametrize(
    "mask",
    [
        lambda: (2 * row()) // 4 == (2 * key()) // 4,
        lambda: (row() + row() // 2) // 4 == (key() + key() // 2) // 4,
    ],
)
def test_rows_that_are_not_counted_by_one_make_no_chunks(mask: Mask) -> None:
    with pytest.raises(Unproven, match="compares a function of the query with the same of the key"):
        Traced(mask).prove()


def test_chunks_of_a_size_that_is_data_are_refused() -> None:
    def mask(size: Tensor) -> Tensor:
        return row() // size[:, None, None, None] == key() // size[:, None, None, None]

    with pytest.raises(Unproven, match="compares a function of the query with the same of the key"):
        Traced(mask, torch.tensor([3, 4])).prove()


def test_chunks_that_differ_by_head_are_refused() -> None:
    with pytest.raises(Unproven, match="differs between heads"):
        Traced(lambda shift: chunks(4, shift[:, None, None]), torch.tensor([0, 2])).prove()


# Constant buffers.

BUFFERS: dict[str, tuple[Tensor, str]] = {
    "causal": (torch.ones(16, 16).tril(), "causal"),
    "window": (torch.ones(16, 16).tril() - torch.ones(16, 16).tril(-5), "causal + window 5"),
    "window alone": (1 - torch.ones(16, 16).tril(-4), "window 4"),
}


@pytest.mark.parametrize("name", BUFFERS)
def test_constant_buffer(name: str) -> None:
    buffer, traits = BUFFERS[name]
    proof = Traced(lambda buffer: buffer[:LENGTH, :LENGTH] != 0, buffer, buffers=1).prove()
    assert proof.name == traits
    assert [node.op for node in proof.constants] == ["placeholder"]
    start, end = bounds(proof, {})
    for j, rows in enumerate(seen(buffer[:LENGTH, :LENGTH] != 0)):
        assert [i for i in range(LENGTH) if start[0, 0, j] <= i < end[0, 0, j]] == rows


def test_a_buffer_read_the_other_way_round() -> None:
    proof = Traced(lambda buffer: buffer.transpose(0, 1) == 0, torch.ones(16, 16).tril(-1), buffers=1).prove()
    assert proof.name == "causal"


def test_constant_buffer_of_truth_values_beside_padding() -> None:
    """The part of the mask that is data is not read."""

    def mask(real: Tensor, buffer: Tensor) -> Tensor:
        return buffer[None, None, :LENGTH, :LENGTH] & real[:, None, None, :]

    real, buffer = torch.rand(BATCH, LENGTH) < 0.6, torch.ones(16, 16, dtype=torch.bool).tril()
    traced = Traced(mask, real, buffer, buffers=1)
    proof = assert_proven(traced, "causal + padding", (~real, buffer))
    assert [node.name for node in proof.constants] == list(map(str, traced.constants))


def sub_block(buffer: Tensor) -> Tensor:
    return buffer[2 : LENGTH + 2, :LENGTH] != 0


def whole(buffer: Tensor) -> Tensor:
    return buffer[:LENGTH, :LENGTH] != 0


REFUSED_BUFFERS: dict[str, tuple[Mask, Tensor, str]] = {
    "checkerboard": (whole, (torch.arange(16)[:, None] + torch.arange(16)) % 2, "shows a key, hides it and shows it"),
    "shifted": (sub_block, torch.ones(16, 16).tril(), r"read at other places than \[row, key\]"),
    "no two keys alike": (
        whole,
        (torch.arange(16) <= torch.arange(16)[:, None]) & (torch.arange(16)[:, None] < torch.arange(16) * 2 + 1),
        "neither causal nor a window",
    ),
    "a first row that sees more": (
        whole,
        torch.ones(16, 16).tril().index_fill(1, torch.tensor([3]), 1),
        "neither causal",
    ),
    "meta": (whole, torch.ones(16, 16, device="meta"), "meta device has no values"),
}


@pytest.mark.parametrize("name", REFUSED_BUFFERS)
def test_constant_buffer_is_refused(name: str) -> None:
    mask, buffer, reason = REFUSED_BUFFERS[name]
    given = torch.ones(16, 16) if buffer.is_meta else buffer
    traced = Traced(mask, given, buffers=1)
    traced.constants = dict.fromkeys(traced.constants, buffer)
    with pytest.raises(Unproven, match=reason):
        traced.prove()


def test_a_buffer_whose_values_are_not_known_is_data() -> None:
    traced = Traced(whole, torch.ones(16, 16).tril())
    with pytest.raises(Unproven, match="depends on the query through data"):
        traced.prove()


# Documents.


def numbers(ids: Tensor) -> Tensor:
    """A document ends before each 7."""
    return (ids == 7).cumsum(-1)


def same(numbers: Tensor) -> Tensor:
    return numbers[:, None, :, None] == numbers[:, None, None, :]


def tokens(seed: int) -> Tensor:
    return torch.randint(5, 9, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))


def test_documents() -> None:
    proof = assert_proven(Traced(lambda ids: same(numbers(ids)), tokens(0)), "documents", (tokens(1),), (tokens(2),))
    assert proof.interval.segment == proof.interval.end


def test_start_and_end_of_documents() -> None:
    ids = torch.tensor([[1, 1, 7, 1, 1, 1, 7, 7, 1, 1, 1, 1], [7] * 12])
    traced = Traced(lambda ids: same(numbers(ids)), ids)
    start, end = bounds(traced.prove(), traced.values())
    assert start[0, 0].tolist() == [0, 0, 2, 2, 2, 2, 6, 7, 7, 7, 7, 7]
    assert end[0, 0].tolist() == [2, 2, 6, 6, 6, 6, 7, 12, 12, 12, 12, 12]
    assert start[1, 0].tolist() == list(range(12)) and end[1, 0].tolist() == list(range(1, 13))


def test_causal_documents_begin_at_their_own_key() -> None:
    traced = Traced(lambda ids: same(numbers(ids)) & causal(), tokens(0))
    proof = assert_proven(traced, "documents + causal", (tokens(3),))
    start, _ = bounds(proof, traced.values())
    assert start[1, 0].tolist() == list(range(LENGTH))


def from_positions(positions: Tensor) -> Tensor:
    begins = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1
    return begins.cumsum(-1)


def packed(*lengths: int) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths])


def test_positions_within_documents_count_as_indices_do() -> None:
    """A window and chunks of positions, in the documents that the positions make."""

    def window(positions: Tensor) -> Tensor:
        place = positions[:, None]
        near = place[..., :, None] - place[..., None, :] < 3
        return same(from_positions(positions)) & near & causal()

    def chunked(positions: Tensor) -> Tensor:
        place = positions[:, None] // 3
        return same(from_positions(positions)) & (place[..., :, None] == place[..., None, :])

    first, second = torch.stack((packed(5, 7), packed(12))), torch.stack((packed(1, 1, 10), packed(4, 4, 4)))
    assert_proven(Traced(window, first), "documents + window 3 + causal", (second,))
    assert_proven(Traced(chunked, first), "documents + chunks of 3 from an offset", (second,))


def test_ids_that_may_fall_are_refused() -> None:
    with pytest.raises(Unproven, match="document ids are not known to be non-decreasing"):
        Traced(same, tokens(0)).prove()


def test_a_sum_of_numbers_may_fall() -> None:
    with pytest.raises(Unproven, match="document ids are not known to be non-decreasing"):
        Traced(lambda ids: same(ids.cumsum(-1)), tokens(0)).prove()


def test_documents_read_elsewhere_are_refused() -> None:
    def shifted(ids: Tensor) -> Tensor:
        return same(torch.cat((numbers(ids), numbers(ids)), dim=1).cumsum(-1)[:, 1 : LENGTH + 1])

    with pytest.raises(Unproven, match="document ids are not known to be non-decreasing"):
        Traced(shifted, tokens(0)).prove()


# Running top-k.


def largest(scores: Tensor, keep: int) -> Tensor:
    return torch.zeros_like(scores).scatter(-1, scores.topk(keep, dim=-1).indices, 1.0)


def best(scores: Tensor, keep: int = 3) -> Tensor:
    """Of the keys up to a query's own the best, by scores `[B, H, K]`."""
    masked = scores[:, :, None, :].masked_fill(~causal(), -torch.inf)
    return (largest(masked, keep) != 0) & causal()


def scores(seed: int) -> Tensor:
    return torch.randn(BATCH, HEADS, LENGTH, generator=torch.Generator().manual_seed(seed))


def test_running_topk() -> None:
    traced = Traced(best, scores(0))
    proof = assert_proven(traced, "dynamic mask 3 + causal", (scores(1),), (scores(2),))
    values = scores(0)
    _, end = bounds(proof, traced.values())
    for b, h, j in torch.cartesian_prod(torch.arange(BATCH), torch.arange(HEADS), torch.arange(LENGTH)).tolist():
        better = [i for i in range(LENGTH) if values[b, h, i] > values[b, h, j]]
        before, after = sum(i < j for i in better), [i for i in better if i > j]
        room = 3 - before
        if room <= 0:
            assert end[b, h, j] <= j
        else:
            assert end[b, h, j] == (after[room - 1] if room <= len(after) else FOREVER)


def test_running_topk_beside_padding() -> None:
    """Hidden keys are not ranked."""

    def mask(scores: Tensor, real: Tensor) -> Tensor:
        shown = causal() & real[:, None, None, :]
        masked = scores[:, :, None, :] + torch.where(shown, 0.0, -torch.inf)
        return (largest(masked, 3) != 0) & shown

    real = [torch.rand(BATCH, LENGTH) < share for share in (0.7, 0.4, 1.0)]
    others = [(scores(n), pattern) for n, pattern in enumerate(real)]
    assert_proven(Traced(mask, *others[0]), "dynamic mask 3 + causal + padding", *others[1:])


def all_keys(scores: Tensor) -> Tensor:
    return largest(scores[:, :, None, :].expand(-1, -1, LENGTH, -1), 3) != 0


def in_a_window(scores: Tensor) -> Tensor:
    shown = causal() & (row() - key() < 5)
    return largest(scores[:, :, None, :].masked_fill(~shown, -torch.inf), 3) != 0


def without_scores(scores: Tensor) -> Tensor:
    return largest(torch.where(causal(), 0.0, -torch.inf) + torch.zeros(BATCH, HEADS, 1, 1), 3) != 0


def transposed(scores: Tensor) -> Tensor:
    masked = scores[:, :, None, :].masked_fill(~causal(), -torch.inf)
    return largest(masked, 3).transpose(-1, -2) != 0


def of_the_query(scores: Tensor) -> Tensor:
    masked = (scores[:, :, None, :] * scores[:, :, :, None]).masked_fill(~causal(), -torch.inf)
    return largest(masked, 3) != 0


def smallest(scores: Tensor) -> Tensor:
    masked = scores[:, :, None, :].masked_fill(~causal(), -torch.inf)
    chosen = masked.topk(3, dim=-1, largest=False).indices
    return torch.zeros_like(masked).scatter(-1, chosen, 1.0) != 0


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (all_keys, "top-k is not over the keys of a causal prefix"),
        (in_a_window, r"top-k is not over the keys of a causal prefix \(causal, window 5\)"),
        (without_scores, "top-k of 0 added scores is not understood"),
        (transposed, "top-k is not read at its own row and key"),
        (of_the_query, "an additive mask is computed from data"),
        (smallest, "differs between heads"),
    ],
)
def test_other_topks_are_refused(mask: Mask, reason: str) -> None:
    with pytest.raises(Unproven, match=reason):
        Traced(mask, scores(0)).prove()
