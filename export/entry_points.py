"""Entry points: an optimized model as exported programs, whose inputs are tensors in a fixed order.

`forward` is the model's own call. Where the model goes on from a cache there are `prefill` and `decode` instead, for several
new tokens and for one: they take the cache's tensors, of fixed sizes, and change them in place. Under `ChunkedEviction` there
is `chunk`, the first phase, which returns the query's logits and each site's keys, values and scores.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from typing import TYPE_CHECKING
from typing import Any

import torch
from rewriter.passes import Rewritten
from rewriter.passes import rewrite
from rewriter.passes.graph.copy import GraphCopy
from rewriter.passes.graph.inputs import source_of
from rewriter.passes.lower.cache_layout import StateTensor
from rewriter.passes.lower.kernel import PORTABLE
from torch import Tensor
from torch import nn
from torch.export import Dim
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx import Interpreter

from rewriter.chunked.lowering import RESULTS
from rewriter.errors import CacheError
from rewriter.errors import ExportError
from rewriter.errors import PolicyError
from rewriter.generation.model_facts import text_config
from rewriter.sharding import holds_dtensors
from rewriter.tracing import guarded
from rewriter.tracing import traced_call

if TYPE_CHECKING:
    from rewriter.generation.decoder import Decoder
    from rewriter.optimized_model import OptimizedModel

MOST_TOKENS = 2**20
"""Tokens of a call that artifacts are made for, where the model itself sets no limit."""

MOST_ROWS = 1024
"""Rows of a batch that artifacts are made for."""


@dataclass(frozen=True)
class Input:
    """One tensor that an entry point takes.

    Attributes:
        dtype: as torch prints it, without `torch.`.
        dims: sizes, or the names of those that vary.
        fill: what a new one is filled with, for the tensors of a cache; None for arguments.
    """

    name: str
    dtype: str
    dims: tuple[int | str, ...]
    fill: int | float | None = None

    def example(self, sizes: Mapping[str, int], device: torch.device) -> Tensor:
        shape = [sizes[d] if isinstance(d, str) else d for d in self.dims]
        return torch.full(shape, self.fill or 0, dtype=getattr(torch, self.dtype), device=device)


@dataclass(frozen=True)
class EntryPoint:
    """A program and its signature.

    Attributes:
        inputs: in order.
        ranges: of each size that varies, its least and largest value.
        outputs: names of the results.
        examples: what the program was traced with.
    """

    name: str
    program: ExportedProgram
    inputs: tuple[Input, ...]
    ranges: dict[str, tuple[int, int]]
    outputs: tuple[str, ...]
    examples: tuple[Tensor, ...] = field(repr=False)

    def retraced(self, module: nn.Module) -> EntryPoint:
        """The same with another module in the place of the program's."""
        return replace(self, program=exported(module, self.examples, self.inputs, self.ranges))


class _Functional(nn.Module):
    """A module that leaves the tensors that it is given as they are: it returns those that it would have changed."""

    def __init__(self, module: nn.Module, num_arguments: int) -> None:
        super().__init__()
        self.module, self.num_arguments = module, num_arguments

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        state = [t.clone() for t in tensors[self.num_arguments :]]
        return self.module(*tensors[: self.num_arguments], *state), *state


def functional(point: EntryPoint) -> EntryPoint:
    """`prefill` or `decode` for a format whose programs change nothing: behind the logits come the cache's new tensors."""
    num_arguments = sum(own.fill is None for own in point.inputs)
    module = _Functional(point.program.module(), num_arguments)
    outputs = (*point.outputs, *(f"new.{own.name}" for own in point.inputs[num_arguments:]))
    return replace(point, program=exported(module, point.examples, point.inputs, point.ranges), outputs=outputs)


class Program(nn.Module):
    """A graph whose parameters are its own; what is left to give are the arguments, in order, and further tensors."""

    def __init__(
        self,
        graph: GraphModule,
        inputs: Sequence[tuple[str | None, Tensor | None]],
        arguments: tuple[str, ...],
        finish: Callable[[Any, Mapping[str, Tensor]], Any],
    ) -> None:
        """
        Args:
            inputs: of each input of the graph: the argument that it is, or the tensor that it holds.
            finish: makes the results of the graph's, given the arguments.
        """
        super().__init__()
        self.graph, self.arguments, self.finish = graph, arguments, finish
        self.sources: list[tuple[bool, str]] = []
        for number, (argument, tensor) in enumerate(inputs):
            if argument is not None:
                self.sources.append((True, argument))
                continue
            name = f"tensor_{number}"
            assert tensor is not None
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)
            self.sources.append((False, name))

    def forward(self, *tensors: Tensor) -> Any:
        given = dict(zip(self.arguments, tensors, strict=False))
        flat = [given[name] if is_argument else getattr(self, name) for is_argument, name in self.sources]
        return self.finish(_run(self.graph, *flat, *tensors[len(self.arguments) :]), given)


def entry_points(
    optimized: OptimizedModel, kwargs: Mapping[str, Any], max_length: int | None, cached: bool
) -> tuple[list[EntryPoint], Decoder | None, str]:
    """What to export of a model.

    Args:
        kwargs: arguments of one call of the model, all by name.
        max_length: tokens of a row over a cache; asked for where the policy bounds nothing.
        cached: make `prefill` and `decode` where it is possible.

    Returns:
        The entry points, the decoder whose graphs they are (None for `forward`), and why there is no decode step ("" where
        there is one, or nobody asked).

    Raises:
        ExportError: a length of the cache is given, and no cache is asked for; or the weights are in pieces.
    """
    if max_length is not None and not cached:
        raise ExportError(
            f"max_length={max_length} bounds the cache, and there is none; give cache=True, or leave it out"
        )
    if holds_dtensors(optimized.model):
        raise ExportError(
            f"weights of {type(optimized.model).__name__} are in pieces on several processes, and an artifact is of one; export "
            "the model with its weights in one piece"
        )
    why = ""
    if optimized.policy.is_program:
        return [_chunk(optimized.decoder)], optimized.decoder, why
    if cached and isinstance(kwargs.get("input_ids"), Tensor):
        try:
            decoder = optimized.decoder
        except (CacheError, PolicyError) as error:
            why = str(error)
        else:
            return _cached(decoder, max_length), decoder, why
    return [_forward(optimized, kwargs)], None, why


def cache_bound(points: Sequence[EntryPoint], decoder: Decoder | None) -> int | None:
    """Tokens of a row over the artifact's cache; None where there is no cache, or its policy bounds what lives."""
    prefill = next((p for p in points if p.name == "prefill"), None)
    if prefill is None or decoder is None or decoder.new_cache(2).max_length is None:
        return None
    return prefill.ranges["tokens"][1]


def bind(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments of a call by name.

    Raises:
        ExportError: they do not fit the model's forward.
    """
    try:
        bound = inspect.signature(model.forward).bind(*args, **(kwargs or {}))
    except TypeError as error:
        raise ExportError(f"args and kwargs are no call of {type(model).__name__}.forward: {error}") from None
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = inspect.signature(model.forward).parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            raise ExportError(f"{type(model).__name__}.forward takes *{name}; export needs arguments with names")
        named.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return {name: value for name, value in named.items() if value is not None}


def first_tensor(output: Any) -> Tensor:
    """What artifacts return of a model's output: its logits, or its first tensor."""
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return output.logits
    return next(v for v in (output.values() if isinstance(output, Mapping) else output) if isinstance(v, Tensor))


def capture_forward(optimized: OptimizedModel, kwargs: Mapping[str, Any]) -> Rewritten:
    """The rewritten graph of a call; the results of its model are reduced to `first_tensor`."""
    results: list[Rewritten] = []
    kernel = PORTABLE if optimized.kernel == "auto" else optimized.kernel

    def backend(graph: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        results.append(rewrite(graph, example_inputs, optimized.policy, kernel=kernel))
        return graph.forward

    parameters = dict(optimized.policy_parameters.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        guarded(traced_call(optimized.model, backend, first_tensor), parameters, (), dict(kwargs))
    return results[-1]


def _forward(optimized: OptimizedModel, kwargs: Mapping[str, Any]) -> EntryPoint:
    tensors = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        # The second size of four is that of channels, or of a mask's heads, and fixed.
        if any(size < 2 for size in tensor.shape[: 1 if tensor.dim() == 4 else 2]):
            raise ExportError(f"{name} is {list(tensor.shape)}; give an example with at least two rows of two tokens")
    if any(p.positions == "cache" for p in optimized.policy.parts()):
        ids = tensors["input_ids"]
        places = torch.arange(ids.size(1), device=ids.device).expand(ids.size(0), -1).contiguous()
        kwargs, tensors = {**kwargs, "position_ids": places}, {**tensors, "position_ids": places}
    result = capture_forward(optimized, kwargs)
    optimized._take(result)
    placeholders = [node for node in result.module.graph.nodes if node.op == "placeholder"]
    found = {source_of(n).name: tuple(n.meta["val"].shape) for n in placeholders if isinstance(n.meta["val"], Tensor)}
    shapes = {name: found[name] for name in tensors if name in found}  # in the order of the call
    names: dict[str, str] = {}
    inputs: list[Input] = []
    ranges: dict[str, tuple[int, int]] = {}
    for name, shape in shapes.items():
        dims: list[int | str] = []
        for place, size in enumerate(shape):
            # A size that the model allows one value of, channels of an image say, is a symbol that stands for a number.
            if isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None:
                known = ("batch", "tokens")[place] if place < 2 else f"size{place}"
                own = names.setdefault(str(size), known if known not in names.values() else f"{known}_of_{name}")
                ranges[own] = (1, MOST_ROWS) if own.startswith("batch") else (2, _most_tokens(optimized.model))
                dims.append(own)
            else:
                dims.append(int(size))
        inputs.append(Input(name, _dtype(tensors[name]), tuple(dims)))
    module = GraphCopy(result.module).finish()
    sources = [(g.name, None) if g.name in shapes else (None, g.value) for g in result.inputs]
    program = Program(module, sources, tuple(shapes), lambda outputs, _: outputs[0])
    examples = tuple(tensors[name] for name in shapes)
    return EntryPoint(
        "forward", exported(program, examples, inputs, ranges), tuple(inputs), ranges, ("logits",), examples
    )


def _cached(decoder: Decoder, max_length: int | None) -> list[EntryPoint]:
    cache = decoder.new_cache(_limit(decoder.model) if max_length is None else max_length)

    def sizes(state: StateTensor, slots: int) -> tuple[int | str, ...]:
        varying: dict[int | str, int | str] = {"B": "batch", "C": slots}
        return tuple(varying.get(d, d) for d in state.shape)

    state = [
        Input(f"{prefix}.{s.name}", _dtype(s.dtype), sizes(s, slots), s.fill)
        for prefix, slots, states in (
            *((f"table{t}", cache.capacities[t], table.state) for t, table in enumerate(decoder.layout.tables)),
            *((f"site{n}", cache.capacities[site.table], site.state) for n, site in enumerate(decoder.layout.sites)),
        )
        for s in states
    ]
    most = min(decoder.graphs.most_tokens or MOST_TOKENS, cache.max_length or MOST_TOKENS, _most_tokens(decoder.model))
    points = []
    for name, graph, tokens in (("prefill", decoder.graphs.prefill, "tokens"), ("decode", decoder.graphs.decode, 1)):
        inputs = [Input(n, "int64", ("batch", tokens)) for n in ("input_ids", "attention_mask", "position_ids")]
        if name == "prefill":
            inputs.append(Input("logits_to_keep", "int64", ("kept",)))
        ranges = {"batch": (1, MOST_ROWS)}
        if name == "prefill":
            ranges.update(tokens=(2, most), kept=(1, most))
        points.append(_over_cache(decoder, name, graph, [*inputs, *state], len(inputs), ranges))
    return points


def _over_cache(
    decoder: Decoder, name: str, graph: GraphModule, inputs: list[Input], count: int, ranges: dict[str, tuple[int, int]]
) -> EntryPoint:
    arguments = tuple(i.name for i in inputs[:count])
    examples = tuple(i.example({"batch": 2, "tokens": 7, "kept": 3}, decoder.device) for i in inputs)
    examples[1].fill_(1)
    takes_rows = decoder.takes_rows

    def finish(outputs: Any, given: Mapping[str, Tensor]) -> Tensor:
        logits = outputs[0]
        return logits if takes_rows or "logits_to_keep" not in given else logits[:, given["logits_to_keep"]]

    sources: list[tuple[str | None, Tensor | None]] = []
    for own, fetch in zip(decoder.inputs, decoder.fetch, strict=True):
        if own.name in arguments:
            sources.append((own.name, None))
        elif own.name == "logits_to_keep":
            sources.append((None, torch.zeros(1, dtype=torch.int64, device=decoder.device)))
        else:
            sources.append((None, fetch({})))
    program = Program(graph, sources, arguments, finish)
    return EntryPoint(name, exported(program, examples, inputs, ranges), tuple(inputs), ranges, ("logits",), examples)


def _chunk(decoder: Decoder) -> EntryPoint:
    most = _most_tokens(decoder.model)
    names = ("input_ids", "attention_mask", "position_ids")
    inputs = [Input(n, "int64", ("batch", "tokens")) for n in names]
    inputs += [Input("logits_to_keep", "int64", ("query",)), Input("query_rows", "int64", ("query",))]
    inputs.append(Input("hides", "bool", (1,)))
    examples = tuple(i.example({"batch": 2, "tokens": 40, "query": 16}, decoder.device) for i in inputs)
    examples[1].fill_(1)
    sources: list[tuple[str | None, Tensor | None]] = [
        (own.name, None) if own.name in (*names, "logits_to_keep") else (None, fetch({}))
        for own, fetch in zip(decoder.inputs, decoder.fetch, strict=True)
    ]
    takes_rows = decoder.takes_rows

    def finish(outputs: Any, given: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        logits, *results = outputs
        return (logits if takes_rows else logits[:, given["logits_to_keep"]], *results)

    program = Program(decoder.graphs.own["chunk"], sources, (*names, "logits_to_keep"), finish)
    policy: Any = decoder.policy
    least = policy.observe  # fewer rows would be another graph
    ranges = {"batch": (1, MOST_ROWS), "tokens": (least + 2, most), "query": (least + 1, most)}
    outputs = ("logits", *(f"site{s}.{r}" for s in range(len(decoder.layout.sites)) for r in RESULTS))
    return EntryPoint("chunk", exported(program, examples, inputs, ranges), tuple(inputs), ranges, outputs, examples)


def exported(
    module: nn.Module, examples: tuple[Tensor, ...], inputs: Sequence[Input], ranges: Mapping[str, tuple[int, int]]
) -> ExportedProgram:
    """Traces a module for all sizes in the ranges.

    Raises:
        ExportError: torch.export cannot; with what it said.
    """
    try:
        with torch.no_grad():
            # A tuple of one: the shapes of `*tensors`.
            shapes = (_dynamic_shapes(inputs, ranges),)
            return torch.export.export(
                _Tensors(module),
                examples,
                dynamic_shapes=shapes,
                strict=False,
                # Some guards hold for all sizes, which its solver does not see; they are asserted when the program runs.
                prefer_deferred_runtime_asserts_over_guards=True,
            )
    except torch._dynamo.exc.UserError as error:
        raise ExportError(f"torch.export cannot trace the model for sizes {dict(ranges)}: {error}") from error


class _Tensors(nn.Module):
    """A module that takes any tensors, so that all programs have the same kind of signature."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *tensors: Tensor) -> Any:
        return _run(self.module, *tensors)


def _run(module: nn.Module, *tensors: Tensor) -> Any:
    """Calls a module; a graph node by node, so that a trace of it has the lines of the model that its nodes came from."""
    if isinstance(module, GraphModule):
        with torch.fx.traceback.preserve_node_meta():
            return Interpreter(module).run(*tensors)
    return module(*tensors)


def _dynamic_shapes(inputs: Sequence[Input], ranges: Mapping[str, tuple[int, int]]) -> tuple[dict[int, Any], ...]:
    dims = {name: Dim(name, min=low, max=high) for name, (low, high) in ranges.items()}
    return tuple({place: dims[d] for place, d in enumerate(i.dims) if isinstance(d, str)} for i in inputs)


def _limit(model: nn.Module) -> int | None:
    limit = getattr(text_config(model), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 1 else None


def _most_tokens(model: nn.Module) -> int:
    return min(_limit(model) or MOST_TOKENS, MOST_TOKENS)


def _dtype(of: Tensor | torch.dtype) -> str:
    return str(of.dtype if isinstance(of, Tensor) else of).removeprefix("torch.")
