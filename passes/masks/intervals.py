"""What a proof says: one interval of query rows for each key, as expressions."""

from __future__ import annotations

from dataclasses import dataclass

from rewriter.kernels import FOREVER
from rewriter.passes.masks.expression import ZERO
from rewriter.passes.masks.expression import Apply
from rewriter.passes.masks.expression import Const
from rewriter.passes.masks.expression import Expression
from torch.fx import Node

BATCH, HEAD, ROW, KEY = range(4)


GROUP = 4  # of the query heads of one KV head; HEAD counts KV heads


PLACE = 5  # of a key among those of a call that continues a text; KEY is its index in the text


NEVER_ENDS = Const(FOREVER)


class Unproven(Exception):
    """Why a mask has no proof; the message is the reason that a report shows."""


@dataclass(frozen=True)
class Interval:
    """Live ranges as expressions over `Axis(BATCH)`, `Axis(HEAD)` (a KV head) and `Axis(KEY)`.

    Attributes:
        start, end: integer expressions; besides the names of `Apply` they use max, min, document_start, document_end and
            `running_topk_end(score, keep, segment)`.
        causal: no row sees a later key.
        sliding: the distance between query and key bounds the interval in another way than causality does: a window, say.
        segment: the end without what slides; keys of one document have the same, padding has 0. A causal row that nothing
            slides for sees every earlier key of its own segment.
        traits: what a report says of the mask.
        document: the index of the first key of a key's own document, where a row may hold several; None where it is one.
    """

    start: Expression
    end: Expression
    causal: bool = False
    sliding: bool = False
    segment: Expression = NEVER_ENDS
    traits: tuple[str, ...] = ()
    document: Expression | None = None


EVERYTHING = Interval(ZERO, NEVER_ENDS)


@dataclass(frozen=True)
class MaskProof:
    """What is proven of a site's mask.

    Attributes:
        interval: the live ranges.
        bias: the additive part that depends on the key alone and is not known to be 0 or masking; None for none.
        constants: buffers whose values the proof has read.
        given: why a part of the mask is known at the call alone, "" where none is: it is what a call gives for pairs of query and
            key, or made of its ids in a way that need not be ranges. Whether its columns are ranges is found at the call;
            `interval` is what is known before, and holds at least what the mask shows.
        others: more ranges of the same keys, where they are not one; no two of a key hold the same row.
    """

    interval: Interval
    bias: Expression | None
    constants: tuple[Node, ...]
    given: str = ""
    others: tuple[Interval, ...] = ()

    @property
    def intervals(self) -> tuple[Interval, ...]:
        """All ranges of a key."""
        return (self.interval, *self.others)

    @property
    def name(self) -> str:
        traits = list(dict.fromkeys(trait for interval in self.intervals for trait in interval.traits))
        if self.others:
            traits.append(f"{len(self.intervals)} ranges")
        if self.given:
            traits.append("given at the call")
        if self.bias is not None:
            traits.append("key bias")
        return " + ".join(traits) or "none"


def flatten(name: str, expression: Expression) -> list[Expression]:
    """The arguments of nested `name`s: `max(a, max(b, c))` -> a, b, c."""
    if isinstance(expression, Apply) and expression.name == name:
        return [part for argument in expression.args for part in flatten(name, argument)]
    return [expression]
