"""Capture: a Dynamo graph becomes pre-dispatch ATen, with module paths and source lines kept, checkpoints inlined.

A model's own `autograd.Function` stays one node where gradients are on: traced, its backward would be lost. So does a call
with a tensor of a class of its own, such as a quantized weight of torchao.

Parameters and buffers stay inputs of the graph, as Dynamo made them; what they are called and what they hold is
recorded, since a mask may be a constant buffer."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
import torch.utils._pytree as pytree
from rewriter.passes.graph.inputs import GraphInput
from rewriter.passes.graph.inputs import is_size
from rewriter.passes.graph.inputs import set_source
from rewriter.passes.graph.nodes import may_attend
from rewriter.passes.graph.repeated_calls import RepeatedCalls
from rewriter.passes.graph.repeated_calls import calls_layer
from rewriter.passes.graph.vmap import gather_vmap
from torch import Tensor
from torch._higher_order_ops.wrap import TagActivationCheckpoint
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.proxy_tensor import track_tensor_tree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.checkpoint import CheckpointPolicy

from rewriter.errors import CaptureError


@dataclass(frozen=True)
class CapturedGraph:
    """A pre-dispatch ATen graph.

    Attributes:
        module: the graph; `inputs.source_of` says where a placeholder's value comes from.
        buffers: the model's buffers among the placeholders, with their qualified names and present values.
        inputs: what each placeholder that is not a symbolic size holds, in order.
    """

    module: GraphModule
    buffers: dict[Node, tuple[str, Tensor]]
    inputs: tuple[GraphInput, ...] = ()


def capture(dynamo_graph: GraphModule, example_inputs: Sequence[Any]) -> CapturedGraph:
    """Traces a Dynamo graph to pre-dispatch ATen under its own fake mode.

    Args:
        dynamo_graph: what a `torch.compile` backend is given.
        example_inputs: the values of its placeholders, in order.

    Raises:
        CaptureError: an `autograd.Function` of the model's changes a tensor in place, or a part of the model leaves no trace.
    """
    placeholders = [node for node in dynamo_graph.graph.nodes if node.op == "placeholder"]
    fakes = [node.meta["example_value"] for node in placeholders]
    fake_mode = next((fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor)), None)
    if fake_mode is None:
        module = dynamo_graph  # nothing but numbers: no attention to find
        return CapturedGraph(module, {})

    gathered = gather_vmap(dynamo_graph)

    def run(*inputs: Any) -> Any:
        with torch.fx.traceback.preserve_node_meta():
            return _Inlined(gathered, RepeatedCalls()).run(*inputs)

    with fake_mode, torch._dynamo.config.patch(specialize_float=True):
        module = make_fx(run, pre_dispatch=True)(*fakes)
    _check_trace(module)
    buffers = {}
    inputs = []
    traced = [node for node in module.graph.nodes if node.op == "placeholder"]
    for node, original, value in zip(traced, placeholders, example_inputs, strict=True):
        source = getattr(original, "_dynamo_source", None)
        path = str(source.name if source is not None and isinstance(source.name, str) else original.target)
        # Dynamo's word for what belongs to a module that sets attributes in its forward, or has a `__getattr__` of its own.
        path = re.sub(r"\.__dict__\['(_modules|_parameters|_buffers)'\]", r".\1", path)
        known = set_source(node, path)
        if isinstance(value, Tensor) and known.kind == "buffer":
            buffers[node] = (known.name, value)
        if not is_size(node.meta["val"]):
            inputs.append(GraphInput(known.kind, known.name, value))
    return CapturedGraph(module, buffers, tuple(inputs))


def _check_trace(module: GraphModule) -> None:
    """Raises where a tensor that was only imagined while tracing stands in the graph as a constant, and is used.

    And where a whole attention is one node, which no pass looks into.
    """
    module.graph.eliminate_dead_code()  # autograd reads the base of a view that is written to, and makes nothing of it
    for node in module.graph.nodes:
        is_imagined = node.op == "get_attr" and isinstance(attrgetter(str(node.target))(module), FakeTensor)
        if is_imagined or node.target is torch.ops.higher_order.flex_attention:
            raise CaptureError(
                "a part of the model leaves no trace, as torch.func.grad and flex_attention do; write it in "
                "operators of torch (attention as scaled_dot_product_attention), or call it outside of the model"
            )


class _Inlined(torch.fx.Interpreter):
    """Runs a graph, its checkpointed regions as part of it.

    Their nodes are tagged as the partitioner of AOTAutograd expects: what it may recompute in the backward.
    """

    def __init__(self, module: GraphModule, repeated: RepeatedCalls) -> None:
        super().__init__(module)
        self.repeated = repeated

    def run_node(self, n: Node) -> Any:
        if n.op not in ("call_function", "call_method"):
            return super().run_node(n)
        with self._set_current_node(n):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            if calls_layer(n):
                return self._layer(n, args)
            if n.target is not torch.ops.higher_order.tag_activation_checkpoint and any(
                is_traceable_wrapper_subclass(v)
                for v in pytree.tree_leaves((args, kwargs, n.meta.get("example_value")))
            ):
                return kept_call(n, args, kwargs, lambda: getattr(self, n.op)(n.target, args, kwargs))
            return self.repeated(n, args, kwargs, lambda: getattr(self, n.op)(n.target, args, kwargs))

    def _layer(self, node: Node, args: tuple[Any, ...]) -> Any:
        """A call of a body that several layers share: its nodes, where this layer stands in the model."""
        mode = get_proxy_mode()
        assert mode is not None
        graph = mode.tracer.graph
        body, _, *inputs = args
        with disable_proxy_modes_tracing():
            node.meta["example_value"] = pytree.tree_map_only(Tensor, _as_result, node.meta["example_value"])
        last = next(iter(reversed(graph.nodes)))
        result = self.repeated(node, args, {}, lambda: _Inlined(gather_vmap(body), self.repeated).run(*inputs))
        *outer, (path, _) = node.meta["nn_module_stack"].values()
        for own in itertools.takewhile(lambda n: n is not last, reversed(graph.nodes)):
            stack = own.meta.get("nn_module_stack", {})
            if len(stack) > len(outer):
                there = list(stack.values())[len(outer)][0]
                own.meta["nn_module_stack"] = {
                    key: (path + name.removeprefix(there) if name.startswith(there) else name, kind)
                    for key, (name, kind) in stack.items()
                }
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.higher_order.autograd_function_apply and torch.is_grad_enabled():
            return _kept(target, args, kwargs)
        if target is not torch.ops.higher_order.tag_activation_checkpoint:
            return super().call_function(target, args, kwargs)
        region, *inputs = args
        number = next(_numbers)
        for node in region.graph.nodes if torch.is_grad_enabled() else ():
            node.meta.update(recompute=CheckpointPolicy.PREFER_RECOMPUTE, ac_graph_id=number)
        _, named = TagActivationCheckpoint.divide_kwargs(kwargs)
        return _Inlined(region, self.repeated).run(*inputs, *named.values())


def _as_result(example: Tensor) -> Tensor:
    """A fake tensor that may be written to, as results may be where gradients are on, and leaves may not."""
    return example.clone() if example.requires_grad and example.is_leaf else example


def kept_call(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[[], Any]) -> Any:
    """Puts a call with a tensor of a class of its own, a quantized weight say, into the graph as it is: the class says what
    becomes of it, and the compiler after the passes asks it."""
    if may_attend(node.target):
        kinds = {
            type(value).__name__ for value in pytree.tree_leaves((args, kwargs)) if is_traceable_wrapper_subclass(value)
        }
        raise CaptureError(
            f"a part of the model attends over tensors of class {', '.join(sorted(kinds))}, which no pass looks into; "
            "make them plain tensors before the attention"
        )
    mode = get_proxy_mode()
    assert mode is not None
    tracer: Any = mode.tracer
    with disable_proxy_modes_tracing():
        results = run()
    given, named = pytree.tree_map(tracer.unwrap_proxy, (args, kwargs))
    proxy = tracer.create_proxy(node.op, node.target, given, named)
    return track_tensor_tree(results, proxy, constant=None, tracer=tracer)


_numbers = itertools.count()


def _kept(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Puts a call of an `autograd.Function` into the graph as it is, as one node; returns its fake results."""
    mode = get_proxy_mode()
    assert mode is not None
    tracer: Any = mode.tracer
    tensors = [a for a in args if isinstance(a, Tensor)]
    versions = [tensor._version for tensor in tensors]
    with disable_proxy_modes_tracing():
        results = target(*args, **kwargs)
    if kwargs.get("dirty_idx") or versions != [tensor._version for tensor in tensors]:
        raise CaptureError(
            "an autograd.Function of the model's changes a tensor in place, which a traced graph would lose; "
            "let it return a new tensor, or call the model under torch.no_grad()"
        )
    bodies = []
    for body in args[:2]:
        name = f"autograd_function_{next(_numbers)}"
        tracer.root.register_module(name, body)
        bodies.append(tracer.create_proxy("get_attr", name, (), {}))
    inputs = pytree.tree_map(tracer.unwrap_proxy, args[2:])
    proxy = tracer.create_proxy("call_function", target, (*bodies, *inputs), kwargs, name="autograd_function")
    return track_tensor_tree(results, proxy, constant=None, tracer=tracer)
