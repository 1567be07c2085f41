"""Mask analysis: from what a mask's element is, at `(b, h, i, j)`, to the live range of key j. A proof, or the reason why not.

The domain of the abstract interpretation is one interval of query rows for each key. It is closed under `and`; `or` is
allowed with predicates of the key alone (a prefix). Comparisons linear in the row i and free of it elsewhere bound the
interval; equality of a non-decreasing function at i and at j makes it a document; a constant buffer is read and must
hold one interval per column. Additive masks are first split into cases of known value, 0 or a masking one. A row's top-k of
a score that depends on the key alone, among the keys of a causal prefix, is a running top-k: one interval, too.

Ranges are in row space: row r of the mask is r, whatever index the query has."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from collections.abc import Mapping

import torch
from rewriter.kernels.given_mask import HIDDEN
from rewriter.passes.attention.site import AttentionSite
from rewriter.passes.attention.site import MaskTerm
from rewriter.passes.graph.inputs import source_of
from rewriter.passes.graph.nodes import above
from rewriter.passes.graph.nodes import is_bool
from rewriter.passes.graph.nodes import shape
from rewriter.passes.graph.origin import describe
from rewriter.passes.masks.expression import FALSE
from rewriter.passes.masks.expression import TRUE
from rewriter.passes.masks.expression import ZERO
from rewriter.passes.masks.expression import Apply
from rewriter.passes.masks.expression import Axis
from rewriter.passes.masks.expression import Const
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
from rewriter.passes.masks.expression import substitute
from rewriter.passes.masks.expression import sum_of
from rewriter.passes.masks.forms import FORMS
from rewriter.passes.masks.forms.documents import document_positions
from rewriter.passes.masks.forms.documents import sides
from rewriter.passes.masks.forms.marked_runs import together
from rewriter.passes.masks.interpret import IndexFunctions
from rewriter.passes.masks.intervals import EVERYTHING
from rewriter.passes.masks.intervals import GROUP
from rewriter.passes.masks.intervals import HEAD
from rewriter.passes.masks.intervals import KEY
from rewriter.passes.masks.intervals import NEVER_ENDS
from rewriter.passes.masks.intervals import ROW
from rewriter.passes.masks.intervals import Interval
from rewriter.passes.masks.intervals import MaskProof
from rewriter.passes.masks.intervals import Unproven
from rewriter.passes.masks.intervals import flatten
from torch import Tensor
from torch.fx import Node

MOST_RANGES = 3
"""Of one key: for each its key and value are there once more."""

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
    analysis = Analysis(functions, constants, group, len(query))
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
    parts = [part for predicate in predicates for part in flatten("and", _normal(predicate))]
    given = [part for part in parts if analysis.is_given(part)]
    if given and (biases or analysis.rank == 3):
        raise Unproven(
            f"a mask that a call gives is combined with a bias, or with folded heads{analysis.origin(given[0])}"
        )
    before_the_call = [part for part in parts if part not in given]
    why = "a mask that a call gives does not say before which keys it shows" if given else ""
    try:
        interval, *others = analysis.ranges(before_the_call)
    except Unproven as reason:
        known = [part for part in before_the_call if not analysis.is_of_ids(part)]
        if biases or analysis.rank == 3 or len(known) == len(before_the_call):
            raise
        interval, *others = analysis.ranges(known)
        why = why or str(reason)
    total: Expression | None = None
    for bias in biases:  # summed in fp32 at least
        wide = Precision(torch.promote_types(floating_type(bias) or torch.float32, torch.float32))
        total = bias if total is None else apply("add", total, apply("cast", bias, wide))
    return MaskProof(interval, total, tuple(analysis.read), why, tuple(others))


class Analysis:
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
        return self.additive(element, torch.finfo(dtype).min)

    def additive(self, element: Expression, lowest: float) -> tuple[Expression, list[Expression]]:
        """(when the key is visible, key biases) of a mask that is added to the logits.

        Args:
            lowest: of the mask's dtype; it hides a key beside any bias.
        """
        if isinstance(element, Apply) and element.name == "where":
            condition, left, right = element.args
            for hidden, shown, when in ((left, right, negate(condition)), (right, left, condition)):
                if isinstance(hidden, Const) and is_masking(hidden.value):
                    visible, biases = self.additive(shown, lowest)
                    self._hides(hidden.value, lowest)
                    return apply("and", when, visible), biases
        known = self._masking(element, lowest)
        if known is not None:
            return known, []
        if isinstance(element, Apply) and element.name == "add":
            parts = [self.additive(argument, lowest) for argument in element.args]
            biases = parts[0][1] + parts[1][1]
            return apply("and", parts[0][0], parts[1][0]), biases[:1] if len(biases) < 2 else [apply("add", *biases)]
        if self.is_given(element):
            return apply("lt", Const(HIDDEN), element), []
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

    def is_given(self, expression: Expression) -> bool:
        """Whether an expression reads an argument of the call at query and key."""
        return any(
            e.node.op == "placeholder"
            and source_of(e.node).kind == "argument"
            and {ROW, KEY} <= {axis for index in e.indices for axis in axes_of(index)}
            for e in elements_of(expression)
        )

    def is_of_ids(self, expression: Expression) -> bool:
        """Whether an expression compares query and key by data that is made of the call's ids alone, and of nothing that layers
        compute, nor of parameters."""
        read = elements_of(expression)
        if not read or not {ROW, KEY} <= axes_of(expression) or HEAD in axes_of(expression):
            return False
        inputs = [node for node in above([e.node for e in read]) if node.op == "placeholder"]
        tensors = [node for node in inputs if isinstance(node.meta["val"], Tensor)]
        return bool(tensors) and all(
            source_of(node).kind == "argument" and not node.meta["val"].dtype.is_floating_point for node in tensors
        )

    def conjunction(self, predicates: list[Expression]) -> Interval:
        """The range in which all predicates hold.

        Raises:
            Unproven: there may be several.
        """
        parts, positions = self._parts(predicates)
        return functools.reduce(self._both, (self._interval(part, positions) for part in parts), EVERYTHING)

    def ranges(self, predicates: list[Expression]) -> list[Interval]:
        """The ranges in which all predicates hold, at most `MOST_RANGES`, no two of which hold the same row of a key."""
        parts, positions = self._parts(predicates)
        result = [EVERYTHING]
        for part in parts:
            result = [self._both(one, own) for one in result for own in self._alternatives(part, positions)]
            if len(result) > MOST_RANGES:
                raise Unproven(f"a mask is a union of {len(result)} ranges of queries, more than {MOST_RANGES}")
        return result

    def _parts(self, predicates: list[Expression]) -> tuple[list[Expression], list[Expression]]:
        """The parts of a conjunction, and the positions within documents that they are about."""
        parts = together(self, [part for predicate in predicates for part in flatten("and", _normal(predicate))])
        return parts, [p for part in parts if (p := document_positions(self, part)) is not None]

    def _both(self, one: Interval, other: Interval) -> Interval:
        """The rows of both ranges."""
        return Interval(
            self._later(one.start, other.start),
            _minimum(one.end, other.end),
            one.causal or other.causal,
            one.sliding or other.sliding,
            _minimum(one.segment, other.segment),
            one.traits + other.traits,
            _last(one.document, other.document),
        )

    def _alternatives(self, part: Expression, positions: list[Expression]) -> list[Interval]:
        """The ranges of one predicate; of several, each without the rows of those before it."""
        try:
            return [self._interval(part, positions)]
        except Unproven as reason:
            found = self._any_of(_alternatives_of(part))
            if not found:
                raise reason
            return found

    def _any_of(self, predicates: list[Expression]) -> list[Interval]:
        """The ranges of each predicate without those of the predicates before; none where one of them is not understood, or as
        soon as they are too many: each may cut each in two."""
        found: list[Interval] = []
        for predicate in predicates:
            try:
                own = self.ranges([predicate])
            except Unproven:
                return []
            for before in found:
                own = [rest for one in own for rest in _without(one, before)]
                if len(own) > MOST_RANGES:
                    return []
            found += own
            if len(found) > MOST_RANGES:
                return []
        return found

    def _later(self, left: Expression, right: Expression) -> Expression:
        """The maximum of two starts; of a key and what is known not to be later, the key."""
        if Axis(KEY) in (left, right) and self.early & {left, right}:
            return Axis(KEY)
        return _maximum(left, right)

    def _interval(self, predicate: Expression, positions: list[Expression]) -> Interval:
        """The interval of one predicate; the forms are asked first."""
        if predicate == TRUE:
            return EVERYTHING
        for form in FORMS:
            if (interval := form(self, predicate, positions)) is not None:
                return interval
        if HEAD in axes_of(predicate):
            raise Unproven(f"a mask differs between heads{self.origin(predicate)}")
        if predicate == FALSE:
            return Interval(ZERO, ZERO, segment=ZERO, traits=("nothing",))
        if ROW not in axes_of(predicate):
            end = apply("where", predicate, NEVER_ENDS, ZERO)
            return Interval(ZERO, end, segment=end, traits=("padding",))
        if isinstance(predicate, Apply):
            if predicate.name == "and":
                return self.conjunction([predicate])
            if predicate.name == "or":
                return self._union(predicate, positions)
            if predicate.name in ("lt", "le"):
                return self.comparison(predicate, positions)
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
        inner = self._joined([self._interval(part, positions) for part in ranged])
        return Interval(
            apply("where", always, ZERO, inner.start),
            apply("where", always, NEVER_ENDS, inner.end),
            sliding=True,
            traits=(*inner.traits, "prefix"),
        )

    def _joined(self, intervals: list[Interval]) -> Interval:
        """The union of ranges: one range where all go on for ever, or all begin at the first row."""
        if len(intervals) == 1:
            return intervals[0]
        traits = tuple(trait for interval in intervals for trait in interval.traits)
        starts, ends = ([getattr(i, side) for i in intervals] for side in ("start", "end"))
        if set(ends) == {NEVER_ENDS}:
            start = functools.reduce(lambda x, y: x if x == y else Apply("min", (x, y)), starts)
            return Interval(start, NEVER_ENDS, all(i.causal for i in intervals), True, traits=traits)
        if set(starts) == {ZERO}:
            end = functools.reduce(lambda x, y: x if x == y else Apply("max", (x, y)), ends)
            return Interval(ZERO, end, sliding=True, traits=traits)
        raise Unproven("a mask is a union of two ranges of queries, which need not be one range")

    def comparison(self, predicate: Apply, positions: list[Expression]) -> Interval:
        left, right = predicate.args
        if isinstance(left, Apply) and left.name == "abs" and not (axes_of(right) & {ROW, KEY}):
            inside = left.args[0]
            return self.conjunction(
                [
                    apply(predicate.name, inside, right),
                    apply(predicate.name, apply("mul", right, Const(-1)), inside),
                ]
            )
        terms = self._difference(left, right, positions)
        factor = terms.pop(Axis(ROW), 0)
        bound = sum_of(terms)
        if not factor or ROW in axes_of(bound):
            raise Unproven(f"a mask compares the query with data{self.origin(predicate)}")
        strict = predicate.name == "lt"
        if abs(factor) > 1:
            return self._slope(factor, bound, strict)
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

    def _slope(self, factor: int, bound: Expression, strict: bool) -> Interval:
        """`factor * i + bound < 0`, or `<= 0`: a quotient of the bound, rounded to the row that it is true of."""
        divisor = Const(abs(factor))
        down, down_of_negated = (apply("floordiv", x, divisor) for x in (bound, apply("mul", bound, Const(-1))))
        traits = (f"{abs(factor)} keys a row",)
        if factor > 0:  # i < -bound / divisor, which is rounded up
            end = apply("mul", down, Const(-1)) if strict else apply("add", down_of_negated, Const(1))
            return Interval(ZERO, end, sliding=True, traits=traits)
        # i > bound / divisor
        start = apply("add", down, Const(1)) if strict else apply("mul", down_of_negated, Const(-1))
        return Interval(start, NEVER_ENDS, False, True, traits=traits)

    def _difference(self, left: Expression, right: Expression, positions: list[Expression]) -> dict[Expression, int]:
        """`left - right` as terms times factors; positions within a document count as the indices themselves."""
        terms: dict[Expression, int] = {}
        for expression, sign in ((left, 1), (right, -1)):
            part = linear_terms(expression)
            if part is None:
                raise Unproven(f"a mask compares values that are not integers{self.origin(expression)}")
            if any(e.node in self.functions.wrapping for e in elements_of(expression)):
                raise Unproven(f"a mask compares integers that may wrap{self.origin(expression)}")
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
        left, right = sides(predicate, positions)
        if KEY in axes_of(left) or substitute(left, {ROW: Axis(KEY)}) != right:
            return self.conjunction([apply("le", left, right), apply("le", right, left)])
        raise Unproven(f"a mask compares a function of the query with the same of the key{self.origin(predicate)}")

    def origin(self, expression: Expression) -> str:
        """Where the data of an expression comes from, for a reason."""
        names = dict.fromkeys(describe(e.node) for e in elements_of(expression))
        return f" ({', '.join(names)})" if names else ""


_OF_TWO: dict[str, Callable[[float, float], float]] = {"add": operator.add, "mul": operator.mul, "max": max, "min": min}


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
    elif element.name in _OF_TWO:
        left_cases, right_cases = (_cases(argument) for argument in element.args)
        if left_cases is None or right_cases is None:
            return None
        cases = [(apply("and", p, q), _OF_TWO[element.name](x, y)) for p, x in left_cases for q, y in right_cases]
    else:
        return None
    cases = [(condition, value) for condition, value in cases if condition != FALSE]
    return cases if len(cases) <= MAX_CASES else None


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


def _alternatives_of(predicate: Expression) -> list[Expression]:
    """What a predicate is any of, where it is that."""
    if not isinstance(predicate, Apply):
        return []
    if predicate.name == "or":
        return flatten("or", predicate)
    if predicate.name == "not" and isinstance(equal := predicate.args[0], Apply) and equal.name == "eq":
        left, right = equal.args
        return [apply("lt", left, right), apply("lt", right, left)]
    return []


def _without(interval: Interval, other: Interval) -> list[Interval]:
    """The rows of a range before and after those of another; either may be empty."""
    result = []
    if other.start != ZERO:
        result.append(
            Interval(interval.start, _minimum(interval.end, other.start), sliding=True, traits=interval.traits)
        )
    if other.end != NEVER_ENDS:
        # A range that ends before it begins is none; what follows on it begins where it would.
        after = _maximum(other.start, other.end)
        result.append(Interval(_maximum(interval.start, after), interval.end, sliding=True, traits=interval.traits))
    return result


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


def _last(left: Expression | None, right: Expression | None) -> Expression | None:
    """The later of two first keys of documents."""
    return left or right if left is None or right is None else _maximum(left, right)


def _minimum(left: Expression, right: Expression) -> Expression:
    if left in (NEVER_ENDS, right):
        return right
    return left if right == NEVER_ENDS else Apply("min", (left, right))
