"""Translation validation: a solver is asked for sizes, data and a place at which a model's mask and the proven ranges differ.

    mask(b, h, i, j)  <=>  start[b, h, j] <= i < end[b, h, j]

Both sides are read by `Reading`, the mask from the model's graph and the ranges from the operators that the lowering emits for
them. No answer but "there is none" (unsat) verifies a site. A counterexample is tried: the model's mask and the ranges are
computed at these sizes, of these data. Where they differ, the analysis is wrong; where not, something was not understood here,
and the check by evaluation decides, as it does without a solver.

This is how compilers are validated one translation at a time (Pnueli, Siegel and Singerman, "Translation Validation", 1998).
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import logging
import math
import threading
import time
from collections.abc import Collection
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING
from typing import Any

import sympy
import torch
from rewriter.passes.attention.site import AttentionSite
from rewriter.passes.graph.nodes import shape
from rewriter.passes.lower.operator import by_range
from rewriter.passes.lower.operator import data_of
from rewriter.passes.lower.operator import emit_bounds
from rewriter.passes.masks.check import Ranges
from rewriter.passes.masks.check import Trial
from rewriter.passes.masks.check import difference_at
from rewriter.passes.masks.check import running_topks
from rewriter.passes.masks.expression import LARGEST
from rewriter.passes.masks.interpret import IndexFunctions
from rewriter.passes.masks.intervals import MaskProof
from torch import Tensor
from torch.fx import Graph
from torch.fx import GraphModule
from torch.fx import Node

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from rewriter.passes.verify.reading import Reading

HAS_SOLVER = importlib.util.find_spec("z3") is not None
"""Whether the extra `proof` is installed; it is imported when it is first asked, as that takes a moment."""

TIMEOUT = 1000
"""Milliseconds that the solver may think about one site."""

LIMITS = (LARGEST, 2**24)
"""Sizes up to which a claim is tried: those that int32 holds, and those that fp32 counts exactly, 16,777,216."""

SMALL = (3, 6, 12, 40)
"""Largest sizes of a counterexample that are tried first, so that it can be read."""

MOST_DATA = 4096
"""Elements of an input of a counterexample at most."""

HIDDEN = -1e4
"""What is added to a logit hides its key from here on, as everywhere in this project."""


class Answer(Enum):
    """What is known of a site's ranges."""

    VERIFIED = "verified"
    """They are the mask, at all sizes and for all data."""

    EVALUATED = "evaluated"
    """They are the mask at the sizes and for the data that were tried."""

    REFUTED = "refuted"
    """They are not."""


@dataclass(frozen=True)
class Validation:
    """Attributes:
    answer: what is known.
    limit: the largest size that it is known for; None where it is not known for all up to one.
    reason: why it is not verified; "" where it is.
    seconds: that the solver took.
    """

    answer: Answer
    limit: int | None
    reason: str
    seconds: float


_lock = threading.Lock()
"""z3's terms belong to one context, which one thread may use at a time."""

_known: dict[str, Validation] = {}
"""By structure: a hundred layers, and the next capture of the same model, ask once."""


def validate(
    site: AttentionSite, proof: MaskProof, functions: IndexFunctions, constants: Mapping[Node, Tensor]
) -> Validation:
    """Asks whether a site's ranges are its mask at all sizes.

    Args:
        functions, constants: of the graph, as the proof had them; used to compute a counterexample, not to look for one.
    """
    if not HAS_SOLVER:
        return Validation(Answer.EVALUATED, None, "z3 is not installed: pip install 'rewriter[proof]'", 0.0)
    with _lock:
        key = None if _reads_constants(site, constants) else structure(site, proof, functions.modified)
        if key is not None and key in _known:
            return _known[key]
        from rewriter.passes.verify.reading import Unread

        began = time.perf_counter()
        try:
            answer, limit, reason = _asked(site, proof, functions, constants)
        except Unread as unread:
            answer, limit, reason = Answer.EVALUATED, None, f"not understood by the solver's reading: {unread}"
        except Exception as error:  # no proof more than before; a call that could be rewritten is not to fail for it
            log.warning("the solver's reading of a mask failed", exc_info=True)
            answer, limit, reason = (
                Answer.EVALUATED,
                None,
                f"the solver's reading failed: {type(error).__name__}: {error}",
            )
        validation = Validation(answer, limit, reason, time.perf_counter() - began)
        if key is not None:
            _known[key] = validation
        return validation


def _asked(
    site: AttentionSite, proof: MaskProof, functions: IndexFunctions, constants: Mapping[Node, Tensor]
) -> tuple[Answer, int | None, str]:
    import z3

    if any(running_topks(interval.end) for interval in proof.intervals):
        return Answer.EVALUATED, None, "a running top-k is not read by the solver"
    emitted = _Emitted.of(site, proof)
    reading, solver, sizes, question = _question(site, proof, emitted, functions, constants)
    if solver.check() == z3.unsat:
        return Answer.EVALUATED, None, "what is known of the data contradicts itself, from which anything would follow"
    solver.add(question)
    for limit in LIMITS:
        solver.push()
        solver.add([size <= limit for size in sizes])
        result = solver.check()
        if result == z3.unsat:
            return Answer.VERIFIED, limit, ""
        if result == z3.unknown:
            return Answer.EVALUATED, None, f"the solver found no answer in {TIMEOUT / 1000:g} s"
        found = _counterexample(reading, solver, sizes, site, proof, emitted, functions, constants)
        solver.pop()
        if found is not None:
            return Answer.REFUTED, None, found
    opaque = ", ".join(reading.opaque)
    return Answer.EVALUATED, None, f"not understood by the solver's reading: {opaque or 'sums along a row'}"


def _question(
    site: AttentionSite,
    proof: MaskProof,
    emitted: _Emitted,
    functions: IndexFunctions,
    constants: Mapping[Node, Tensor],
) -> tuple[Reading, Any, list[Any], Any]:
    """What is read, a solver that knows what holds of it, the sizes in it, and the question: where mask and ranges differ, or,
    where the mask itself is used besides, where it shows what they hide."""
    import z3
    from rewriter.passes.verify.operators import Reading
    from rewriter.passes.verify.reading import LARGEST_DATA
    from rewriter.passes.verify.reading import as_bool
    from rewriter.passes.verify.reading import as_real

    assert site.query is not None and site.key is not None
    reading = Reading(emitted.same, constants, functions.modified)
    b, h, i, j = (z3.Int(name) for name in ("b", "h", "i", "j"))
    reading.places = [i, j]
    query, key = ([reading.size(s) for s in shape(node)] for node in (site.query, site.key))
    flat = len(query) == 3
    num_heads, group = (z3.IntVal(1), 1) if flat else (query[1], _group(site))
    inside = [
        z3.And(index >= 0, index < size)
        for index, size in ((b, query[0]), (h, num_heads), (i, query[-2]), (j, key[-2]))
    ]
    place = (b, i, j) if flat else (b, h, i, j)
    shown, added = [z3.BoolVal(True)], z3.RealVal(0)
    if site.is_causal:
        shown.append(j <= i)
    for term in site.masks:
        element = reading.element(term.node, place[len(place) - len(shape(term.node)) :])
        if term.kind == "add":
            added += as_real(element)
        else:
            shown.append(as_bool(element) if term.kind == "keep" else z3.Not(as_bool(element)))
    visible = z3.And(*shown, added > HIDDEN)
    kv_head = h if group == 1 else h / group
    starts, ends = ([reading.element(n, (b, kv_head, j)) for n in nodes] for nodes in (emitted.starts, emitted.ends))
    holds = [z3.And(start <= i, i < end) for start, end in zip(starts, ends, strict=True)]
    in_range = z3.Or(*holds)
    differ = z3.And(visible, z3.Not(in_range)) if proof.given else visible != in_range
    differ = z3.Or(differ, *(z3.And(*two) for two in itertools.combinations(holds, 2)))
    bias = z3.RealVal(0)
    if emitted.bias is not None:
        bias = as_real(reading.element(emitted.bias, (b, kv_head, j)))
    solver = z3.Solver()
    solver.set("timeout", TIMEOUT)
    solver.add(bias > -LARGEST_DATA, bias < LARGEST_DATA)
    question = differ if proof.given else z3.Or(differ, z3.And(visible, added != bias))
    solver.add(*inside, *_what_sizes_are(reading, site), *reading.complete())
    return reading, solver, list(reading.symbols.values()), question


def _group(site: AttentionSite) -> int:
    """Query heads of a KV head."""
    from rewriter.passes.verify.reading import Unread

    query, key = (shape(node)[1] for node in (site.query, site.key))  # type: ignore[arg-type]
    if query is key or str(query) == str(key):
        return 1
    if not isinstance(query, int) or not isinstance(key, int):
        raise Unread("numbers of heads that are not known")
    return query // key


@dataclass(frozen=True)
class _Emitted:
    """The operators that the lowering emits for a proof.

    Attributes:
        module: from the key, and what the proof reads, to start, end and bias.
        same: of the model's nodes, those that the inputs stand for.
        starts, ends: of each range of the keys.
        key: the input that is the key; `[B, Hkv, K, D]`, whatever the rank of the model's.
    """

    module: GraphModule
    same: dict[Node, Node]
    key: Node
    starts: list[Node]
    ends: list[Node]
    bias: Node | None

    @classmethod
    def of(cls, site: AttentionSite, proof: MaskProof) -> _Emitted:
        assert site.key is not None
        graph = Graph()
        inputs = {node: graph.placeholder(f"input_{number}") for number, node in enumerate(data_of(proof))}
        for node, own in inputs.items():
            own.meta["val"] = node.meta["val"]
        key = graph.placeholder("key")
        value = site.key.meta["val"]
        with value.fake_mode:
            key.meta["val"] = value if value.dim() == 4 else value.unsqueeze(1)
        starts, ends = [], []
        for one in by_range(proof):
            start, end, _, _, *bias = emit_bounds(graph, one, key, inputs)
            starts.append(start)
            ends.append(end)
        graph.output((*starts, *ends, *bias))
        return cls(
            GraphModule(torch.nn.Module(), graph),
            {own: node for node, own in inputs.items()},
            key,
            starts,
            ends,
            bias[0] if bias else None,
        )

    def computed(self, trial: Trial) -> Ranges:
        """Starts, ends and bias in a trial."""
        given = [trial[node] for node in self.same.values()]
        sizes = [trial.concrete(size) for size in self.key.meta["val"].shape]
        found, count = list(self.module(*given, torch.zeros(1).expand(sizes))), len(self.starts)
        return found[:count], found[count : 2 * count], found[-1] if self.bias is not None else None


def _what_sizes_are(reading: Reading, site: AttentionSite) -> list[Any]:
    """The ranges of the symbols, and the guards under which the graph was traced: it runs only where these hold."""
    from rewriter.passes.verify.reading import Unread

    environment = next(
        (s.node.shape_env for n in (site.query, site.key) for s in shape(n) if isinstance(s, torch.SymInt)),  # type: ignore[arg-type]
        None,
    )
    known: list[Any] = []
    if environment is not None:
        for guard in environment.guards:
            if guard.expr.free_symbols <= reading.symbols.keys():
                try:
                    known.append(reading.expression(guard.expr))
                except Unread:
                    continue  # one fact less
    for symbol, term in reading.symbols.items():
        least = environment.var_to_range[symbol].lower if environment is not None else sympy.Integer(0)
        known.append(term >= (max(int(least), 0) if least.is_Integer else 0))
    return known


def _counterexample(
    reading: Reading,
    solver: Any,
    sizes: list[Any],
    site: AttentionSite,
    proof: MaskProof,
    emitted: _Emitted,
    functions: IndexFunctions,
    constants: Mapping[Node, Tensor],
) -> str | None:
    """Where mask and ranges differ when they are computed, in words; None where they do not."""
    import z3

    for most in SMALL:
        solver.push()
        solver.add([size <= most for size in sizes])
        model = solver.model() if solver.check() == z3.sat else None
        solver.pop()
        if model is None:
            continue
        symbols = {name: model.eval(term, True).as_long() for name, term in reading.symbols.items()}
        try:
            data = functools.partial(_data, reading, model)
            found = difference_at(site, proof, functions, constants, symbols, data, emitted.computed)
        except (
            Exception
        ) as error:  # whatever the model's own operators raise on these sizes and data: it does not run there
            log.info("a counterexample could not be computed: %s: %s", type(error).__name__, error)
            continue
        if found is not None:
            return found
    return None


def _data(reading: Reading, model: Any, node: Node, sizes: list[int]) -> Tensor | None:
    """An input's values in a counterexample."""
    import z3

    function = reading.data.get(node)
    if function is None or math.prod(sizes) > MOST_DATA:
        return None
    places = itertools.product(*map(range, sizes))
    values = [_number(model.eval(function(*map(z3.IntVal, place)), True)) for place in places]
    return torch.tensor(values).reshape(sizes).to(node.meta["val"].dtype)


def _number(value: Any) -> bool | int | float:
    """As Python has it; where the question leaves a place out, z3 may choose an integer that no tensor holds."""
    import z3

    if z3.is_bool(value):
        return z3.is_true(value)
    if not z3.is_int_value(value):
        return float(value.as_fraction())
    limits = torch.iinfo(torch.int64)
    return max(limits.min, min(limits.max, value.as_long()))


def _reads_constants(site: AttentionSite, constants: Mapping[Node, Tensor]) -> bool:
    seen, stack = set(), [term.node for term in site.masks]
    while stack:
        node = stack.pop()
        if node in constants:
            return True
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return False


def structure(site: AttentionSite, proof: MaskProof, modified: Collection[Node] = ()) -> str:
    """A text that is the same for sites whose masks and proofs are: nodes are numbered from the mask on."""
    numbers: dict[Node, int] = {}
    lines: list[str] = []

    def name(node: Node) -> str:
        return f"%{numbers.get(node, node.name)}"

    terms = [term.node for term in site.masks]
    stack = [(node, False) for node in reversed([*terms, *data_of(proof)])]
    while stack:
        node, ready = stack.pop()
        if node in numbers:
            continue
        if not ready:
            stack.append((node, True))
            stack += [(n, False) for n in reversed(node.all_input_nodes) if n not in numbers]
            continue
        numbers[node] = len(numbers)
        value = node.meta.get("val")
        kind = (str(value.dtype), str(list(value.shape))) if isinstance(value, Tensor) else str(value)
        args = torch.fx.map_arg((node.args, dict(node.kwargs)), lambda n: _Text(name(n)))
        what = "" if node.op == "placeholder" else f"{node.target}{' modified' if node in modified else ''}"
        lines.append(f"{numbers[node]} {node.op} {what} {args} {kind}")
    sizes = [[str(s) for s in shape(n)] for n in (site.query, site.key)]  # type: ignore[arg-type]
    masks = [(term.kind, name(term.node)) for term in site.masks]
    ranges = [str(_ranges_text(e, numbers)) for e in (proof.interval.start, proof.interval.end, proof.bias)]
    guards = _guards_text(site)
    return "\n".join([*lines, str(sizes), str(masks), str(site.is_causal), *ranges, guards])


class _Text(str):
    def __repr__(self) -> str:
        return str(self)


def _ranges_text(expression: Any, numbers: Mapping[Node, int]) -> str:
    """An expression with its nodes by number."""
    text = repr(expression)
    for node, number in sorted(numbers.items(), key=lambda item: -len(item[0].name)):
        text = text.replace(f"node={node.name},", f"node=%{number},").replace(f"node={node.name})", f"node=%{number})")
    return text


def _guards_text(site: AttentionSite) -> str:
    for node in (site.query, site.key):
        for size in shape(node):  # type: ignore[arg-type]
            if isinstance(size, torch.SymInt):
                return str(sorted(str(guard.expr) for guard in size.node.shape_env.guards))
    return ""
