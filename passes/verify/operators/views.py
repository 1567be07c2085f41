"""What is made of numbers, and views: which element of its source an element is."""

from __future__ import annotations

import functools
import operator
from typing import Any

import sympy
import torch
import z3
from rewriter.passes.verify.reading import Indices
from rewriter.passes.verify.reading import Reading
from rewriter.passes.verify.reading import Term
from rewriter.passes.verify.reading import Unread
from rewriter.passes.verify.reading import arguments_of
from rewriter.passes.verify.reading import converted
from rewriter.passes.verify.reading import dimension_of
from rewriter.passes.verify.reading import floor_division
from rewriter.passes.verify.reading import is_bool
from rewriter.passes.verify.reading import is_one
from rewriter.passes.verify.reading import maximum
from rewriter.passes.verify.reading import reads
from rewriter.passes.verify.reading import remainder
from rewriter.passes.verify.reading import sizes_of

aten = torch.ops.aten


@reads(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(reading: Reading, node: Any, indices: Indices) -> Term:
    given = arguments_of(node)
    start, step = (reading.number(given.get(name, default)) for name, default in (("start", 0), ("step", 1)))
    if z3.is_real(start) or z3.is_real(step):
        raise Unread("fractions")
    return converted(reading, start + indices[0] * step, node)


@reads(
    aten.full.default, aten.full_like.default, aten.new_full.default, aten.scalar_tensor.default, aten.fill.Scalar
)  # fmt: skip
def _full(reading: Reading, node: Any, indices: Indices) -> Term:
    given = arguments_of(node)
    name = next(n for n in ("fill_value", "s", "value") if n in given)
    return converted(reading, reading.number(given[name]), node)


@reads(
    aten.ones.default,
    aten.ones_like.default,
    aten.new_ones.default,
    aten.zeros.default,
    aten.zeros_like.default,
    aten.new_zeros.default,
)
def _filled(reading: Reading, node: Any, indices: Indices) -> Term:
    return converted(reading, z3.IntVal(int("ones" in node.target.__name__)), node)


@reads(
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
)
def _same(reading: Reading, node: Any, indices: Indices) -> Term:
    return converted(reading, reading.element(node.args[0], indices), node)


@reads(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def _expand(reading: Reading, node: Any, indices: Indices) -> Term:
    return reading.operand(node.args[0], node, indices)


@reads(aten.atleast_1d.default)
def _atleast_1d(reading: Reading, node: Any, indices: Indices) -> Term:
    source: Any = node.args[0]
    return reading.element(source, indices[len(indices) - len(sizes_of(source)) :])


@reads(aten.unsqueeze.default)
def _unsqueeze(reading: Reading, node: Any, indices: Indices) -> Term:
    source, dim = node.args
    dim = dimension_of(node, dim)
    return reading.element(source, (*indices[:dim], *indices[dim + 1 :]))


@reads(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.flatten.using_ints,
    aten.unflatten.int,
)
def _reshape(reading: Reading, node: Any, indices: Indices) -> Term:
    """In row-major order both shapes count the same elements; dimensions whose products agree are taken together."""
    source: Any = node.args[0]
    inside = [(d, s) for d, s in enumerate(sizes_of(source)) if not is_one(s)]
    outside = [(d, s) for d, s in enumerate(sizes_of(node)) if not is_one(s)]
    places: list[Term] = [z3.IntVal(0)] * len(sizes_of(source))
    while inside and outside:
        of_source, of_result = [inside.pop(0)], [outside.pop(0)]
        while (left := _product(of_source)) != (right := _product(of_result)):
            # The side that is the smaller one takes its next dimension; of symbols, the one of which the other is a multiple.
            if (inside and (right / left).is_number and right / left > 1) or (inside and not outside):
                of_source.append(inside.pop(0))
            elif outside and (((left / right).is_number and left / right > 1) or not inside):
                of_result.append(outside.pop(0))
            elif inside and not (right / left).as_numer_denom()[1].free_symbols:
                of_source.append(inside.pop(0))
            elif outside and not (left / right).as_numer_denom()[1].free_symbols:
                of_result.append(outside.pop(0))
            else:
                raise Unread("shapes that do not divide each other")
        flat: Any = z3.IntVal(0)
        for d, size in of_result:
            flat = flat * reading.size(size) + indices[d]
        if len(of_source) == 1:
            places[of_source[0][0]] = flat
            continue
        for place, (d, size) in reversed(list(enumerate(of_source))):
            places[d] = remainder(flat, reading.size(size)) if place else flat
            flat = floor_division(flat, reading.size(size))
    return reading.element(source, places)


def _product(dimensions: list[tuple[int, Any]]) -> sympy.Expr:
    sizes = (s.node.expr if isinstance(s, torch.SymInt) else sympy.Integer(s) for _, s in dimensions)
    return functools.reduce(operator.mul, sizes, sympy.Integer(1))


@reads(aten.transpose.int, aten.permute.default, aten.t.default)
def _permute(reading: Reading, node: Any, indices: Indices) -> Term:
    source: Any = node.args[0]
    order = list(range(len(indices)))
    if node.target is aten.permute.default:
        order = [dimension_of(node, d) for d in node.args[1]]
    elif len(order) > 1:
        first, second = (0, 1) if node.target is aten.t.default else (dimension_of(node, d) for d in node.args[1:3])
        order[first], order[second] = order[second], order[first]
    places = dict(zip(order, indices, strict=True))  # dimension `order[d]` of the source is d
    return reading.element(source, [places[d] for d in range(len(order))])


@reads(aten.slice.Tensor)
def _slice(reading: Reading, node: Any, indices: Indices) -> Term:
    given = arguments_of(node)
    dim = dimension_of(node, given["dim"])
    size = reading.size(sizes_of(given["self"])[dim])
    start = given["start"] or 0
    begin: Any = reading.number(start)
    if isinstance(start, int):
        begin = begin if start >= 0 else maximum(begin + size, z3.IntVal(0))
    else:  # an element of the slice is within the tensor, so that a start beyond its end needs no care
        begin = z3.If(begin < 0, maximum(begin + size, z3.IntVal(0)), begin)
    places = [*indices]
    places[dim] = begin + indices[dim] * reading.number(given["step"])
    return reading.element(given["self"], places)


@reads(aten.select.int)
def _select(reading: Reading, node: Any, indices: Indices) -> Term:
    source, dim, index = node.args
    dim = dim % len(sizes_of(source))
    place: Any = reading.number(index)
    if not isinstance(index, int) or index < 0:
        place = z3.If(place < 0, place + reading.size(sizes_of(source)[dim]), place)
    return reading.element(source, (*indices[:dim], place, *indices[dim:]))


@reads(aten.flip.default)
def _flip(reading: Reading, node: Any, indices: Indices) -> Term:
    source, dims = node.args
    turned = {dimension_of(node, d) for d in dims}
    sizes = sizes_of(source)
    return reading.element(
        source, [reading.size(sizes[d]) - 1 - i if d in turned else i for d, i in enumerate(indices)]
    )


@reads(aten.roll.default)
def _roll(reading: Reading, node: Any, indices: Indices) -> Term:
    given = arguments_of(node)
    source, places = given["self"], [*indices]
    if not given["dims"]:
        raise Unread("a roll over all elements")
    for shift, dim in zip(given["shifts"], given["dims"], strict=True):
        d = dimension_of(node, dim)
        places[d] = remainder(places[d] - reading.number(shift), reading.size(sizes_of(source)[d]))
    return reading.element(source, places)


@reads(aten.index.Tensor)
def _index(reading: Reading, node: Any, indices: Indices) -> Term:
    """Integer tensors, next to each other, in the places of dimensions."""
    source, given = node.args
    sizes = sizes_of(source)
    named = [d for d, g in enumerate(given) if g is not None]
    tensors = [given[d] for d in named]
    if not named or named != list(range(named[0], named[-1] + 1)) or any(is_bool(t) for t in tensors):
        raise Unread("indexing by truth values, or by tensors apart from each other")
    common = len(indices) - (len(sizes) - len(named))
    own = indices[named[0] : named[0] + common]
    places: list[Term] = [*indices[: named[0]]]
    for d, tensor in zip(named, tensors, strict=True):
        at: Any = reading.element(tensor, own[common - len(sizes_of(tensor)) :])
        places.append(z3.If(at < 0, at + reading.size(sizes[d]), at))
    return reading.element(source, [*places, *indices[named[0] + common :]])


@reads(aten.gather.default)
def _gather(reading: Reading, node: Any, indices: Indices) -> Term:
    source, dim, index = node.args[:3]
    places = [*indices]
    places[dimension_of(node, dim)] = reading.element(index, indices)
    return reading.element(source, places)


@reads(aten.cat.default)
def _cat(reading: Reading, node: Any, indices: Indices) -> Term:
    given = arguments_of(node)
    dim, parts = dimension_of(node, given["dim"]), list(given["tensors"])
    begins: list[Any] = [z3.IntVal(0)]
    for part in parts:
        begins.append(begins[-1] + reading.size(sizes_of(part)[dim]))
    result: Any = None
    for begin, end, part in reversed(list(zip(begins, begins[1:], parts, strict=False))):
        places = [*indices]
        places[dim] = indices[dim] - begin
        own = converted(reading, reading.element(part, places), node)
        result = own if result is None else z3.If(indices[dim] < end, own, result)
    return result


@reads(aten.constant_pad_nd.default, aten.pad.default)
def _pad(reading: Reading, node: Any, indices: Indices) -> Term:
    given = arguments_of(node)
    if given.get("mode", "constant") != "constant":
        raise Unread("padding that is not constant")
    source = given["self"]
    inside, places = [], [*indices]
    for n, before in enumerate(given["pad"][::2]):
        dim = len(indices) - 1 - n
        places[dim] = indices[dim] - reading.number(before)
        inside += [places[dim] >= 0, places[dim] < reading.size(sizes_of(source)[dim])]
    fill = converted(reading, reading.number(given["value"] or 0), node)
    return z3.If(z3.And(*inside), reading.element(source, places), fill)
