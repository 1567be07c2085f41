"""The check by evaluation: a proven mask is built both ways, on several shapes and inputs, and compared.

The mask's own subgraph is run with real tensors, its data replaced by padding patterns, packed positions and random
values; the live ranges are computed from the same data. A difference means that the analysis is wrong, and the site
is refused.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from rewriter.kernels.reference import per_query_head
from rewriter.passes.attention.site import AttentionSite
from rewriter.passes.graph.inputs import source_of
from rewriter.passes.graph.nodes import above
from rewriter.passes.graph.nodes import shape
from rewriter.passes.masks.evaluate import bias_tensor
from rewriter.passes.masks.evaluate import key_bounds
from rewriter.passes.masks.evaluate import key_grid
from rewriter.passes.masks.expression import Apply
from rewriter.passes.masks.expression import Const
from rewriter.passes.masks.expression import Expression
from rewriter.passes.masks.expression import constants_of
from rewriter.passes.masks.expression import elements_of
from rewriter.passes.masks.interpret import IndexFunctions
from rewriter.passes.masks.intervals import MaskProof
from torch import Tensor
from torch.fx import Node

LONGEST = 1024
"""Lengths beyond this are not tried; a window wider than this is checked by its proof alone."""

TRIAL_KEEP = 3
"""Trials of a top-k keep at most so many keys."""

PATTERNS = ("ones", "left padding", "right padding", "random bits", "small integers", "packed positions")


def check_mask(
    site: AttentionSite, proof: MaskProof, functions: IndexFunctions, constants: Mapping[Node, Tensor]
) -> str | None:
    """None where every trial agrees, else the reason for refusal."""
    assert site.query is not None and site.key is not None
    nodes = above([site.query, site.key, *(term.node for term in site.masks)])
    symbols = _symbols(nodes)
    topks = [topk for interval in proof.intervals for topk in running_topks(interval.end)]
    traced = sorted(set(symbols.values()), key=str)
    data = _symbols([n for n in nodes if n.op == "placeholder" and isinstance(n.meta["val"], Tensor)])
    loose = {symbols[s] for s in data} - {symbols[s] for s in _symbols([site.query, site.key])}
    for sizes in _sizes(len(traced), proof, constants):
        chosen = dict(zip(traced, sizes, strict=True))
        values = {
            m: Sizes({s: chosen[t] + (m if t in loose else 0) for s, t in symbols.items()}) for m in (0, sum(sizes))
        }
        for pattern in PATTERNS:
            # A padding mask over a cache covers its keys, those of the call and those that a window has dropped: how they
            # add up is not known. What is read beyond its end is tried with more of it.
            for more, own in values.items():
                try:
                    trial = Trial(functions, constants, own, pattern, topks)
                    difference = _compare(site, trial, _ranges(site, proof, trial), bool(proof.given))
                    break
                except Exception as error:  # whatever the model's own operators raise on these shapes
                    if more or not loose:
                        return f"the mask could not be evaluated at sizes {sizes}: {type(error).__name__}: {error}"
            if difference:
                return f"the proven mask ({proof.name}) disagrees with the model's at sizes {sizes}, {pattern}: {difference}"
    return None


def difference_at(
    site: AttentionSite,
    proof: MaskProof,
    functions: IndexFunctions,
    constants: Mapping[Node, Tensor],
    sizes: Mapping[sympy.Symbol, int],
    data: Callable[[Node, list[int]], Tensor | None],
    ranges: Callable[[Trial], Ranges],
) -> str | None:
    """Where the ranges of a proof and the model's mask differ at these sizes, of these data; None where they do not.

    Args:
        sizes: of symbols; those left out are 2.
        data: of an input of the graph and its sizes, its values; None for any.
        ranges: computes them.
    """
    nodes = above([site.query, site.key, *(term.node for term in site.masks)])  # type: ignore[list-item]
    given = Sizes({s: sizes.get(s, 2) for s in _symbols(nodes)})
    trial = WholeTrial(functions, constants, given, "ones", [])
    read = []
    for node in nodes:
        if node.op == "placeholder" and isinstance(node.meta["val"], Tensor) and node not in constants:
            values = data(node, trial.sizes(node))
            if values is not None:
                trial.known[node] = values
                read.append(f"{source_of(node).name or node.name} = {values.tolist()}")
    difference = _compare(site, trial, ranges(trial), bool(proof.given))
    if difference is None:
        return None
    of_query, of_key = (trial.sizes(node) for node in (site.query, site.key))  # type: ignore[arg-type]
    at = f"{of_query[-2]} queries and {of_key[-2]} keys"
    return f"the proven mask ({proof.name}) disagrees with the model's: {difference}, of {at}" + "".join(
        f", {text}" for text in read
    )


Ranges = tuple[list[Tensor], list[Tensor], Tensor | None]
"""Starts and ends `[B|1, Hkv|1, K]` of each range of the keys, and the bias of the same sizes or None."""


def _ranges(site: AttentionSite, proof: MaskProof, trial: Trial) -> Ranges:
    """What a proof's expressions are in a trial."""
    key = trial.sizes(site.key)  # type: ignore[arg-type]
    grid = key_grid(key[0], key[1] if len(key) == 4 else 1, key[-2], torch.device("cpu"))
    starts, ends = (
        [key_bounds(_scaled_down(getattr(interval, side), trial.fewer), trial, grid) for interval in proof.intervals]
        for side in ("start", "end")
    )
    return starts, ends, None if proof.bias is None else bias_tensor(proof.bias, trial, grid)


def _compare(site: AttentionSite, trial: Trial, ranges: Ranges, given: bool) -> str | None:
    query, key = (trial.sizes(node) for node in (site.query, site.key))  # type: ignore[arg-type]
    group = query[1] // key[1] if len(query) == 4 else 1
    index = torch.arange(query[-2])[:, None]
    starts, ends, bias = ranges
    holds = [(s[:, :, None, :] <= index) & (index < e[:, :, None, :]) for s, e in zip(starts, ends, strict=True)]
    if any(bool((a & b).any()) for a, b in itertools.combinations(holds, 2)):
        return "two ranges of a key hold the same query"
    proven = per_query_head(functools.reduce(torch.logical_or, holds), group)
    hidden, logits, added = model_mask(site, trial)
    if given:  # the mask itself is used besides
        proven = proven & ~hidden
    expected = logits
    if bias is None:
        expected = torch.zeros_like(logits)
        if not given and bool(((logits != 0) & (logits > -1e4)).any()):
            return "an additive mask takes a value that is neither 0 nor masking"
    actual = torch.zeros_like(logits)
    if bias is not None:
        actual = actual + per_query_head(bias, group)[:, :, None, :]
    wrong = proven.expand(hidden.shape) == hidden
    if bool(wrong.any()):
        b, h, i, j = wrong.nonzero()[0].tolist()
        return (
            f"batch row {b}, query {i}, key {j} is {'hidden' if bool(hidden[b, h, i, j]) else 'visible'} in the model"
        )
    if given:
        return None
    # The same numbers; a sum of several is rounded, and here it is not.
    rounding = torch.finfo(torch.float32).eps * sum(added) if len(added) > 1 else torch.zeros(())
    if not bool(((actual - expected).abs() <= rounding)[~hidden].all()):
        return "the key bias differs"
    return None


def model_mask(site: AttentionSite, trial: Trial) -> tuple[Tensor, Tensor, list[Tensor]]:
    """What a site's own masks are in a trial: hidden, bool, and what is added, fp64, both `[B, H, Q, K]`; and the absolute values
    of what is added, by term."""
    query, key = (trial.sizes(node) for node in (site.query, site.key))  # type: ignore[arg-type]
    num_batch, num_queries, num_keys = query[0], query[-2], key[-2]
    heads = max([1, *(trial.sizes(term.node)[1] for term in site.masks if len(shape(term.node)) == 4)])
    logits = torch.zeros(num_batch, heads, num_queries, num_keys, dtype=torch.float64)
    hidden = torch.zeros_like(logits, dtype=torch.bool)
    added = []
    if site.is_causal:
        hidden |= torch.arange(num_keys) > torch.arange(num_queries)[:, None]
    for term in site.masks:
        mask = trial[term.node]
        assert isinstance(mask, Tensor)
        if len(query) == 3 and mask.dim() == 3:
            mask = mask[:, None]
        if term.kind == "add":
            logits = logits + mask
            added.append(mask.double().abs())
        else:
            hidden = hidden | (mask if term.kind == "drop" else ~mask)
    return hidden | (logits <= -1e4), logits, added


def smallest_example(site: AttentionSite, functions: IndexFunctions, constants: Mapping[Node, Tensor]) -> str | None:
    """Why a mask is not one range of queries for each key, at the smallest sizes that show it: a key, and the runs of queries
    that see it. None where it is one at all that are tried, or cannot be computed."""
    if site.query is None or site.key is None or not site.masks:
        return None
    symbols = _symbols(above([site.query, site.key, *(term.node for term in site.masks)]))
    for size in EXAMPLE_SIZES:
        for pattern in PATTERNS:
            try:
                trial = WholeTrial(functions, constants, Sizes(dict.fromkeys(symbols, size)), pattern, [])
                hidden, _, _ = model_mask(site, trial)
            except Exception:  # whatever the model's own operators raise on these sizes
                continue
            shown = torch.nn.functional.pad(~hidden, (0, 0, 1, 1))
            changes = (shown[:, :, 1:] != shown[:, :, :-1]).sum(dim=2)
            found = (changes > 2).nonzero()
            if len(found):
                b, h, j = found[0].tolist()
                border = (shown[b, h, 1:, j] != shown[b, h, :-1, j]).nonzero().flatten().tolist()
                runs = [
                    f"{a} to {e - 1}" if e - a > 1 else f"{a}" for a, e in zip(border[::2], border[1::2], strict=True)
                ]
                where = f"{hidden.size(2)} queries and {hidden.size(3)} keys"
                return f"of {where}, key {j} is seen by queries {', and '.join(runs)}, and by none between"
    return None


MOST_ELEMENTS = 10**6
"""Of an input that a trial makes up."""

EXAMPLE_SIZES = (3, 4, 5, 6, 8, 12, 16, 24)


def _scaled_down(expression: Expression, fewer: int) -> Expression:
    """The expression with running top-ks of `fewer` keys less, as trials have it."""
    if not isinstance(expression, Apply):
        return expression
    if expression.name == "running_topk_end":
        score, keep, segment = expression.args
        assert isinstance(keep, Const)
        return Apply(expression.name, (score, Const(keep.value - fewer), segment))
    return Apply(expression.name, tuple(_scaled_down(a, fewer) for a in expression.args))


def running_topks(expression: Expression) -> list[Apply]:
    """The running top-ks of an expression."""
    if not isinstance(expression, Apply):
        return []
    own = [expression] if expression.name == "running_topk_end" else []
    return own + [topk for a in expression.args for topk in running_topks(a)]


class Sizes:
    """Numbers for symbolic sizes. An expression is evaluated once: sympy is slow."""

    def __init__(self, symbols: dict[sympy.Symbol, int]) -> None:
        self.symbols = symbols
        self.known: dict[sympy.Expr, int] = {}

    def __call__(self, size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        expression = size.node.expr
        if expression not in self.known:
            self.known[expression] = int(expression.subs(self.symbols))
        return self.known[expression]


class Trial(Mapping[Node, Any]):
    """Values of nodes at one choice of sizes and data; computed when asked for."""

    def __init__(
        self,
        functions: IndexFunctions,
        constants: Mapping[Node, Tensor],
        concrete: Sizes,
        pattern: str,
        topks: list[Apply],
    ) -> None:
        self.functions, self.constants, self.concrete, self.pattern = functions, constants, concrete, pattern
        self.ranked = {element.node for topk in topks for element in elements_of(topk.args[0])}
        # Rows of a trial are short: of each top-k, the model's and the proof's, so many keys are left out.
        self.fewer = max([0, *(topk.args[1].value - TRIAL_KEEP for topk in topks)])  # type: ignore[attr-defined]
        self.random = torch.Generator().manual_seed(0)
        self.known: dict[Node, Any] = {}

    def __len__(self) -> int:
        return len(self.known)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.known)

    def __getitem__(self, node: Node) -> Any:
        stack = [node]
        while stack:
            top = stack[-1]
            if top in self.known:
                stack.pop()
                continue
            waiting = [n for n in top.all_input_nodes if n not in self.known] if self._computed(top) else []
            if waiting:
                stack.extend(waiting)
            else:
                self.known[top] = self._value(stack.pop())
        return self.known[node]

    def sizes(self, node: Node) -> list[int]:
        return [self.concrete(size) for size in shape(node)]

    def _computed(self, node: Node) -> bool:
        return isinstance(node.meta.get("val"), (Tensor, tuple, list)) and self.functions.is_opened(node)

    def _value(self, node: Node) -> Any:
        value = node.meta["val"]
        if node in self.constants:
            return self.constants[node].detach().cpu()
        if self._computed(node):
            given: Any = torch.fx.node.map_aggregate((node.args, dict(node.kwargs)), self._argument)
            args, kwargs = given
            kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}
            if node.target is torch.ops.aten.topk.default:
                args = (args[0], max(1, min(args[1] - self.fewer, args[0].size(-1))), *args[2:])
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if not isinstance(value, Tensor):
            return self.concrete(value)
        if node in self.ranked:
            sizes = self.sizes(node)
            return torch.randperm(math.prod(sizes), generator=self.random).view(sizes).float()
        return self._data(self.sizes(node), value.dtype)

    def _argument(self, argument: Any) -> Any:
        """A node's value; trials are run on the CPU, wherever the model is."""
        if isinstance(argument, Node):
            return self.known[argument]
        return torch.device("cpu") if isinstance(argument, torch.device) else argument

    def _data(self, size: list[int], dtype: torch.dtype) -> Tensor:
        """Data of the trial's pattern; the last dimension is the key's."""
        length = size[-1] if size else 1
        index = torch.arange(length).expand(size) if size else torch.tensor(0)
        rows = torch.arange(index[..., 0].numel()).view(index.shape[:-1])[..., None] if size else torch.tensor(0)
        cut = (rows + 1) * length // 4 % max(length, 1)
        if self.pattern == "ones":
            data = torch.ones(size)
        elif self.pattern == "left padding":
            data = index >= cut
        elif self.pattern == "right padding":
            data = index < length - cut
        elif self.pattern == "packed positions":
            data = torch.where(index < cut, index, index - cut)
        else:
            data = torch.randint(0, 2 if self.pattern == "random bits" else 5, size, generator=self.random)
        return data.to(dtype)


class WholeTrial(Trial):
    """A trial in which nothing is data but the inputs of the graph: what the analysis does not open is computed, too.

    Raises:
        ValueError: an input is too large to be made up, as the weights of a model are on which its mask depends.
    """

    def _value(self, node: Node) -> Any:
        is_input = node.op == "placeholder" and node not in self.constants and isinstance(node.meta["val"], Tensor)
        if is_input and (elements := math.prod(self.sizes(node))) > MOST_ELEMENTS:
            raise ValueError(f"{node.name} has {elements:,} elements")
        return super()._value(node)

    def _computed(self, node: Node) -> bool:
        value = node.meta.get("val")
        is_call = node.op == "call_function" and isinstance(value, (Tensor, tuple, list))
        return is_call and node not in self.functions.modified


def _symbols(nodes: list[Node]) -> dict[sympy.Symbol, object]:
    """The symbols of the nodes' sizes, with the value each had when traced.

    Sizes that were equal then (the ids' and the padding mask's, say) need not be one symbol, but belong together; not those of
    one tensor, though, of as many rows as columns.
    """
    symbols: dict[sympy.Symbol, object] = {}
    for node in nodes:
        value = node.meta.get("val")
        of_hint: dict[int, list[sympy.Symbol]] = {}
        for size in value.shape if isinstance(value, Tensor) else (value,):
            if isinstance(size, torch.SymInt):
                expression = size.node.expr
                for symbol in expression.free_symbols:
                    symbols.setdefault(symbol, symbol)
                if expression.is_Symbol and size.node.hint is not None:
                    same = of_hint.setdefault(size.node.hint, [])
                    if expression not in same:
                        same.append(expression)
                    if symbols[expression] is expression:
                        symbols[expression] = (size.node.hint, same.index(expression))
    return symbols


def _sizes(count: int, proof: MaskProof, constants: Mapping[Node, Tensor]) -> list[tuple[int, ...]]:
    """Values for `count` sizes: small ones, and lengths just beyond the constants of the proof."""
    if not count:
        return [()]
    bounds = [bound for interval in proof.intervals for bound in (interval.start, interval.end)]
    border = [c + 3 for bound in bounds for c in constants_of(bound) if 2 < c < LONGEST]
    longest = min([LONGEST, *(max(constants[node].shape) for node in proof.constants)])
    lengths = [min(length, longest) for length in dict.fromkeys([5, 9, 34, *border])]
    small = itertools.islice(itertools.product((2, 3), repeat=count), 4)
    # Which symbol is the length is not known: each is long in turn.
    long = [
        tuple(length if i == k else 2 for i in range(count)) for length in dict.fromkeys(lengths) for k in range(count)
    ]
    return list(dict.fromkeys([*small, *long]))
