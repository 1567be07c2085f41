"""Context parallelism: a rewritten graph in which each process has its part of the tokens.

The graph is that of the whole text. What is computed of ids, positions and masks alone stays whole, and is the same in each
process: the live ranges are proven and computed as ever. Where weights come in, in the embedding first, a process goes on
with its own tokens. From there on each operator must compute a token from that token alone; which do is a list, and one that
is not on it is an error. Attention exchanges keys, `rewriter::context_attention`; sums over all tokens, those of a loss, are
summed over the processes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from rewriter.kernels.context_parallel import ContextGroup
from rewriter.passes.graph.capture import kept_call
from rewriter.passes.graph.inputs import source_of
from rewriter.passes.graph.nodes import owner
from rewriter.passes.graph.nodes import shape
from rewriter.passes.graph.nodes import writes
from rewriter.passes.lower.plan import PlannedSite
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule
from torch.fx import Interpreter
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from rewriter.errors import RewriteError

aten = torch.ops.aten


def spread_tokens(module: GraphModule, planned: list[PlannedSite], group: ContextGroup) -> GraphModule:
    """The same graph, of the same inputs, for one process of a group; each is given the whole text.

    Args:
        module: lowered to live ranges.
        planned: its sites.

    Raises:
        RewriteError: a site is refused, the text cannot be cut into equal parts, or something in the model mixes tokens.
    """
    for plan in planned:
        if plan.reason is not None:
            raise RewriteError(
                f"in context parallelism each attention exchanges its keys, and site {plan.layer} "
                f"({plan.site.module_path or '-'}) is refused: {plan.reason}"
            )
    tokens = _length_of(planned)
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    fakes = [node.meta["val"] for node in placeholders]
    fake_mode = next(fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor))

    def run(*inputs: Any) -> Any:
        with torch.fx.traceback.preserve_node_meta():
            return _Spread(module, tokens, group).run(*inputs)

    with fake_mode:
        spread = make_fx(run, pre_dispatch=True)(*fakes)
    for old, new in zip(placeholders, spread.graph.nodes, strict=False):
        new.meta["input"] = source_of(old)
    spread.graph.eliminate_dead_code()
    spread.recompile()
    return spread


def _length_of(planned: list[PlannedSite]) -> sympy.Symbol:
    """The symbol of the text's length."""
    assert planned[0].site.key is not None
    size = shape(planned[0].site.key)[-2]
    expression = size.node.expr if isinstance(size, torch.SymInt) else None
    if not isinstance(expression, sympy.Symbol):
        raise RewriteError(
            f"context parallelism cuts a text of any length, and the attention of this call is over {size} keys, which is fixed "
            "or depends on other sizes; give the model the text alone, with more than one token"
        )
    return expression


class _MixesTokens(Exception):
    """Why an operator cannot be computed for some of the tokens."""


class _Spread(Interpreter):
    """Runs a graph of a whole text for some of its tokens.

    A value is whole, the same in each process, or has the own tokens of this one: these are in `own`. Sizes are not run but read
    from the original graph, as each is another number for the whole and for a part.
    """

    def __init__(self, module: GraphModule, length: sympy.Symbol, group: ContextGroup) -> None:
        super().__init__(module)
        self.nodes = list(module.graph.nodes)
        self.length, self.group = length, group
        self.own: set[Node] = set()
        self.sizes: dict[sympy.Symbol, Any] = {}
        self.tokens: Any = None
        self.needed: dict[tuple[Node, Node], Any] = {}
        self.learned = self._learned()

    def run(self, *inputs: Any) -> Any:  # type: ignore[override]
        nodes = self.nodes
        for node, value in zip((n for n in nodes if n.op == "placeholder"), inputs, strict=True):
            self.env[node] = value
            self._read_sizes(node, value)
        sites = [node for node in nodes if node.target is _ATTENTION]
        bounds = list(dict.fromkeys((node.args[3], node.args[4]) for node in sites))
        known = [pair for pair in bounds if not set(pair) & self.learned]
        first = _above(node for pair in known for node in pair)
        read = {owner(node) for node in first}
        for node in nodes:
            if node not in first and writes(node) and read.intersection(map(owner, node.all_input_nodes)):
                raise RewriteError(
                    f"{_name(node)} writes into what the model's masks are made of; please report this, with the model"
                )
        for node in nodes:  # what says how tokens are shared comes before all that has some
            if node in first and node not in self.env:
                self.env[node] = self.run_node(node)
        self._share_tokens([[self.env[node] for node in side] for side in zip(*known, strict=True)] or [[], []])
        for node in nodes:
            if node.op == "output":
                return pytree.tree_map_only(Node, self._returned, node.args[0])
            if node not in self.env:
                self.env[node] = self.run_node(node)
        raise AssertionError("a graph ends with its output")

    def run_node(self, n: Node) -> Any:
        if _is_size(n) or (n.all_input_nodes and all(map(_is_size, n.all_input_nodes)) and n.meta.get("val") is None):
            return None  # assertions of sizes, too, which held when the graph was made
        with self._set_current_node(n):
            if n.op == "get_attr":
                return self.fetch_attr(str(n.target))
            given = [node for node in n.all_input_nodes if not _is_size(node)]
            if n.target is _ATTENTION:
                return self._attend(n)
            if n.target in _OF_ALL_TOKENS:
                return self._call(n, own=False)
            try:
                if self._goes_on_with_own_tokens(n, given):
                    return self._of_own_tokens(n)
                self._check_same_everywhere(n)
                return self._call(n, own=False)
            except _MixesTokens as reason:
                where = list(n.meta.get("nn_module_stack", {}).values())
                path = where[-1][0].split("L['model'].")[-1] if where else "-"
                raise RewriteError(
                    f"context parallelism spreads tokens over processes, and {_name(n)} ({path}) {reason}; call this part of the "
                    "model, or the loss, outside of what is distributed, or train without a cp dimension in the mesh"
                ) from None

    def _goes_on_with_own_tokens(self, node: Node, given: list[Node]) -> bool:
        """Whether an operator is computed for the own tokens: one of its inputs is, or weights come in."""
        if any(other in self.own for other in given):
            return True
        return node in self.learned and any(self._dim(other) is not None for other in given)

    def _check_same_everywhere(self, node: Node) -> None:
        """Raises where what each process computes of the whole text differs from process to process."""
        if not _is_operator(node) or torch.Tag.nondeterministic_seeded not in node.target.tags:  # type: ignore[union-attr]
            return
        arguments = _arguments(node)
        if arguments.get("train") is not False and arguments.get("p") != 0:
            raise RewriteError(
                f"{_name(node)} makes random numbers of its own in each process, where context parallelism needs the same "
                "in all; make them outside of the model, and give them to it"
            )

    def _of_own_tokens(self, node: Node) -> Any:
        if node.target in _SUMS:
            return self._summed(node)
        if node.target in _LOSSES and node.meta["val"].dim() == 0:
            return self._loss(node)
        self._check(node)
        self.own.add(node)
        return self._call(node, own=True)

    def _call(self, node: Node, *, own: bool) -> Any:
        """The node's result, of own tokens or of all."""

        def given(name: str, value: Any) -> Any:
            is_size_of_result = own and (name in _SIZES or (name == "end" and self._takes_all(node, _arguments(node))))

            def one(other: Any) -> Any:
                if not isinstance(other, Node) or _is_size(other):
                    size = other.meta["val"] if isinstance(other, Node) else other
                    return self._size(size, own=is_size_of_result)
                return self._with_own_tokens(other) if own else self._whole(other)

            return pytree.tree_map_only((Node, torch.SymInt, torch.SymFloat), one, value)

        names = [a.name for a in node.target._schema.arguments] if _is_operator(node) else [""] * len(node.args)  # type: ignore[union-attr]
        args = tuple(given(name, value) for name, value in zip(names, node.args, strict=False))
        kwargs = {name: given(name, value) for name, value in node.kwargs.items()}

        def run() -> Any:
            return getattr(self, node.op)(node.target, args, kwargs)

        if any(is_traceable_wrapper_subclass(value) for value in pytree.tree_leaves((args, kwargs))):
            return kept_call(node, args, kwargs, run)
        return run()

    def _with_own_tokens(self, node: Node) -> Any:
        value = self.env[node]
        dim = None if node in self.own else self._dim(node)
        if dim is None:
            return value
        size = shape(node)[dim].node.expr
        own = self.tokens[self.group.rank]
        if size == self.length:
            return value.index_select(dim, own)
        rows = self._of(sympy.cancel(size / self.length), own=False)
        return (
            value.unflatten(dim, (rows, self._of(self.length, own=False)))
            .index_select(dim + 1, own)
            .flatten(dim, dim + 1)
        )

    def _whole(self, node: Node) -> Any:
        value = self.env[node]
        if node not in self.own:
            return value
        dim = self._dim(node)
        if dim is None or shape(node)[dim].node.expr != self.length:
            raise RewriteError(
                f"{node.name}, of the tokens of one process, is needed for all; please report this, with the model"
            )
        return torch.ops.rewriter.gather_tokens(value, self.tokens, dim, self.group.name)

    def _returned(self, node: Node) -> Any:
        if _is_size(node):
            return self._size(node.meta["val"], own=False)
        return self._whole(node) if self.group.gathers_outputs else self.env[node]

    def _share_tokens(self, bounds: list[list[Any]]) -> None:
        length = self._of(self.length, own=False)
        device = next(value.device for value in self.env.values() if isinstance(value, Tensor))
        if not bool(length % self.group.num_chunks == 0):
            raise RewriteError(
                f"a text of {int(length.node.hint)} tokens cannot be cut into {self.group.num_chunks} equal parts, two for each "
                f"of {self.group.size} processes; pad it on the right to a multiple of {self.group.num_chunks}, with an "
                "attention_mask of 0 and labels of -100"
            )
        self.tokens = torch.ops.rewriter.share_tokens(*bounds, length, self.group.size, device)

    def _attend(self, node: Node) -> Any:
        """Attention of the own rows over the keys of all processes."""
        given = _arguments(node)
        query, key, value, start, end = (given[name] for name in ("query", "key", "value", "start", "end"))
        if any(given[name] is not None for name in ("query_index", "key_index", "alibi_slopes")):
            raise RewriteError(
                f"{node.name} has several ranges for each key, or numbers of its own for keys, which context parallelism does "
                "not spread; train this model without a cp dimension in the mesh"
            )
        if any(_expression(shape(n)[2]) != self.length for n in (query, key)):
            raise RewriteError(
                f"{node.name} attends from {shape(query)[2]} rows to {shape(key)[2]} keys; context parallelism spreads "
                "self-attention over one text"
            )
        ranges = tuple(self._whole(bound) for bound in (start, end))
        if (start, end) not in self.needed:
            self.needed[start, end] = torch.ops.rewriter.needed_keys(*ranges, self.tokens)
        own = [self._with_own_tokens(n) for n in (query, key, value)]
        whole = [None if given[name] is None else self._whole(given[name]) for name in ("bias", "sinks")]
        needed = self.needed[start, end]
        self.own.add(node)
        output = torch.ops.rewriter.context_attention(
            *own, *ranges, needed, self.tokens, *whole, given["scale"], given["softcap"], self.group.name
        )
        return output, None

    def _summed(self, node: Node) -> Any:
        """A sum or mean over all that a tensor holds; processes have as many tokens."""
        (given,) = node.all_input_nodes
        if self._dim(given) is None:
            raise _MixesTokens("has lost its tokens")
        values = self._with_own_tokens(given)
        total = self._sum_of_all(values)
        if node.target is aten.mean.default:
            total = total / (values.numel() * self.group.size)
        return total.to(node.meta["val"].dtype)

    def _loss(self, node: Node) -> Any:
        """The cross entropy of all tokens: its sum, by how many count."""
        options = _arguments(node)
        logits, target = (self._with_own_tokens(options[name]) for name in ("self", "target"))
        if options["weight"] is not None or target.is_floating_point():
            raise _MixesTokens("has weights of classes, or probabilities for targets")
        if self._dim(options["self"]) == 1 or None in (self._dim(options["self"]), self._dim(options["target"])):
            raise _MixesTokens("chooses among the tokens")
        ignored = options["ignore_index"]
        ignored = self._size(ignored.meta["val"] if isinstance(ignored, Node) else ignored, own=False)
        losses = aten.cross_entropy_loss(logits, target, None, 0, ignored, options["label_smoothing"])
        total = self._sum_of_all(losses)
        if options["reduction"] == 1:
            total = total / (self._whole(options["target"]) != ignored).sum()
        return total.to(node.meta["val"].dtype)

    def _sum_of_all(self, values: Any) -> Any:
        """Over all processes, in fp32 at least: in 16 bits the sum over a text overflows where its mean does not."""
        total = values.sum(
            dtype=torch.promote_types(values.dtype, torch.float32) if values.is_floating_point() else None
        )
        return torch.ops.rewriter.sum_over_processes(total, self.group.name)

    def _check(self, node: Node) -> None:
        """Raises `_MixesTokens` unless each token of the result is computed from that token alone."""
        if node.target is _GETITEM:
            return
        if not isinstance(node.target, torch._ops.OpOverload):
            raise _MixesTokens("is not known to compute a token from that token alone")
        name = node.target._schema.name
        given = [n for n in node.all_input_nodes if not _is_size(n) and self._dim(n) is not None]
        results = [v for v in pytree.tree_leaves(node.meta["val"]) if isinstance(v, Tensor)]
        dims = [self._dim_of(value) for value in results]
        if None in dims:
            raise _MixesTokens("reads several tokens, or loses them")
        arguments = _arguments(node)
        if writes(node):
            raise _MixesTokens("writes into a tensor")
        if name in _POINTWISE or _is_pointwise(node.target):
            from_right = {self._dim_from_right(n) for n in given}
            from_right |= {r.dim() - d for r, d in zip(results, dims, strict=True)}  # type: ignore[operator]
            if len(from_right) > 1:
                raise _MixesTokens("combines different tokens")
        elif name in _RESHAPES:
            after = [_product(value.shape[dim + 1 :]) for value, dim in zip(results, dims, strict=True)]  # type: ignore[operator]
            if any(_product(shape(n)[self._dim(n) + 1 :]) != a for n in given for a in after):  # type: ignore[operator]
                raise _MixesTokens("makes one dimension of tokens and others")
        elif name in _PRODUCTS:
            first, second = (arguments[operand] for operand in _PRODUCTS[name])
            if self._dim(second) is not None or self._dim(first) == len(shape(first)) - 1:
                raise _MixesTokens("sums over tokens")
            if any(n is not first and self._dim_from_right(n) != results[0].dim() - dims[0] for n in given):  # type: ignore[operator]
                raise _MixesTokens("combines different tokens")
        elif name == "aten::embedding":
            if self._dim(arguments["weight"]) is not None:
                raise _MixesTokens("chooses among the tokens")
        elif name in _NORMALIZED:
            (first,) = (n for n in given if n is arguments["input"])
            if self._dim(first) >= len(shape(first)) - len(arguments["normalized_shape"]):  # type: ignore[operator]
                raise _MixesTokens("normalizes over tokens")
        elif name == "aten::index":
            self._check_index(arguments, given)
        elif name in _ALONG_DIM:
            operands = [n for n in node.all_input_nodes if not _is_size(n)] if name in _ALIGNED else given
            if len({self._dim(n) for n in operands}) > 1:
                raise _MixesTokens("combines different tokens")
            along = arguments.get("dim")
            for n in given:
                chosen = list(along) if isinstance(along, (list, tuple)) else [] if along is None else [along]
                chosen = chosen or list(range(len(shape(n))))
                if self._dim(n) in [d % len(shape(n)) for d in chosen] and not self._takes_all(node, arguments):
                    raise _MixesTokens("goes along the tokens")
        elif name not in _BY_OUTPUT:
            raise _MixesTokens("is not known to compute a token from that token alone")

    def _check_index(self, arguments: dict[str, Any], given: list[Node]) -> None:
        """A look-up in a table, by indices of tokens; or in each token, by the same indices."""
        table, dim = arguments["self"], self._dim(arguments["self"])
        if dim is None:
            if len({self._dim_from_right(n) for n in given}) > 1:
                raise _MixesTokens("combines different tokens")
        elif given != [table] or (len(arguments["indices"]) > dim and arguments["indices"][dim] is not None):
            raise _MixesTokens("chooses among the tokens")

    def _takes_all(self, node: Node, arguments: dict[str, Any]) -> bool:
        """Whether a slice takes all there is."""
        if node.target is not aten.slice.Tensor or arguments["step"] != 1 or arguments["start"] not in (None, 0):
            return False
        end = arguments["end"]
        if isinstance(end, Node):
            end = end.meta["val"]
        size = shape(arguments["self"])[arguments["dim"]]
        return end is None or end == 2**63 - 1 or _expression(end) == _expression(size)

    def _learned(self) -> set[Node]:
        """What is computed from weights."""
        found: set[Node] = set()
        for node in self.nodes:
            is_weight = node.op == "placeholder" and source_of(node).kind == "parameter"
            if not _is_size(node) and (is_weight or any(n in found for n in node.all_input_nodes)):
                found.add(node)
        return found

    def _dim(self, node: Node) -> int | None:
        value = node.meta.get("val")
        if isinstance(value, (list, tuple)):
            value = next((v for v in value if isinstance(v, Tensor)), None)
        return self._dim_of(value) if isinstance(value, Tensor) else None

    def _dim_from_right(self, node: Node) -> int:
        return len(shape(node)) - self._dim(node)  # type: ignore[operator]

    def _dim_of(self, value: Tensor) -> int | None:
        """The dimension of tokens."""
        dims = [n for n, size in enumerate(value.shape) if self.length in _expression(size).free_symbols]
        if len(dims) > 1:
            raise _MixesTokens("has a result for each pair of tokens")
        if not dims:
            return None
        if self.length in sympy.cancel(_expression(value.shape[dims[0]]) / self.length).free_symbols:
            raise _MixesTokens("has a result with another number of tokens")
        return dims[0]

    def _read_sizes(self, node: Node, value: Any) -> None:
        """What symbols stand for, in what is traced now."""
        sizes = zip(shape(node), value.shape, strict=True) if isinstance(value, Tensor) else [(node.meta["val"], value)]
        for old, new in sizes:
            if isinstance(_expression(old), sympy.Symbol):
                self.sizes.setdefault(_expression(old), new)

    def _size(self, value: Any, *, own: bool) -> Any:
        return self._of(_expression(value), own=own) if isinstance(value, (torch.SymInt, torch.SymFloat)) else value

    def _of(self, expression: sympy.Expr, *, own: bool) -> Any:
        if expression.is_number:
            return int(expression) if expression.is_integer else float(expression)
        sizes = {**self.sizes, self.length: self.tokens.size(1)} if own else self.sizes
        if unknown := expression.free_symbols - sizes.keys():
            raise RewriteError(
                f"a size in the model's graph ({expression}) depends on data ({', '.join(map(str, unknown))}), and context "
                "parallelism cannot tell which tokens are there; train this model without a cp dimension in the mesh"
            )
        value = sympy_interp(_Numbers, {s: sizes[s] for s in expression.free_symbols}, expression)
        if isinstance(value, sympy.Basic):
            raise RewriteError(
                f"context parallelism cannot compute a number of the model's graph ({expression}); compute it outside of it"
            )
        return value


class _Numbers(PythonReferenceAnalysis):
    """Numbers made of symbolic sizes, by Python's operators; torch's own has none for these."""

    @staticmethod
    def int_truediv(a: Any, b: Any) -> Any:
        return a / b

    @staticmethod
    def truediv(a: Any, b: Any) -> Any:
        return a / b


def _above(nodes: Iterable[Node]) -> set[Node]:
    """The nodes and all values that they are computed from; of what sizes are is not asked."""
    seen: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(n for n in node.all_input_nodes if not _is_size(n))
    return seen


def _is_size(node: Node) -> bool:
    """Whether a node is a number."""
    return isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))


def _expression(size: Any) -> sympy.Expr:
    return size.node.expr if isinstance(size, (torch.SymInt, torch.SymFloat)) else sympy.sympify(size)


def _product(sizes: Iterable[Any]) -> sympy.Expr:
    return sympy.expand(math.prod((_expression(size) for size in sizes), start=sympy.Integer(1)))


def _is_operator(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload)


def _is_pointwise(target: torch._ops.OpOverload) -> bool:
    """By torch's tag, of an operator or of one that it is composed of: another overload."""
    packet = target.overloadpacket
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads())


def _name(node: Node) -> str:
    return str(node.target) if isinstance(node.target, (str, torch._ops.OpOverload)) else str(node.target.__name__)


def _arguments(node: Node) -> dict[str, Any]:
    """By their names, what is left out included."""
    declared: Any = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((a.name for a in declared), node.args, strict=False))
    return {a.name: node.kwargs.get(a.name, given.get(a.name, a.default_value)) for a in declared}


_GETITEM = operator.getitem
_ATTENTION = torch.ops.rewriter.live_range_attention.default
_OF_ALL_TOKENS = {torch.ops.rewriter.running_topk_end.default}
"""What is computed of all tokens in each process: scores, one number a key, are brought together for it."""
_SUMS = {aten.sum.default, aten.mean.default}
_LOSSES = {aten.cross_entropy_loss.default}


def _aten(names: str) -> frozenset[str]:
    return frozenset(f"aten::{name}" for name in names.split())


_POINTWISE = _aten(
    "dropout native_dropout to _to_copy clone contiguous detach alias expand type_as __or__ __and__ __xor__ "
    "zeros_like ones_like full_like empty_like"
)
"""Besides those that torch calls so."""
_SIZES = ("size", "shape", "sizes")
"""Arguments that are the sizes of a result; anywhere else a number made of the length is the whole text's."""
_RESHAPES = _aten("view reshape _unsafe_view flatten unflatten")
_PRODUCTS = {
    "aten::linear": ("input", "weight"),
    "aten::matmul": ("self", "other"),
    "aten::mm": ("self", "mat2"),
    "aten::bmm": ("self", "mat2"),
    "aten::addmm": ("mat1", "mat2"),
    "aten::baddbmm": ("batch1", "batch2"),
}
"""Their operands. The first one has the tokens, in another dimension than the last, which is summed over."""
_NORMALIZED = _aten("layer_norm rms_norm")
_ALONG_DIM = _aten(
    "mean sum amax amin var norm linalg_vector_norm softmax log_softmax topk argmax cumsum glu "
    "slice select split split_with_sizes chunk unbind squeeze cat stack repeat_interleave "
    "slice_scatter gather scatter scatter_add"
)
"""Right along any dimension but that of tokens."""
_ALIGNED = _aten("slice_scatter gather scatter scatter_add")
"""Of these, operands that are longer or shorter than others are taken from their beginning."""
_BY_OUTPUT = _aten(
    "transpose permute t unsqueeze movedim repeat view_as_complex view_as_real new_zeros new_ones new_full new_empty"
)
"""Right where the result has one dimension of tokens."""
