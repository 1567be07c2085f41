"""Repeated calls: what a layer traced to is copied for the layers like it.

A deep model calls the same functions on tensors of the same shapes again and again, and tracing one with symbolic shapes takes
milliseconds, most of them arithmetic on strides. `RepeatedCalls` records the nodes that a call of Dynamo's graph became, and
copies them where a later call has the same signature; the fake result is then the one that Dynamo found.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import _ProxyTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.experimental.proxy_tensor import get_proxy_slot
from torch.fx.experimental.proxy_tensor import set_proxy_slot
from torch.fx.experimental.proxy_tensor import snapshot_fake

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)

_TRACED = ("tensor_meta", "original_aten")
"""What tracing notes of a node; the rest of its `meta` says where the call stands."""
_WITHIN = ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn", "from_node")
"""What is also a node's own where the call is one of a layer's body."""


@dataclass(frozen=True)
class _Recording:
    """What a call became.

    Attributes:
        inputs: nodes of its tensor arguments, in order.
        nodes: those that it made, in order.
        results: of each tensor that it returned, its node where the call made that, and the place of the argument that it is
            where it is one: `x.to(dtype)` makes a node and returns `x`.
        signatures: of those tensors.
        spec: the structure that holds them.
    """

    inputs: tuple[Node, ...]
    nodes: tuple[Node, ...]
    results: tuple[tuple[Node | None, int | None], ...]
    signatures: tuple[Any, ...]
    spec: pytree.TreeSpec


@dataclass(frozen=True)
class _Call:
    """A call in Dynamo's graph.

    Attributes:
        signature: all that its trace depends on.
        tensors: its tensor arguments, in order.
        inputs: their nodes in the trace.
    """

    signature: Any
    tensors: tuple[Tensor, ...]
    inputs: tuple[Node, ...]


class RepeatedCalls:
    """Recordings of one trace."""

    def __init__(self) -> None:
        self._recordings: dict[Any, _Recording | None] = {}

    def __call__(self, node: Node, args: Any, kwargs: Any, trace: Callable[[], Any]) -> Any:
        """The result of a call, traced where none before was like it.

        Args:
            node: the call in Dynamo's graph; its `meta["example_value"]` is Dynamo's result.
            args, kwargs: what it is called with.
            trace: makes the call.
        """
        mode = get_proxy_mode()
        assert mode is not None
        with torch._C.DisableTorchFunction():  # to read a size is no call of the model's
            call = _described(node, args, kwargs, mode.tracer)
            known = None if call is None else self._recordings.get(call.signature)
            if call is not None and known is not None:
                noted = _TRACED + _WITHIN if calls_layer(node) else _TRACED
                results = _copy(known, node.meta.get("example_value"), call, noted, mode.tracer)
                if results is not None:
                    return pytree.tree_unflatten(results, known.spec)
        if call is None or call.signature in self._recordings:
            return trace()
        before = next(iter(reversed(mode.tracer.graph.nodes)))
        result = trace()
        with torch._C.DisableTorchFunction():
            recording = _record(before, call, result, mode.tracer)
            if recording is not None and calls_layer(node) and any("recompute" in n.meta for n in recording.nodes):
                recording = None  # each checkpoint has a number of its own
            self._recordings[call.signature] = recording
        return result


def _described(node: Node, args: Any, kwargs: Any, tracer: Any) -> _Call | None:
    """None for what cannot be compared with other calls."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
    inputs = tuple(_node(tensor, tracer) for tensor in tensors)
    if None in inputs:
        return None
    same = tuple(inputs.index(own) for own in inputs)  # which arguments are one tensor
    signature = (node.op, node.target, spec, tracing_state(), tuple(map(_signature, leaves)), same)
    try:
        hash(signature)
    except TypeError:
        return None
    return _Call(signature, tensors, inputs)  # type: ignore[arg-type]


def _record(before: Node, call: _Call, result: Any, tracer: Any) -> _Recording | None:
    """None for what does more than to compute tensors from its arguments."""
    nodes = []
    node = before.next
    while node.op != "root":
        if not _is_size(node):  # which is a number, and as good later on
            plain = node.target is operator.getitem or isinstance(node.target, torch._ops.OpOverload)
            if node.op != "call_function" or not plain or _mutates(node.target):
                return None
            if not all(n in nodes or n in call.inputs or _is_size(n) for n in node.all_input_nodes):
                return None
            nodes.append(node)
        node = node.next
    leaves, spec = pytree.tree_flatten(result)
    results = []
    for leaf in leaves:
        own = _node(leaf, tracer) if isinstance(leaf, Tensor) else None
        place = next((place for place, tensor in enumerate(call.tensors) if tensor is leaf), None)
        if own is None or (place is None and own not in nodes):
            return None
        results.append((own if own in nodes else None, place))
    return _Recording(call.inputs, tuple(nodes), tuple(results), tuple(map(_signature, leaves)), spec)


def _copy(known: _Recording, example: Any, call: _Call, noted: Sequence[str], tracer: Any) -> list[Tensor] | None:
    """The results of a call like a recorded one; None where Dynamo's example of them is not like the recorded ones.

    `noted` names what copies have of the nodes' `meta`.
    """
    leaves = pytree.tree_leaves(example)
    if tuple(map(_signature, leaves)) != known.signatures:
        return None
    new = [leaf for leaf, (_, place) in zip(leaves, known.results, strict=True) if place is None]
    if len(set(map(id, new))) < len(new) or any(get_proxy_slot(leaf, tracer, None) is not None for leaf in new):
        return None
    copies = dict(zip(known.inputs, call.inputs, strict=True))
    for old in known.nodes:
        args, kwargs = torch.fx.map_arg((old.args, dict(old.kwargs)), lambda n: copies.get(n, n))
        copies[old] = tracer.create_node("call_function", old.target, args, kwargs, name=old.name)
        copies[old].meta.update({name: old.meta[name] for name in noted if name in old.meta})
        # Its own: a trace that is given the values of two nodes tells them apart by their identity.
        copies[old].meta["val"] = pytree.tree_map_only(FakeTensor, snapshot_fake, old.meta["val"])
    results = []
    for leaf, (node, place) in zip(leaves, known.results, strict=True):
        results.append(leaf if place is None else call.tensors[place])
        if node is not None:
            set_proxy_slot(results[-1], tracer, _ProxyTensor(tracer.proxy(copies[node]), None))
    return results


def _node(tensor: Tensor, tracer: Any) -> Node | None:
    """A fake tensor's node in the trace; None for others, and for constants, whose values a trace may read."""
    slot = get_proxy_slot(tensor, tracer, None) if isinstance(tensor, FakeTensor) else None
    return slot.proxy.node if isinstance(slot, _ProxyTensor) and slot.constant is None else None


def _signature(leaf: Any) -> Any:
    """All of an argument or result that a trace may depend on."""
    if isinstance(leaf, Tensor):
        numbers = (*leaf.shape, *leaf.stride(), leaf.storage_offset()) if leaf.layout == torch.strided else (object(),)
        flags = (leaf.requires_grad, leaf.is_leaf, leaf.is_conj(), leaf.is_neg(), isinstance(leaf, torch.nn.Parameter))
        return (type(leaf), leaf.dim(), *map(_number, numbers), leaf.dtype, leaf.device, flags)
    if isinstance(leaf, slice):
        return (slice, *map(_signature, (leaf.start, leaf.stop, leaf.step)))
    return (type(leaf), repr(leaf) if isinstance(leaf, (float, complex)) else _number(leaf))  # 0.0 is not -0.0


def _number(value: Any) -> Any:
    return value.node.expr if isinstance(value, _SYMBOLIC) else value


def tracing_state() -> tuple[Any, ...]:
    """What a trace depends on besides its arguments."""
    devices = ("cpu", "cuda")
    autocast = tuple((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), autocast


def calls_layer(node: Node) -> bool:
    """Whether a call in Dynamo's graph is one of a body that several layers share."""
    return node.target is torch.ops.higher_order.invoke_subgraph


def _is_size(node: Node) -> bool:
    return isinstance(node.meta.get("val"), _SYMBOLIC)


def _mutates(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
