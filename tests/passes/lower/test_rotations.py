"""Rotary embeddings written by hand: what is found of them, and that a copy for other positions rotates there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rewriter.passes.graph.copy import GraphCopy
from rewriter.passes.lower.rotations import Rotation
from rewriter.passes.lower.rotations import Unrotatable
from rewriter.passes.lower.rotations import find_rotation
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.experimental.symbolic_shapes import StatelessSymbolicContext

BATCH, HEADS, LENGTH, WIDTH = 3, 2, 5, 8

Rotate = Callable[[Tensor, Tensor], Tensor]
"""From queries or keys, and positions `[B, S]`, to `[B, H, S, D]`."""


def angles(positions: Tensor, width: int = WIDTH) -> Tensor:
    """`[B, S, width / 2]`."""
    frequencies = 100.0 ** (-torch.arange(0, width, 2) / width)
    return positions[:, :, None].float() * frequencies


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., : WIDTH // 2], x[..., WIDTH // 2 :]


def rotate_half(x: Tensor, positions: Tensor) -> Tensor:
    """As Llama is: the halves of a head are the two coordinates."""
    both = torch.cat((angles(positions), angles(positions)), dim=-1)
    cos, sin = both.cos()[:, None], both.sin()[:, None]
    return x * cos + torch.cat((-x[..., WIDTH // 2 :], x[..., : WIDTH // 2]), dim=-1) * sin


def interleaved(x: Tensor, positions: Tensor) -> Tensor:
    """As GPT-J is: neighbours are the two coordinates."""
    cos, sin = angles(positions).cos()[:, None], angles(positions).sin()[:, None]
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def partial(x: Tensor, positions: Tensor) -> Tensor:
    """Half of a head is rotated."""
    cos, sin = angles(positions, 4).cos()[:, None], angles(positions, 4).sin()[:, None]
    first, second = x[..., :2], x[..., 2:4]
    return torch.cat((first * cos - second * sin, first * sin + second * cos, x[..., 4:]), dim=-1)


def tokens_first(x: Tensor, positions: Tensor) -> Tensor:
    """Rotated as `[B, S, H, D]`."""
    cos, sin = angles(positions).cos()[:, :, None], angles(positions).sin()[:, :, None]
    left, right = halves(x)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).transpose(1, 2)


def chunked(x: Tensor, positions: Tensor) -> Tensor:
    """As gpt-oss is: one operator makes both halves."""
    cos, sin = angles(positions).cos()[:, None], angles(positions).sin()[:, None]
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


def sizes_of_the_call(x: Tensor, positions: Tensor) -> Tensor:
    """The number of tokens is written out on both sides."""
    batch, length = positions.shape
    angle = angles(positions).reshape(batch, 1, length, 4).expand(batch, HEADS, length, 4)
    left, right = halves(x)
    turned = torch.cat((left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()), dim=-1)
    return turned.reshape(batch, HEADS, length, WIDTH)


def a_scale_and_a_shift(x: Tensor, positions: Tensor) -> Tensor:
    """No rotation at all: whatever depends on positions is run again."""
    return x * (positions + 1)[:, None, :, None].log() + positions.square()[:, None, :, None]


FORMS: dict[str, tuple[Rotate, int]] = {
    "rotate half": (rotate_half, 2),
    "interleaved": (interleaved, 2),
    "partial": (partial, 2),
    "tokens first": (tokens_first, 1),
    "sizes of the call": (sizes_of_the_call, 2),
    "a scale and a shift": (a_scale_and_a_shift, 2),
    "chunked": (chunked, 2),
}
NAMES = list(FORMS)


class Traced:
    """A graph with a query, a key and a value.

    Args:
        dynamic: the sizes that are symbolic.
    """

    def __init__(
        self, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor, dynamic: tuple[int, ...] = (LENGTH,)
    ) -> None:
        mode = FakeTensorMode(shape_env=ShapeEnv())
        fakes = []
        for tensor in inputs:
            sizes = [DimDynamic.DYNAMIC if size in dynamic else DimDynamic.STATIC for size in tensor.shape]
            fakes.append(mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes)))
        with mode:
            self.module: GraphModule = make_fx(function, pre_dispatch=True)(*fakes)
        nodes = list(self.module.graph.nodes)
        self.positions = [node for node in nodes if node.op == "placeholder"][-1]
        self.query, self.key, self.value = nodes[-1].args[0]

    def find(self, result: Node, attentions: tuple[Node, ...] = ()) -> Rotation:
        return find_rotation(result, self.positions, self.value, attentions)


def content(token_dim: int, length: int = LENGTH, seed: int = 0) -> Tensor:
    sizes = (BATCH, HEADS, length, WIDTH) if token_dim == 2 else (BATCH, length, HEADS, WIDTH)
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def positions(length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(0, 50, (BATCH, length), generator=torch.Generator().manual_seed(seed))


@functools.cache
def trace(rotate: Rotate, token_dim: int = 2) -> Traced:
    def forward(query: Tensor, key: Tensor, value: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        return rotate(query, position_ids), rotate(key * 2, position_ids), value

    dynamic = (BATCH, LENGTH) if rotate is sizes_of_the_call else (LENGTH,)
    inputs = content(token_dim), content(token_dim, seed=1), content(2, seed=2), positions()
    return Traced(forward, *inputs, dynamic=dynamic)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_found(name: str) -> None:
    rotate, token_dim = FORMS[name]
    traced = trace(rotate, token_dim)
    rotation = traced.find(traced.query)
    assert rotation.content.op == "placeholder" and rotation.content is not traced.positions
    assert rotation.token_dim == token_dim
    assert rotation.result is traced.query and rotation.nodes[-1] is traced.query
    assert {n for n in rotation.angles if n is not traced.positions} <= set(rotation.angle_nodes)
    assert not set(rotation.others) & {rotation.content, *rotation.content.users}
    doubled = traced.find(traced.key).content
    assert doubled.target is torch.ops.aten.mul.Tensor and doubled.args[1] == 2, (
        "what is done to a key before stays before"
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [1, LENGTH, 9])
def test_a_copy_for_other_positions_rotates_there(name: str, length: int) -> None:
    """In a copy of the graph, with as many tokens as there are."""
    rotate, token_dim = FORMS[name]
    traced = trace(rotate, token_dim)
    rotation = traced.find(traced.key)
    copy = GraphCopy(traced.module)
    places, other = copy.placeholder("places"), copy.placeholder("other")
    output = list(copy.graph.nodes)[-1]
    with copy.graph.inserting_before(output):
        turned = rotation.copy_angles(copy.graph, places, copy.copies)
        assert len(turned) == len(rotation.angles)
        result = rotation.copy(copy.graph, other, turned, copy.copies)
    output.args = ((result,),)
    module = copy.finish()
    keys, new = content(2, length, seed=3), positions(length, seed=4)
    unused = (content(token_dim), content(token_dim, seed=1), content(2, seed=2), positions())
    (actual,) = module(*unused, new, keys)
    expected = rotate(keys if token_dim == 2 else keys.transpose(1, 2), new)
    torch.testing.assert_close(actual, expected)
    assert actual.shape == (BATCH, HEADS, length, WIDTH)


@pytest.mark.parametrize("name", FORMS)
def test_the_original_stays(name: str) -> None:
    rotate, token_dim = FORMS[name]
    traced = trace(rotate, token_dim)
    before = str(traced.module.graph)
    traced.find(traced.query)
    GraphCopy(traced.module)
    assert str(traced.module.graph) == before


def test_angles_are_shared_by_query_and_key() -> None:
    def forward(query: Tensor, key: Tensor, value: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        cos, sin = angles(position_ids).cos()[:, None], angles(position_ids).sin()[:, None]

        def rotate(x: Tensor) -> Tensor:
            left, right = halves(x)
            return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)

        return rotate(query), rotate(key), value

    traced = Traced(forward, content(2), content(2, seed=1), content(2, seed=2), positions())
    of_query, of_key = traced.find(traced.query), traced.find(traced.key)
    assert of_query.angles == of_key.angles and len(of_query.angles) == 2
    assert of_query.angle_nodes == of_key.angle_nodes
    assert not set(of_query.nodes) & set(of_key.nodes)


def test_what_depends_on_positions_through_attention_alone_does_not_count() -> None:
    """The value of a second layer; its query is rotated again."""

    def forward(query: Tensor, key: Tensor, value: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        first = rotate_half(query, position_ids) @ rotate_half(key, position_ids).mT @ value
        return rotate_half(first, position_ids), rotate_half(first * 2, position_ids), first * 3

    traced = Traced(forward, content(2), content(2, seed=1), content(2, seed=2), positions())
    (attention,) = traced.value.all_input_nodes
    rotation = traced.find(traced.query, (attention,))
    assert rotation.content is attention
    with pytest.raises(Unrotatable, match="positions are part of what attention reads"):
        traced.find(traced.query)


def refused(function: Callable[..., tuple[Tensor, ...]], **keywords: Any) -> str:
    traced = Traced(function, content(2), content(2, seed=1), content(2, seed=2), positions(), **keywords)
    with pytest.raises(Unrotatable) as caught:
        traced.find(traced.query)
    return str(caught.value)


def test_learned_positions_are_no_rotation() -> None:
    def forward(query: Tensor, key: Tensor, value: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        added = position_ids[:, None, :, None]
        return query + added, key + added, value + added

    assert refused(forward).startswith("positions are part of what attention reads")


def test_without_positions() -> None:
    assert refused(lambda query, key, value, position_ids: (query * 1, key, value)) == (
        "query and key do not depend on position_ids"
    )


def test_a_fixed_number_of_tokens() -> None:
    reason = refused(lambda q, k, v, p: (rotate_half(q, p), rotate_half(k, p), v), dynamic=())
    assert reason == "the number of tokens is fixed in this graph"


def test_a_query_made_of_two_tensors() -> None:
    reason = refused(lambda q, k, v, p: (rotate_half(q, p) + k, rotate_half(k, p), v))
    assert reason == "they are made from 2 tensors of the tokens, expected one"


def test_a_query_made_of_nothing_but_positions() -> None:
    reason = refused(lambda q, k, v, p: (p[:, None, :, None].float(), k, v))
    assert reason == "they are made from 0 tensors of the tokens, expected one"


def test_heads_in_one_dimension() -> None:
    def forward(query: Tensor, key: Tensor, value: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        turned = query[:, 0] * position_ids[:, :, None]
        return turned[:, None], key, value

    assert "expected [B, H, S, D] or [B, S, H, D]" in refused(forward)
