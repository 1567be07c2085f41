"""A proof in words: `key j is visible to queries j <= i < j + 4096`."""

from __future__ import annotations

from collections.abc import Mapping

from rewriter.passes.graph.inputs import source_of
from rewriter.passes.masks.expression import ZERO
from rewriter.passes.masks.expression import Apply
from rewriter.passes.masks.expression import Axis
from rewriter.passes.masks.expression import Const
from rewriter.passes.masks.expression import Element
from rewriter.passes.masks.expression import Expression
from rewriter.passes.masks.expression import Precision
from rewriter.passes.masks.expression import Size
from rewriter.passes.masks.expression import linear_terms
from rewriter.passes.masks.intervals import BATCH
from rewriter.passes.masks.intervals import HEAD
from rewriter.passes.masks.intervals import KEY
from rewriter.passes.masks.intervals import NEVER_ENDS
from rewriter.passes.masks.intervals import Interval
from rewriter.passes.masks.intervals import MaskProof

_AXES = {BATCH: "b", HEAD: "h", KEY: "j"}

_INFIX = {
    "add": "+",
    "mul": "*",
    "floordiv": "//",
    "lt": "<",
    "le": "<=",
    "eq": "==",
    "and": "and",
    "or": "or",
    "quotient": "//",
}

_OF_FORMS = {
    "document_start": "first key of j's document",
    "document_end": "key after j's document",
    "run_start": "first key of j's run",
    "run_end": "key after j's run",
}


def in_words(proof: MaskProof) -> str:
    """Which queries see key j, of batch row b and KV head h where these matter."""
    seen = ", and to ".join(_rows(interval) for interval in proof.intervals)
    if proof.given:
        return f"key j is visible to {seen} that the mask of the call shows; whether they are one range is found at the call"
    return f"key j is visible to {seen}" + ("" if proof.bias is None else f"; {text(proof.bias)} is added to its logit")


def _rows(interval: Interval) -> str:
    begins = "" if interval.start == ZERO else f"{text(interval.start)} <= "
    ends = "" if interval.end == NEVER_ENDS else f" < {text(interval.end)}"
    return f"queries {begins}i{ends}" if begins or ends else "all queries"


def text(expression: Expression) -> str:
    """An expression as Python would have it; `for ever` for no end."""
    if expression == NEVER_ENDS:
        return "for ever"
    if isinstance(expression, Const):
        return str(expression.value)
    if isinstance(expression, Axis):
        return _AXES.get(expression.dim, f"axis {expression.dim}")
    if isinstance(expression, Size):
        return expression.text
    if isinstance(expression, Element):
        name = source_of(expression.node).name or expression.node.name
        return f"{name}[{', '.join(map(text, expression.indices))}]" if expression.indices else name
    if isinstance(expression, Precision):
        return str(expression.dtype).removeprefix("torch.")
    assert isinstance(expression, Apply)
    parts = [text(a) for a in expression.args]
    if expression.name in ("add", "mul") and (terms := linear_terms(expression)) not in (None, {expression: 1}):
        return _sum(terms)
    if expression.name in _OF_FORMS:
        return _OF_FORMS[expression.name]
    if expression.name in _INFIX:
        return f"({parts[0]} {_INFIX[expression.name]} {parts[1]})"
    if expression.name == "where":
        return f"({parts[1]} if {parts[0]} else {parts[2]})"
    if expression.name == "not":
        return f"not {parts[0]}"
    return parts[0] if expression.name == "number" else f"{expression.name}({', '.join(parts)})"


def _sum(terms: Mapping[Expression, int]) -> str:
    """`j + 4096`, `2 * j - x`: the number last."""
    result = ""
    for term, factor in sorted(terms.items(), key=lambda item: item[0] == Const(1)):
        if not factor:
            continue
        size = (
            str(abs(factor))
            if term == Const(1)
            else text(term)
            if abs(factor) == 1
            else f"{abs(factor)} * {text(term)}"
        )
        sign = "-" if factor < 0 else "+"
        result += f" {sign} {size}" if result else size if factor > 0 else f"-{size}"
    return result or "0"
