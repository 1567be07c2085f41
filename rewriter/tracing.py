"""Tracing: a model's call as one graph, handed to a backend of ours by `torch.compile`."""

from __future__ import annotations

import functools
import logging
import sys
import types
import warnings
import weakref
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import AbstractContextManager
from contextlib import contextmanager
from contextlib import nullcontext
from typing import Any
from typing import TypeVar

import torch
from torch import Tensor
from torch import nn
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from rewriter.errors import CaptureError
from rewriter.errors import PolicyError
from rewriter.errors import RewriteError
from rewriter.passes import Analysed
from rewriter.passes import ExampleSequence
from rewriter.passes import Explained
from rewriter.passes import analyse
from rewriter.passes import explain
from rewriter.passes.policy import Policy
from rewriter.repeated_layers import layers_of
from rewriter.repeated_layers import traced_once
from rewriter.sharding import sharded_parts

log = logging.getLogger(__name__)


class NotCaptured(RewriteError):
    """torch.compile has not captured a call, and would run it as it is."""


_NOT_CAPTURED = (
    "torch.compile did not capture the model, and as it is it would be computed without the policy; is it switched off "
    "(torch.compiler.set_stance, TORCHDYNAMO_DISABLE), or is a TorchDispatchMode active, such as FlopCounterMode? Call the "
    "optimized model outside of it; rewriter.explain(model, ...) counts FLOPs"
)


def traced_call(
    model: nn.Module, backend: Callable[..., Any], result: Callable[[Any], Any] = lambda output: output
) -> Callable[..., Any]:
    """`result(model(...))`, compiled as one graph by `backend`; it takes the policy's parameters first."""

    def call(policy_parameters: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            raise NotCaptured(_NOT_CAPTURED)  # this would be the model as it is, without the policy
        if policy_parameters:
            torch.ops.rewriter.policy_parameters(list(policy_parameters.values()), " ".join(policy_parameters))
        return result(model(*args, **kwargs))

    compiled: Any = torch.compile(with_own_code(call), backend=_held_weakly(backend), dynamic=True, fullgraph=True)
    compiled.backend = backend  # lives as long as what it compiles for
    compiled.model = model
    compiled.layers = layers_of(model)
    return compiled


def _held_weakly(backend: Callable[..., Any]) -> Callable[..., Any]:
    """The same backend, for Dynamo to keep: it never forgets one, and ours reach the model with all its weights."""
    reference = weakref.WeakMethod(backend) if isinstance(backend, types.MethodType) else weakref.ref(backend)

    def call(graph: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        present = reference()
        assert present is not None
        return present(graph, example_inputs)

    return call


def analyse_call(model: nn.Module, policy: Policy, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Analysed]:
    """What the passes find in a call; it is run as it is."""
    return _seen(model, args, kwargs, lambda graph, inputs: analyse(graph, inputs, policy))


def explain_call(
    model: nn.Module,
    policy: Policy,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    example: ExampleSequence,
    kernel: str = "auto",
) -> list[Explained]:
    """What the passes would do to a call; it is run as it is."""
    lowers = not any(part.adds_parameters or part.is_program for part in policy.parts())
    return _seen(
        model, args, kwargs, lambda graph, inputs: explain(graph, inputs, policy, example, kernel=kernel, lowers=lowers)
    )


def explain_output(
    model: nn.Module,
    policy: Policy,
    policy_parameters: Mapping[str, Tensor],
    kwargs: Mapping[str, Any],
    example: ExampleSequence,
    *,
    kernel: str = "auto",
) -> Explained:
    """As `explain_call`, with the policy's parameters as inputs, gradients as they are, and one output: the logits, or the tensor
    that the model returns."""
    results: list[Explained] = []

    def backend(graph: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        results.append(explain(graph, example_inputs, policy, example, kernel=kernel))
        return graph.forward

    guarded(traced_call(model, backend, _only_tensor), policy_parameters, (), dict(kwargs))
    return results[-1]


def _only_tensor(output: Any) -> Any:
    return output if isinstance(output, Tensor) else output.logits


Seen = TypeVar("Seen", bound=Analysed)


def _seen(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    look: Callable[[GraphModule, list[Any]], Seen],
) -> list[Seen]:
    results: list[Seen] = []

    def backend(graph: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        results.append(look(graph, example_inputs))
        return graph.forward

    with torch.no_grad():
        guarded(traced_call(model, backend), {}, args, kwargs)
    return results


def install_output_hooks(model: nn.Module) -> None:
    """The hooks that collect hidden states in transformers' models, which these install at the first call that asks for them.

    Installing cannot be traced, as it takes a lock. What has been installed is not installed again.
    """
    from transformers import PreTrainedModel
    from transformers.utils.output_capturing import install_all_output_capturing_hooks

    flag = "_output_capturing_hooks_installed"
    if isinstance(model, PreTrainedModel) and not any(getattr(m, flag, False) for m in model.modules()):
        install_all_output_capturing_hooks(model)
        return
    for child in model.children():
        install_output_hooks(child)


def with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a code object of its own: Dynamo keeps what it compiles there, and gives up after some entries."""
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace()
    return types.FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)


KINDS_OF_CALLS = 512
"""Graphs of one model; Dynamo's own limit, 8, is met by any training that evaluates, pads, and has a shorter last batch."""


class TooManyKindsOfCalls(RewriteError):
    """A model has as many graphs as it may have, and a call needs another one."""


def _logging() -> set[Any]:
    """What a model logs or warns of is left out of its graph; the last three methods are transformers'."""
    names = ("debug", "info", "warning", "error", "warning_once", "info_once", "warning_advice")
    return {warnings.warn, *(getattr(logging.Logger, name) for name in names if hasattr(logging.Logger, name))}


@contextmanager
def many_kinds_of_calls() -> Iterator[None]:
    """Inside, a model may be called in many ways (gradients on and off, adapters, numbers of rows) before Dynamo gives up.

    A float is a constant: as a symbol it would only make Dynamo begin anew, with a constant, when it is through.

    Raises:
        TooManyKindsOfCalls: it has given up; with what differs.
    """
    options: dict[str, Any] = {
        "recompile_limit": KINDS_OF_CALLS,
        "accumulated_recompile_limit": 16 * KINDS_OF_CALLS,
        "specialize_float": True,
    }
    try:
        with torch._dynamo.config.patch(**options):
            yield
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:
        raise TooManyKindsOfCalls(
            f"the model was called in more than {KINDS_OF_CALLS} ways that each need a graph of their own; "
            f"TORCH_LOGS=recompiles shows what differs from call to call: {error}"
        ) from error


@contextmanager
def without_input_gradients(model: nn.Module) -> Iterator[None]:
    """Inside, the hooks of transformers' and peft's `enable_input_require_grads` are off the embeddings.

    They let gradients pass frozen embeddings where checkpoints are reentrant. In a graph checkpoints are not, and it cannot
    hold a tensor that is made to require gradients in its middle.
    """
    taken: list[tuple[nn.Module, Any]] = []
    for module in _with_hooks(model):
        hooks = module._forward_hooks
        if any(_requires_gradients(hook) for hook in hooks.values()):
            taken.append((module, hooks.copy()))
            for key in [key for key, hook in hooks.items() if _requires_gradients(hook)]:
                del hooks[key]
    try:
        yield
    finally:
        for module, hooks in taken:
            module._forward_hooks.clear()
            module._forward_hooks.update(hooks)


def any_input_gradients(model: nn.Module) -> bool:
    """Whether there are hooks that `without_input_gradients` takes off."""
    return any(_requires_gradients(hook) for module in _with_hooks(model) for hook in module._forward_hooks.values())


def _with_hooks(model: nn.Module) -> list[nn.Module]:
    """Parts of a model that have forward hooks. Each call asks, and `modules()` takes a microsecond a module."""
    found, rest, seen = [], [model], {id(model)}
    while rest:
        module = rest.pop()
        if module._forward_hooks:
            found.append(module)
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                rest.append(child)
    return found


@functools.cache
def _teach_peft() -> None:
    """What Dynamo is to trace for the function of peft's DoRA that looks at the name of a weight's class."""
    from peft.utils import integrations

    def dequantize_module_weight(module: Any) -> Any:
        if type(module.weight) is not nn.Parameter:
            raise RewriteError(f"DoRA over weights of type {type(module.weight).__name__} is not supported; use LoRA")
        return module.weight

    torch._dynamo.substitute_in_graph(integrations.dequantize_module_weight, skip_signature_check=True)(
        dequantize_module_weight
    )


def _requires_gradients(hook: Any) -> bool:
    return getattr(hook, "__name__", "") in ("make_inputs_require_grads", "make_inputs_require_grad")


def guarded(
    call: Callable[..., Any], policy_parameters: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Calls a compiled model; errors of the passes come out as they are, those of capture with what to do."""
    if "peft" in sys.modules:
        _teach_peft()
    args = tuple(_as_own_tensor(value) for value in args)
    kwargs = {name: _as_own_tensor(value) for name, value in kwargs.items()}
    try:
        # DDP would have the graph cut at its buckets, and each piece seen as a model. Hooks that come later are not ignored.
        options: dict[str, Any] = {
            "optimize_ddp": False,
            "skip_nnmodule_hook_guards": False,
            "ignore_logging_functions": _logging(),
        }
        with (
            many_kinds_of_calls(),
            torch._dynamo.config.patch(**options),
            _own_symbols((*args, *kwargs.values())),
            without_input_gradients(call.model),  # type: ignore[attr-defined]
        ):
            return _with_repeated_layers(call, policy_parameters, args, kwargs)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if isinstance(error.inner_exception, CaptureError):
            raise RewriteError(str(error.inner_exception)) from None
        if isinstance(error.inner_exception, (RewriteError, PolicyError)):
            raise error.inner_exception from None
        raise
    except _CANNOT_CAPTURE as error:
        _raise_the_models_own_error(call.model, args, kwargs)  # type: ignore[attr-defined]
        if parts := sharded_parts(call.model):  # type: ignore[attr-defined]
            raise RewriteError(
                f"fully_shard was called on {len(parts)} parts of the model ({parts[0] or 'the model itself'}, ...), which "
                "gather their weights while it runs, and this cannot be captured as one graph; shard the optimized model as one "
                "unit: fast = rewriter.optimize(model, ...); fully_shard(fast), or, layer by layer, "
                'rewriter.distribute(fast, mesh, shard="layers")'
            ) from error
        raise RewriteError(
            "the model cannot be captured as one graph, and a part left as it was would ignore the policy (optimize a part of "
            f"it that can be, and put it in its place: model.part = rewriter.optimize(model.part, ...)): {error}"
        ) from error
    except RuntimeError as error:
        if any(sign in str(error) for sign in ("found no compiled frames", "Compilation was not attempted")):
            raise NotCaptured(_NOT_CAPTURED) from error
        raise


def _own_symbols(values: Iterable[Any]) -> AbstractContextManager[Any]:
    """Inside, each size of an input has a symbol of its own, if one has as many rows as columns.

    torch gives equal sizes one symbol. With that, the length of ids `[8, 8]` is their number of rows, too, and what is computed
    of both, such as how many heads there are, stays a fraction of squares that torch does not reduce.
    """
    sizes = (value.shape for value in values if isinstance(value, Tensor))
    if any(len(set(shape)) < len(shape) for shape in ([n for n in shape if n > 1] for shape in sizes)):
        patched: AbstractContextManager[Any] = torch.fx.experimental._config.patch(use_duck_shape=False)  # type: ignore[attr-defined]
        return patched
    return nullcontext()


_CANNOT_CAPTURE = (
    torch._dynamo.exc.Unsupported,
    torch._dynamo.exc.UserError,
    torch._dynamo.exc.TorchRuntimeError,
    GuardOnDataDependentSymNode,
)


def _with_repeated_layers(call: Any, policy_parameters: Mapping[str, Tensor], args: Any, kwargs: Any) -> Any:
    """The call, whose layers are traced once; where that fails, they are traced one by one from now on."""
    if call.layers:
        try:
            with traced_once(call.layers):
                return call(policy_parameters, *args, **kwargs)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if isinstance(error.inner_exception, (RewriteError, PolicyError)):
                raise
            log.info("layers are traced one by one: %s", error.inner_exception)
        except (torch._dynamo.exc.TorchDynamoException, GuardOnDataDependentSymNode) as error:
            log.info("layers are traced one by one: %s", error)
        call.layers = frozenset()
    return call(policy_parameters, *args, **kwargs)


def _raise_the_models_own_error(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Where the model itself refuses a call, its error is the one to see, and not that it could not be captured."""
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:
        raise error from None


def _as_own_tensor(value: Any) -> Any:
    """The same memory, not as a part of a longer tensor: Dynamo would make another graph for that one's sizes and strides.

    One row cut out of longer ones is contiguous, but keeps their stride. Token ids and their masks that are not contiguous, one
    row that is expanded, say, are copied: they are small.
    """
    if type(value) is not Tensor or value.layout != torch.strided or value.requires_grad:
        return value
    if not value.is_floating_point() and value.dim() <= 2 and not value.is_contiguous():
        return value.contiguous()
    usual = value.view(value.shape) if value.is_contiguous() else value
    return value if value._base is None and value.stride() == usual.stride() else usual.detach()
