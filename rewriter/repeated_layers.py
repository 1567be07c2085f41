"""Repeated layers: Dynamo traces one of the layers that are alike, and repeats it for the others.

A deep model's layers run the same Python, and Dynamo would interpret it for each. torch can repeat a region
(`torch.compiler.nested_compile_region`); here a model's layers become such regions while it is captured, without a change to
the model, and `passes/graph/capture.py` puts their bodies in the places of their calls.

torch looks at a layer's guards when it repeats another one for it, and does not keep them: a change to that layer later on would
not be seen. So they are installed here, for each layer.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from rewriter.passes.graph.repeated_calls import calls_layer
from rewriter.passes.graph.repeated_calls import tracing_state

FEWEST_LAYERS = 4
"""Of one class in a list, before it is worth it."""


def layers_of(model: nn.Module) -> frozenset[int]:
    """Identities of the modules of a model that stand in a list with others of their class, not inside of one another."""
    found: set[int] = set()
    rest, seen = [model], {id(model)}
    while rest:
        module = rest.pop()
        children = [child for child in module._modules.values() if child is not None]
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            kinds = [type(child) for child in children]
            alike = [child for child in children if kinds.count(type(child)) >= FEWEST_LAYERS]
            found.update(map(id, alike))
            children = [child for child in children if id(child) not in found]
        rest.extend(child for child in children if id(child) not in seen)
        seen.update(map(id, children))
    return frozenset(found)


@contextmanager
def traced_once(layers: frozenset[int]) -> Iterator[None]:
    """Inside, Dynamo traces one of these layers, and repeats it where another is called alike."""
    if not layers or not _teach_dynamo():
        yield
        return
    before = dict(vars(_present))
    _present.layers, _present.guards, _present.state, _present.structures = layers, {}, None, {}
    try:
        yield
    finally:
        vars(_present).update(before)


class _Present(threading.local):
    """Of a thread.

    Attributes:
        layers: those that are regions now.
        guards: of each region that was repeated, by its identity, the region and the guards that read its layer.
        state: that the first of the layers was traced in.
        structures: of arguments of layers, as torch describes them.
    """

    def __init__(self) -> None:
        self.layers: frozenset[int] = frozenset()
        self.guards: dict[int, tuple[Any, list[Any]]] = {}
        self.state: tuple[Any, ...] | None = None
        self.structures: dict[Any, Any] = {}


_present = _Present()


@functools.cache
def _teach_dynamo() -> bool:
    """Lets Dynamo see a call of a present layer as a region; False where this version of torch repeats none."""
    try:
        from torch._dynamo.guards import install_guard
        from torch._dynamo.variables import invoke_subgraph
        from torch._dynamo.variables.functions import UserFunctionVariable
        from torch._dynamo.variables.nn_module import UnspecializedNNModuleVariable
    except ImportError:
        return False
    if not all(hasattr(invoke_subgraph, name) for name in _TAKEN_FROM_TORCH):
        return False
    inner = UnspecializedNNModuleVariable.call_function

    class LayerCall(UserFunctionVariable):
        """A layer's call as a function of the layer; regions of one `forward` are compared with one another."""

        def call_function(self, tx: Any, args: Any, kwargs: Any) -> Any:
            return inner(args[0], tx, args[1:], kwargs)

    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if id(self.value) not in _present.layers or self.source is None:
            return inner(self, tx, args, kwargs)
        _present.state = _present.state or tracing_state()
        if (
            _present.state != tracing_state()
        ):  # autocast or gradients are on for some layers alone, and torch does not ask
            return inner(self, tx, args, kwargs)
        layers, _present.layers = _present.layers, frozenset()  # what is inside of a layer is part of it
        try:
            call = LayerCall(type(self.value).forward)
            given = [self, *args]
            known = None  # a region that was traced before, and would be the same for this layer
            if invoke_subgraph.has_reuse_entries(tx, call):
                fingerprint = _fingerprint(tx, given, kwargs)
                known = invoke_subgraph.find_reuse_match(tx, call, fingerprint)
            if known is None:
                region = invoke_subgraph.InvokeSubgraphHigherOrderVariable(torch._higher_order_ops.invoke_subgraph)
                result = region.call_function(tx, [call, *given], kwargs)
            else:
                guards = None
                if not _has_written(tx) and _has_same_constants(tx, call, known, fingerprint):
                    guards = _guards_alike(tx, known, self.source, fingerprint.arg_sources)
                if guards is None:
                    return inner(self, tx, args, kwargs)
                result = invoke_subgraph.stamp_out_subgraph(tx, fingerprint, known)
                install_guard(*(guard for guard in guards if not _is_known(tx, guard)))
        finally:
            _present.layers = layers
        _say_where(self, next(n for n in reversed(tx.output.current_tracer.graph.nodes) if calls_layer(n)))
        return result

    UnspecializedNNModuleVariable.call_function = call_function  # type: ignore[method-assign]
    return True


_TAKEN_FROM_TORCH = (
    *("InvokeSubgraphHigherOrderVariable", "InputTag", "build_input_fingerprint", "find_reuse_match", "get_fn_code"),
    *("has_reuse_entries", "stamp_out_subgraph", "classify_vt", "InputFingerprint"),
)


def _fingerprint(tx: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """A call's arguments as torch compares them with those of another one.

    torch lets Dynamo trace how they are taken apart, a quarter of the time that it needs for a layer which is repeated. Where
    their structure is that of a call before, the parts are taken from the same places.
    """
    from torch._dynamo.variables import invoke_subgraph

    parts: list[Any] = []
    structure = (_take_apart(args, parts), tuple((name, _take_apart(value, parts)) for name, value in kwargs.items()))
    tags: list[Any] = [invoke_subgraph.classify_vt(part) for part in parts]
    known = _present.structures.get(structure)
    if known is not None and None not in tags:
        sources = [getattr(part, "source", None) for part in parts]
        return invoke_subgraph.InputFingerprint(list(zip(tags, parts, strict=True)), sources, False, known)
    fingerprint = invoke_subgraph.build_input_fingerprint(tx, args, kwargs)
    if [id(part) for _, part in fingerprint.flat_vts] == list(map(id, parts)):
        _present.structures[structure] = fingerprint.treespec
    return fingerprint


def _take_apart(value: Any, parts: list[Any]) -> Any:
    """The structure of tuples and lists; what is in them is added to `parts`."""
    from torch._dynamo.variables.lists import TupleVariable

    if type(value) in (list, TupleVariable):
        items = value if type(value) is list else value.items
        return (type(value), *(_take_apart(item, parts) for item in items))
    parts.append(value)
    return None


def _has_written(tx: Any) -> bool:
    """Whether a list or dictionary that was there before the call was written to: a layer may read it, and torch does not ask."""
    from torch._dynamo.variables.base import ValueMutationExisting

    kinds = (variable.mutation_type for variable in tx.output.side_effects.id_to_variable.values())
    return any(isinstance(kind, ValueMutationExisting) and kind.is_modified for kind in kinds)


def _has_same_constants(tx: Any, call: Any, known: Any, fingerprint: Any) -> bool:
    """Whether a layer is called with the numbers that the traced one was called with: for torch 2, 2.0 and True are the same."""
    from torch._dynamo.variables import invoke_subgraph

    cache = tx.output.tracing_context.hop_dispatch_set_cache.get_cache(torch._higher_order_ops.invoke_subgraph)
    entries = cache.subgraph_reuse_cache[invoke_subgraph.get_fn_code(call)]
    checks = next(condition.input_checks for condition, entry in entries if entry is known)
    pairs = zip(checks, fingerprint.flat_vts, strict=True)
    constant = invoke_subgraph.InputTag.CONSTANT
    return all(repr(before) == repr(now.value) for (tag, before), (_, now) in pairs if tag == constant)


def _is_known(tx: Any, guard: Any) -> bool:
    """Whether a tensor has its guard already, from having become an input of the graph: a second one would be an error."""
    name = guard.create_fn_name()
    present = tx.output.guards.get_guards_for_source(guard.originating_source)
    return name == "TENSOR_MATCH" and any(other.create_fn_name() == name for other in present)


def _say_where(layer: Any, node: Node) -> None:
    """Notes at a region's call which layer it is, as Dynamo notes it at what is inside."""
    path = re.sub(r"\._(?:modules|parameters|buffers)\[(['\"])([^'\"\]]+)\1\]", r".\2", layer.source.name)
    stack = node.meta.get("nn_module_stack", {})
    node.meta["nn_module_stack"] = {**stack, str(id(layer.value)): (path, type(layer.value))}


def _guards_alike(tx: Any, known: Any, layer: Any, sources: list[Any]) -> list[Any] | None:
    """For another layer the guards of the one that was traced; None where one of them does not hold for it.

    Args:
        known: the region that was traced, an `InvokeSubgraphReuseEntry`.
        layer: where this layer comes from.
        sources: where the arguments of this call come from, the layer among them.
    """
    from torch._dynamo.guards import GUARD_VALUE_DISPATCH
    from torch._dynamo.guards import GuardBuilder
    from torch._guards import Source

    pairs = zip(known.arg_sources, sources, strict=True)
    moved: dict[Any, Any] = {old: new for old, new in pairs if old is not None and new is not None and old != new}

    if layer not in moved.values():
        return None  # its parameters would be those of the other one

    def there(source: Any) -> Any:
        """As `source.clone`, which makes what many have in common anew for each."""
        if source not in moved:
            parts = {f.name: getattr(source, f.name) for f in dataclasses.fields(source)}
            new = {name: there(part) for name, part in parts.items() if isinstance(part, Source)}
            differs = any(part != parts[name] for name, part in new.items())
            moved[source] = dataclasses.replace(source, **new) if differs else source
        return moved[source]

    if id(known) not in _present.guards:
        of_layer = [g for g in tx.output.guards if any(there(s) != s for s in _sources(g))]
        _present.guards[id(known)] = (known, of_layer)
    order = tx.output.guard_on_key_order  # dictionaries whose places, and not only keys, are read
    order.update({there(own) for own in order})
    root = {"G": tx.output.root_tx.f_globals, "L": tx.output.root_tx.f_locals}
    names: dict[str, Any] = {}
    values: dict[Any, Any] = {}
    guards = []
    for guard in _present.guards[id(known)][1]:
        name = guard.create_fn_name()
        source, *others = [there(own) for own in _sources(guard)]
        check: Any = GUARD_VALUE_DISPATCH.get(name)
        try:
            value, *others_values = [own.get_value(root, names, values) for own in (source, *others)]
            before = guard.originating_source.get_value(root, names, values)
        except (AttributeError, KeyError, IndexError):
            return None  # this layer has no such part
        if name == "DUPLICATE_INPUT":
            holds = value is others_values[0]
            create = functools.partial(GuardBuilder.DUPLICATE_INPUT, source_b=others[0])
        else:
            holds = hasattr(check, "eval_fn") and check.eval_fn(value, check.get_metadata_fn(guard, before))
            if name in ("EQUALS_MATCH", "CONSTANT_MATCH"):
                holds = holds and repr(value) == repr(before)  # 2 is not 2.0
            # That of a tensor holds the other layer's; without it, it reads its own.
            create = GuardBuilder.TENSOR_MATCH if name == "TENSOR_MATCH" else guard.create_fn
        if not holds:
            return None
        guards.append(source.make_guard(create))
    return guards


def _sources(guard: Any) -> list[Any]:
    """What a guard reads: one place, or two that hold the same object."""
    named = getattr(guard.create_fn, "keywords", {})
    return [guard.originating_source, *([named["source_b"]] if "source_b" in named else [])]
