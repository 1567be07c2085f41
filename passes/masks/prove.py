"""Mask analysis: from what a mask's element is, at `(b, h, i, j)`, to the live range of key j. A proof, or the reason why not.

The domain of the abstract interpretation is one interval of query rows for each key. It is closed under `and`; `or` is
allowed with predicates of the key alone (a prefix). Comparisons linear in the row i and free of it elsewhere bound the
interval; equality of a non-decreasing function at i and at j makes it a document; a constant buffer is read and must
hold one interval per column. Additive masks are first split into cases of known value, 0 or a masking one. A row's top-k of
a score that depends on the key alone, among the keys of a causal prefix, is a running top-k: one interval, too.

Ranges are in row space: row r of the mask is r, whatever index the query has."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import replace

import torch
from rewriter.kernels import FOREVER
from rewriter.passes.attention.site import AttentionSite
from rewriter.passes.attention.site import MaskTerm
from rewriter.passes.graph.nodes import is_bool
from rewriter.passes.graph.nodes import shape
from rewriter.passes.graph.origin import describe
from rewriter.passes.masks.evaluate import materialize
from rewriter.passes.masks.expression import FALSE
from rewriter.passes.masks.expression import TRUE
from rewriter.passes.masks.expression import ZERO
from rewriter.passes.masks.expression import Apply
from rewriter.passes.masks.expression import Axis
from rewriter.passes.masks.expression import Const
from rewriter.passes.masks.expression import Element
from rewriter.passes.masks.expression import Expression
from rewriter.passes.masks.expression import Precision
from rewriter.passes.masks.expression import apply
from rewriter.passes.masks.expression import axes_of
from rewriter.passes.masks.expression import broadcast
from rewriter.passes.masks.expression import elements_of
from rewriter.passes.masks.expression import floating_type
from rewriter.passes.masks.expression import is_masking
from rewriter.passes.masks.expression import linear_terms
from rewriter.passes.masks.expression import negate
from rewriter.passes.masks.expression import reads_size
from rewriter.passes.masks.expression import substitute
from rewriter.passes.masks.forms.documents import is_non_decreasing
from rewriter.passes.masks.forms.documents import run_positions
from rewriter.passes.masks.forms.running_topk import topk_membership
from rewriter.passes.masks.interpret import IndexFunctions
from rewriter.passes.masks.intervals import EVERYTHING
from rewriter.passes.masks.intervals import GROUP
from rewriter.passes.masks.intervals import HEAD
from rewriter.passes.masks.intervals import KEY
from rewriter.passes.masks.intervals import LARGEST
from rewriter.passes.masks.intervals import NEVER_ENDS
from rewriter.passes.masks.intervals import ROW
from rewriter.passes.masks.intervals import Interval
from rewriter.passes.masks.intervals import MaskProof
from rewriter.passes.masks.intervals import Unproven
from rewriter.passes.masks.intervals import flatten
from torch import Tensor
from torch.fx import Node

MAX_CASES = 16
"""Additive masks with more combinations of values than this are not split."""


def prove_mask(site: AttentionSite, functions: IndexFunctions, constants: Mapping[Node, Tensor]) -> MaskProof:
    """The proof of one site's mask.

    Args:
        constants: buffers of the model among the graph's inputs, with their present values.

    Raises:
        Unproven: with the reason.
    """
    query, key = (shape(node) for node in (site.query, site.key))  # type: ignore[arg-type]
    group = query[1] // key[1] if len(query) == 4 and isinstance(query[1], int) else 1
    analysis = _Analysis(functions, constants, group, len(query))
    predicates: list[Expression] = []
    biases: list[Expression] = []
    if site.is_causal:
        predicates.append(apply("le", Axis(KEY), Axis(ROW)))
    for term in site.masks:
        visible, key_biases = analysis.term(term)
        predicates.append(visible)
        biases.extend(key_biases)
    if biases and analysis.weakest > -math.inf:
        raise Unproven(
            f"a bias is added beside a mask of {analysis.weakest:g}, which need not hide a key then{analysis.origin(biases[0])}"
        )
    interval = analysis.conjunction(predicates)
    total: Expression | None = None
    for bias in biases:  # summed in fp32 at least
        wide = Precision(torch.promote_types(floating_type(bias) or torch.float32, torch.float32))
        total = bias if total is None else apply("add", total, apply("cast", bias, wide))
    return MaskProof(interval, total, tuple(analysis.read))


class _Analysis:
    def __init__(self, functions: IndexFunctions, constants: Mapping[Node, Tensor], group: int, rank: int) -> None:
        self.functions = functions
        self.constants = constants
        self.group = group
        self.rank = rank  # of the query: 4, or 3 where heads are folded into the batch
        self.read: dict[Node, None] = {}
        self.early: set[Expression] = set()  # starts that are at most their own key
        self.weakest = -math.inf  # masking value that is added, over the lowest number of its dtype

    def term(self, term: MaskTerm) -> tuple[Expression, list[Expression]]:
        """(when the key is visible, key biases) of one mask term."""
        if len(shape(term.node)) > self.rank:
            raise Unproven(
                f"mask {term.node.name} has {len(shape(term.node))} dimensions, expected at most {self.rank}"
            )
        element = broadcast(self.functions.element(term.node), shape(term.node), self.rank)
        if self.rank == 3:
            element = substitute(element, {1: Axis(ROW), 2: Axis(KEY)})
        if self.group > 1:
            element = substitute(element, {HEAD: apply("join", Axis(HEAD), Axis(GROUP), Const(self.group))})
        if GROUP in axes_of(element):
            raise Unproven(
                f"mask {term.node.name} differs between heads, as a relative position bias does{self.origin(element)}"
            )
        changed = next((e for e in elements_of(element) if e.node in self.functions.modified), None)
        if changed is not None:
            raise Unproven(f"a mask reads what is modified in place{self.origin(changed)}")
        if term.kind in ("keep", "drop"):
            self._hides(term.fill, -math.inf)
            if not is_bool(term.node):
                raise Unproven(f"mask {term.node.name} is {term.node.meta['val'].dtype}, expected bool")
            return (element if term.kind == "keep" else negate(element)), []
        dtype = term.node.meta["val"].dtype
        if not dtype.is_floating_point:
            raise Unproven(f"mask {term.node.name} is {dtype}, expected bool or a floating-point type")
        return self._additive(element, torch.finfo(dtype).min)

    def _additive(self, element: Expression, lowest: float) -> tuple[Expression, list[Expression]]:
        """(when the key is visible, key biases) of a mask that is added to the logits.

        Args:
            lowest: of the mask's dtype; it hides a key beside any bias.
        """
        if isinstance(element, Apply) and element.name == "where":
            condition, left, right = element.args
            for hidden, shown, when in ((left, right, negate(condition)), (right, left, condition)):
                if isinstance(hidden, Const) and is_masking(hidden.value):
                    visible, biases = self._additive(shown, lowest)
                    self._hides(hidden.value, lowest)
                    return apply("and", when, visible), biases
        known = self._masking(element, lowest)
        if known is not None:
            return known, []
        if isinstance(element, Apply) and element.name == "add":
            parts = [self._additive(argument, lowest) for argument in element.args]
            biases = parts[0][1] + parts[1][1]
            return apply("and", parts[0][0], parts[1][0]), biases[:1] if len(biases) < 2 else [apply("add", *biases)]
        if ROW in axes_of(element):
            values = _cases(element)
            if values is not None:
                listed = ", ".join(sorted({str(v) for _, v in values}))
                raise Unproven(
                    f"an additive mask takes the values {listed}; only 0 and values of at most -1e4 are masks"
                )
            known_kind = ", as a relative position bias is" if HEAD in axes_of(element) else ""
            raise Unproven(f"an additive mask is computed from data{known_kind}{self.origin(element)}")
        return TRUE, [element]

    def _topk(self, predicate: Expression) -> Interval | None:
        """`is among the keep largest of its row`, as an interval; None where the predicate is something else."""
        if not isinstance(predicate, Apply) or predicate.name != "not":
            return None
        equal = predicate.args[0]
        if not isinstance(equal, Apply) or equal.name != "eq" or not isinstance(member := equal.args[0], Element):
            return None
        topk = topk_membership(member.node)
        if topk is None or equal.args[1] != ZERO:
            return None
        # Every index must be the row's or key's own: a shifted or permuted membership is another one.
        sizes = shape(member.node)
        own = [ZERO if type(size) is int and size == 1 else Axis(d) for d, size in enumerate(sizes)]
        if len(sizes) != 4 or list(member.indices) != own:
            raise Unproven(f"a top-k is not read at its own row and key{self.origin(predicate)}")
        lowest = torch.finfo(topk.source.meta["val"].dtype).min
        visible, scores = self._additive(self.functions.element(topk.source), lowest)
        among = self.conjunction([visible])
        if not among.causal or among.sliding:
            raise Unproven(f"a top-k is not over the keys of a causal prefix ({', '.join(among.traits) or 'no mask'})")
        if len(scores) != 1:
            raise Unproven(f"a top-k of {len(scores)} added scores is not understood")
        end = Apply("running_topk_end", (scores[0], Const(topk.keep), among.segment))
        return Interval(ZERO, end, sliding=True, traits=(f"dynamic mask {topk.keep}",))

    def _hides(self, value: float, lowest: float) -> None:
        """Notes a masking value that need not hide a key beside a bias."""
        if value > lowest:
            self.weakest = max(self.weakest, value)

    def _masking(self, element: Expression, lowest: float) -> Expression | None:
        """When a value that is always 0 or a masking one is 0."""
        if isinstance(element, Apply) and element.name == "add":
            parts = [self._masking(argument, lowest) for argument in element.args]
            if all(part is not None for part in parts):
                return apply("and", *parts)  # type: ignore[arg-type]
        values = _cases(element)
        if values is None or not all(value == 0 or is_masking(value) for _, value in values):
            return None
        visible: Expression = TRUE
        for condition, value in values:
            if value != 0:
                self._hides(value, lowest)
                visible = apply("and", visible, negate(condition))
        return visible

    def conjunction(self, predicates: list[Expression]) -> Interval:
        parts = [part for predicate in predicates for part in flatten("and", _normal(predicate))]
        positions = [p for part in parts if (p := self._document_positions(part)) is not None]
        result = EVERYTHING
        for part in parts:
            own = self._interval(part, positions)
            result = Interval(
                self._later(result.start, own.start),
                _minimum(result.end, own.end),
                result.causal or own.causal,
                result.sliding or own.sliding,
                _minimum(result.segment, own.segment),
                result.traits + own.traits,
            )
        return result

    def _later(self, left: Expression, right: Expression) -> Expression:
        """The maximum of two starts; of a key and what is known not to be later, the key."""
        if Axis(KEY) in (left, right) and self.early & {left, right}:
            return Axis(KEY)
        return _maximum(left, right)

    def _interval(self, predicate: Expression, positions: list[Expression]) -> Interval:
        if predicate == TRUE:
            return EVERYTHING
        if (running := self._topk(predicate)) is not None:
            return running
        if HEAD in axes_of(predicate):
            raise Unproven(f"a mask differs between heads{self.origin(predicate)}")
        if predicate == FALSE:
            return Interval(ZERO, ZERO, segment=ZERO, traits=("nothing",))
        if ROW not in axes_of(predicate):
            end = apply("where", predicate, NEVER_ENDS, ZERO)
            return Interval(ZERO, end, segment=end, traits=("padding",))
        if all(e.node in self.constants for e in elements_of(predicate)) and elements_of(predicate):
            return self._table(predicate)
        if isinstance(predicate, Apply):
            if predicate.name == "and":
                return self.conjunction([predicate])
            if predicate.name == "or":
                return self._union(predicate, positions)
            if predicate.name in ("lt", "le"):
                return self._comparison(predicate, positions)
            if predicate.name == "eq":
                return self._equality(predicate, positions)
        raise Unproven(f"a mask depends on the query through data{self.origin(predicate)}")

    def _union(self, predicate: Apply, positions: list[Expression]) -> Interval:
        parts = flatten("or", predicate)
        always: Expression = FALSE
        ranged = []
        for part in parts:
            if ROW in axes_of(part):
                ranged.append(part)
            else:
                always = apply("or", always, part)
        if len(ranged) > 1:
            raise Unproven("a mask is a union of two ranges of queries, which need not be one range")
        inner = self._interval(ranged[0], positions)
        return Interval(
            apply("where", always, ZERO, inner.start),
            apply("where", always, NEVER_ENDS, inner.end),
            sliding=True,
            traits=(*inner.traits, "prefix"),
        )

    def _comparison(self, predicate: Apply, positions: list[Expression]) -> Interval:
        left, right = predicate.args
        if isinstance(left, Apply) and left.name == "abs" and not (axes_of(right) & {ROW, KEY}):
            inside = left.args[0]
            return self.conjunction(
                [
                    apply(predicate.name, inside, right),
                    apply(predicate.name, apply("mul", right, Const(-1)), inside),
                ]
            )
        for side, other in ((left, right), (right, left)):
            chunk = _chunk(side)
            if chunk is not None and ROW not in axes_of(other):
                # x // c <= y  is  x < (y + 1) c;  y <= x // c  is  y c <= x
                more = (predicate.name == "le") == (side is left)
                bound = apply("mul", apply("add", other, Const(1)) if more else other, Const(chunk[0]))
                row = apply("add", Axis(ROW), chunk[1])
                whole = Apply("lt", (row, bound)) if side is left else Apply("le", (bound, row))
                interval = self._comparison(whole, positions)
                return replace(interval, causal=False, traits=(f"blocks of {chunk[0]}",))
        terms = self._difference(left, right, positions)
        factor = terms.pop(Axis(ROW), 0)
        bound = _sum(terms)
        if abs(factor) != 1 or ROW in axes_of(bound):
            raise Unproven(f"a mask compares the query with data{self.origin(predicate)}")
        strict = predicate.name == "lt"
        if factor == 1:  # i + bound < 0  or  i + bound <= 0
            end = apply("add", apply("mul", bound, Const(-1)), Const(0 if strict else 1))
            traits = (_bound_trait("window", end),)
            if KEY in axes_of(end):
                return Interval(ZERO, end, sliding=True, traits=traits)
            return Interval(ZERO, end, segment=end, traits=traits)
        start = apply("add", bound, Const(1 if strict else 0))
        offset = linear_terms(start)
        causal = offset is not None and offset.pop(Axis(KEY), 0) == 1 and _is_not_negative(offset)
        return Interval(start, NEVER_ENDS, causal, start != Axis(KEY), traits=(_bound_trait("causal", start),))

    def _difference(self, left: Expression, right: Expression, positions: list[Expression]) -> dict[Expression, int]:
        """`left - right` as terms times factors; positions within a document count as the indices themselves."""
        terms: dict[Expression, int] = {}
        for expression, sign in ((left, 1), (right, -1)):
            part = linear_terms(expression)
            if part is None:
                raise Unproven(f"a mask compares values that are not integers{self.origin(expression)}")
            for term, factor in part.items():
                terms[term] = terms.get(term, 0) + sign * factor
        for position in positions:
            row, key = (substitute(position, {1: Axis(axis)}) for axis in (ROW, KEY))
            if terms.get(row, 0) == -terms.get(key, 0) != 0:
                factor = terms.pop(row)
                del terms[key]
                terms[Axis(ROW)] = terms.get(Axis(ROW), 0) + factor
                terms[Axis(KEY)] = terms.get(Axis(KEY), 0) - factor
        return {term: factor for term, factor in terms.items() if factor}

    def _equality(self, predicate: Apply, positions: list[Expression]) -> Interval:
        left, right = (_within_documents(argument, positions) for argument in predicate.args)
        if ROW not in axes_of(left):
            left, right = right, left
        same = substitute(left, {ROW: Axis(KEY)}) == right
        chunk = _chunk(left)
        if chunk is not None and ROW not in axes_of(right):
            size, shift = chunk
            start = apply("add", apply("mul", right, Const(size)), apply("mul", shift, Const(-1)))
            end = apply("add", start, Const(size))
            if same:
                self.early.add(start)
            trait = f"chunks of {size}" + (" from an offset" if axes_of(shift) else "")
            return Interval(start, end, sliding=not same, segment=end, traits=(trait,))
        if KEY in axes_of(left) or not same:
            return self.conjunction([apply("le", left, right), apply("le", right, left)])
        if isinstance(left, Element):
            indices = left.indices
            if (
                is_non_decreasing(left.node)
                and indices[-1] == Axis(ROW)
                and ROW not in {a for i in indices[:-1] for a in axes_of(i)}
            ):
                document = substitute(left, {ROW: Axis(KEY)})
                start, after = (Apply(f"document_{side}", (document,)) for side in ("start", "end"))
                self.early.add(start)
                return Interval(start, after, segment=after, traits=("documents",))
            raise Unproven(f"document ids are not known to be non-decreasing{self.origin(left)}")
        raise Unproven(f"a mask compares a function of the query with the same of the key{self.origin(predicate)}")

    def _document_positions(self, predicate: Expression) -> Expression | None:
        """For `ids[b, i] == ids[b, j]` with ids made from positions: the positions' element, over axes 0 and 1."""
        if isinstance(predicate, Apply) and predicate.name == "eq" and isinstance(ids := predicate.args[0], Element):
            source = run_positions(ids.node)
            if source is not None and predicate.args[1] == substitute(ids, {ROW: Axis(KEY), KEY: Axis(ROW)}):
                return self.functions.element(source)
        return None

    def _table(self, predicate: Expression) -> Interval:
        """A predicate over constant buffers: evaluated, and read as one interval per column."""
        nodes = {e.node for e in elements_of(predicate)}
        if any(self.constants[node].is_meta for node in nodes):
            raise Unproven(f"a buffer on the meta device has no values{self.origin(predicate)}")
        for element in elements_of(predicate):
            if any(i not in (ZERO, Axis(ROW), Axis(KEY)) for i in element.indices):
                raise Unproven(f"a buffer is read at other places than [row, key]{self.origin(predicate)}")
        if reads_size(predicate):
            raise Unproven(f"a constant mask is another one at another length{self.origin(predicate)}")
        size = min(
            self.constants[element.node].shape[d]
            for element in elements_of(predicate)
            for d, index in enumerate(element.indices)
            if index != ZERO
        )
        index = torch.arange(size)
        env = {node: self.constants[node].detach().cpu() for node in nodes}
        visible = materialize(predicate, env, {ROW: index[:, None], KEY: index[None, :]}).expand(size, size)
        start, end = _column_intervals(visible)
        self.read.update(dict.fromkeys(nodes))
        offset = int(start[0])
        window = int(end[0])
        if not bool((start == index + offset).all()) and not bool((start == 0).all()):
            raise Unproven("a constant mask is neither causal nor a window")
        bounds = []
        if bool((start == index + offset).all()):
            bounds.append(apply("le", _key_plus(offset), Axis(ROW)))
        if not bool((end == FOREVER).all()):
            if not bool((end == torch.where(index + window < size, index + window, FOREVER)).all()):
                raise Unproven("a constant mask is neither causal nor a window")
            bounds.append(apply("lt", Axis(ROW), _key_plus(window)))
        return self.conjunction(bounds)

    def origin(self, expression: Expression) -> str:
        """Where the data of an expression comes from, for a reason."""
        names = dict.fromkeys(describe(e.node) for e in elements_of(expression))
        return f" ({', '.join(names)})" if names else ""


def _cases(element: Expression) -> list[tuple[Expression, float]] | None:
    """A number as (condition, value) pairs of which exactly one holds; None where a value is data."""
    if isinstance(element, Const):
        return [(TRUE, float(element.value))]
    if not isinstance(element, Apply):
        return None
    cases: list[tuple[Expression, float]] = []
    if element.name == "number":
        return [(element.args[0], 1.0), (negate(element.args[0]), 0.0)]
    if element.name == "where":
        condition, left, right = element.args
        for branch, guard in ((left, condition), (right, negate(condition))):
            inner = _cases(branch)
            if inner is None:
                return None
            cases.extend((apply("and", guard, own), value) for own, value in inner)
    elif element.name in ("add", "mul"):
        left_cases, right_cases = (_cases(argument) for argument in element.args)
        if left_cases is None or right_cases is None:
            return None
        cases = [
            (apply("and", p, q), x + y if element.name == "add" else x * y)
            for p, x in left_cases
            for q, y in right_cases
        ]
    else:
        return None
    cases = [(condition, value) for condition, value in cases if condition != FALSE]
    return cases if len(cases) <= MAX_CASES else None


def _within_documents(expression: Expression, positions: list[Expression]) -> Expression:
    """`position(i) // c` as `(i + position(j) - j) // c`: within a document, positions count as the indices do."""
    if not isinstance(expression, Apply) or expression.name != "floordiv":
        return expression
    for position in positions:
        row, key = (substitute(position, {1: Axis(axis)}) for axis in (ROW, KEY))
        if expression.args[0] == row:
            shift = apply("add", key, apply("mul", Axis(KEY), Const(-1)))
            return Apply("floordiv", (apply("add", Axis(ROW), shift), expression.args[1]))
    return expression


def _chunk(expression: Expression) -> tuple[int, Expression] | None:
    """`(c, x)` of `(i + x) // c`, where x does not depend on i."""
    if not isinstance(expression, Apply) or expression.name != "floordiv":
        return None
    dividend, size = expression.args
    terms = linear_terms(dividend)
    if terms is None or terms.pop(Axis(ROW), 0) != 1 or not isinstance(size, Const) or not isinstance(size.value, int):
        return None
    shift = _sum(terms)
    return (size.value, shift) if size.value > 0 and ROW not in axes_of(shift) else None


def _key_plus(offset: int) -> Expression:
    return apply("add", Axis(KEY), Const(offset))


def _normal(expression: Expression) -> Expression:
    """Negations moved inwards, onto comparisons and data; comparisons of numbers with known values split into cases."""
    if not isinstance(expression, Apply):
        return expression
    if expression.name in ("and", "or"):
        return apply(expression.name, *(_normal(a) for a in expression.args))
    if expression.name in _COMPARE:
        return _split_comparison(expression)
    if expression.name != "not" or not isinstance(inner := expression.args[0], Apply):
        return expression
    if inner.name in ("and", "or"):
        return apply("or" if inner.name == "and" else "and", *(_normal(negate(a)) for a in inner.args))
    if inner.name in ("lt", "le"):
        return _split_comparison(Apply("le" if inner.name == "lt" else "lt", tuple(reversed(inner.args))))
    if inner.name == "eq" and (split := _split_comparison(inner)) is not inner:
        return _normal(negate(split))
    return expression


_COMPARE = {"lt": operator.lt, "le": operator.le, "eq": operator.eq}


def _split_comparison(comparison: Apply) -> Expression:
    """`(condition ? x : y) < z` -> an `or` of the conditions under which it holds, where all values are known."""
    left, right = (_cases(argument) for argument in comparison.args)
    if left is None or right is None or ROW not in axes_of(comparison):
        return comparison
    result: Expression = FALSE
    for p, x in left:
        for q, y in right:
            if _COMPARE[comparison.name](x, y):
                result = apply("or", result, apply("and", p, q))
    return _normal(result)


def _sum(terms: Mapping[Expression, int]) -> Expression:
    total: Expression = ZERO
    for term, factor in terms.items():
        if term == Const(1):
            factor = max(-LARGEST, min(LARGEST, factor))
        total = apply("add", total, apply("mul", term, Const(factor)))
    return total


def _is_not_negative(terms: Mapping[Expression, int]) -> bool:
    """Whether what is left of a start, after its key, is a constant of at least 0."""
    return all(term == Const(1) and factor >= 0 for term, factor in terms.items())


def _bound_trait(kind: str, bound: Expression) -> str:
    terms = dict(linear_terms(bound) or {})
    if terms.pop(Axis(KEY), 0) != 1:
        return "padding"
    offset = terms.pop(Const(1), 0)
    if terms:
        return f"{kind} with an offset"
    if kind == "causal":
        return "causal" if offset == 0 else f"at most {-offset} ahead" if offset < 0 else f"at least {offset} behind"
    return f"window {offset}"


def _maximum(left: Expression, right: Expression) -> Expression:
    if left in (ZERO, right):
        return right
    return left if right == ZERO else Apply("max", (left, right))


def _minimum(left: Expression, right: Expression) -> Expression:
    if left in (NEVER_ENDS, right):
        return right
    return left if right == NEVER_ENDS else Apply("min", (left, right))


def _column_intervals(visible: Tensor) -> tuple[Tensor, Tensor]:
    """Start and end `[N]` of the one run of rows that see each column of a bool `[N, N]`; the last row means forever."""
    size = visible.size(0)
    count = visible.sum(dim=0)
    first = visible.int().argmax(dim=0)
    last = size - visible.flip(0).int().argmax(dim=0)
    if bool(((last - first != count) & (count > 0)).any()):
        raise Unproven("a constant mask shows a key, hides it and shows it again")
    end = torch.where(count == 0, 0, torch.where(last == size, FOREVER, last))
    return torch.where(count == 0, 0, first), end
