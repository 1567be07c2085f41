"""`optimize` and `explain`: a model in, the same model with its attention rewritten, and a report.

The rewritten model is compiled at its first call, by `torch.compile` with the passes in front of the backend. It is
captured as one graph; a model that cannot be is an error, because a part left to run as it was would silently ignore
the policy.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import nn
from torch.fx import GraphModule

from rewriter.passes import PolicyError
from rewriter.passes import Rewritten
from rewriter.passes import rewrite
from rewriter.policies import Exact
from rewriter.policies import Policy
from rewriter.report import Report

BACKENDS = ("inductor", "eager")


class RewriteError(RuntimeError):
    """A model cannot be rewritten as asked; the message says why and what to do."""


def optimize(
    model: nn.Module,
    policy: Policy | None = None,
    *,
    backend: str = "inductor",
    strict: bool = False,
    example_inputs: Mapping[str, Any] | Sequence[Any] | None = None,
    dump: str | Path | None = None,
) -> OptimizedModel:
    """Wraps a model so that its attention runs over live ranges. The model itself is not changed.

    Args:
        model: any module whose forward can be captured as one graph.
        policy: which keys live how long; `Exact()` when left out, which loses nothing.
        backend: "inductor" generates code, "eager" runs the rewritten graph as it is.
        strict: raise when any attention site is refused.
        example_inputs: keyword arguments (a mapping) or positional ones to capture the model with now; otherwise it is
            captured at its first call.
        dump: folder for the graph before and after each pass.

    Raises:
        RewriteError: the model is optimized already, the backend is unknown, or (when captured) no attention is found,
            a site is refused and `strict` is set, or the model is not one graph.
        PolicyError: the policy cannot be applied to the inputs.
    """
    _check_model(model)
    if policy is not None and not isinstance(policy, Policy):
        raise PolicyError(f"policy must be a policy such as SlidingWindow(256), got {policy!r}")
    if backend not in BACKENDS:
        raise RewriteError(f"backend {backend!r} is not known; choose one of {', '.join(BACKENDS)}")
    optimized = OptimizedModel(
        model, policy or Exact(), backend=backend, strict=strict, dump=None if dump is None else Path(dump)
    )
    if example_inputs is not None:
        positional, named = _arguments(example_inputs)
        with torch.no_grad():
            optimized(*positional, **named)
    return optimized


def explain(model: nn.Module, *args: Any, policy: Policy | None = None, **kwargs: Any) -> Report:
    """What `optimize` would do to a call `model(*args, **kwargs)`; nothing is changed and no code is generated."""
    _check_model(model)
    report = Report()

    def analyse(graph: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        report.add(rewrite(graph, example_inputs, policy or Exact(), replace=False))
        return graph.forward

    with torch.no_grad():
        _guarded(_compiled(model, analyse), args, kwargs)
    return report


class OptimizedModel(nn.Module):
    """A model with rewritten attention; built by `optimize`. Same signature, parameters and training behaviour.

    Attributes:
        model: the original, whose parameters are shared.
        policy: the policy it was built with.
        report: every attention site, rewritten or refused, and why; filled at the first call.
    """

    def __init__(self, model: nn.Module, policy: Policy, *, backend: str, strict: bool, dump: Path | None) -> None:
        super().__init__()
        self.model = model
        self.policy = policy
        self.backend = backend
        self.strict = strict
        self.dump = dump
        self.report = Report()
        self.training = model.training
        self._constants: dict[str, tuple[Tensor, int]] = {}
        self._call = _compiled(model, self._backend)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns for the same arguments, under the policy."""
        if any(not _unchanged(self.model.get_buffer(name), *known) for name, known in self._constants.items()):
            # A proof has read this buffer's values; they are others now, so the proof is made anew.
            self._constants.clear()
            self._call = _compiled(self.model, self._backend)
        return _guarded(self._call, args, kwargs)

    def _backend(self, graph: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        result = rewrite(graph, example_inputs, self.policy, dump=self.dump)
        self._check(result)
        self.report.add(result)
        for name in result.constants:
            buffer = self.model.get_buffer(name)
            self._constants[name] = (buffer, buffer._version)
        if self.backend == "eager":
            return result.module
        from torch._inductor.compile_fx import compile_fx

        compiled: Any = compile_fx(result.module, example_inputs)
        return compiled

    def _check(self, result: Rewritten) -> None:
        if not result.sites:
            raise RewriteError(
                f"no attention found in {type(self.model).__name__}: neither a scaled_dot_product_attention nor a softmax "
                "of a product of activations; there is nothing to rewrite"
            )
        refused = [plan for plan in result.sites if plan.site.reason is not None]
        if self.strict and refused:
            reasons = "; ".join(f"site {p.layer} ({p.site.module_path or '-'}): {p.site.reason}" for p in refused)
            raise RewriteError(f"{len(refused)} of {len(result.sites)} attention sites are refused: {reasons}")

    def extra_repr(self) -> str:
        return f"policy={self.policy}, backend={self.backend!r}"


def _compiled(model: nn.Module, backend: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    # Dynamo keeps what it compiles with the code object and gives up after some entries: each model gets its own.
    own = types.FunctionType(call.__code__.replace(), call.__globals__, "call", None, call.__closure__)
    return torch.compile(own, backend=backend, dynamic=True, fullgraph=True)


def _guarded(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls a compiled model; errors of the passes come out as they are, those of capture with what to do."""
    try:
        with torch._dynamo.config.patch(specialize_float=True):
            return call(*args, **kwargs)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if isinstance(error.inner_exception, (RewriteError, PolicyError)):
            raise error.inner_exception from None
        raise
    except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError) as error:
        raise RewriteError(
            f"the model cannot be captured as one graph, and a part left as it was would ignore the policy: {error}"
        ) from error


def _unchanged(buffer: Tensor, known: Tensor, version: int) -> bool:
    return buffer is known and buffer._version == version


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise RewriteError(f"expected a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, OptimizedModel):
            where = f"its part {name!r}" if name else "it"
            raise RewriteError(
                f"{where} is optimized already; optimize the original model (.model) once, with one policy"
            )


def _arguments(example_inputs: Mapping[str, Any] | Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    return tuple(example_inputs), {}
