"""Whether a model is still as it was captured, by the guards that Dynamo made then."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch import nn
from torch.fx import GraphModule

from rewriter.errors import CacheError
from rewriter.generation.model_facts import logits_of
from rewriter.passes import CachedRewritten
from rewriter.passes import NotCacheable
from rewriter.passes.graph.inputs import is_size
from rewriter.tracing import any_input_gradients
from rewriter.tracing import guarded
from rewriter.tracing import traced_call
from rewriter.tracing import without_input_gradients


class CapturedCall:
    """A call that was captured once. It is made again to ask its guards, up to the graph, which does not run.

    Args:
        parameters: gives the policy's parameters by name, at each call.
        arguments: of the call.
        rewrite: what becomes of the graph.

    Attributes:
        result: what `rewrite` returned.
        present: what the graph was given last, in the order of its inputs.

    Raises:
        CacheError: the model cannot go on from a cache.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Callable[[], dict[str, Tensor]],
        arguments: Mapping[str, Any],
        rewrite: Callable[[GraphModule, list[Any]], CachedRewritten],
    ) -> None:
        self._model, self._parameters, self._arguments = model, parameters, dict(arguments)
        results: list[CachedRewritten] = []

        def captured(*values: Any) -> None:
            raise _GuardsHold([value for value in values if not is_size(value)])

        def changed(*values: Any) -> None:
            raise _ModelChanged

        def backend(graph: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            if results:
                return changed
            results.append(rewrite(graph, example_inputs))
            return captured

        self._call = traced_call(model, backend, logits_of)
        self._may_have_hooks = any_input_gradients(model)
        self.present: list[Any] = []
        try:
            with torch.no_grad():
                guarded(self._call, self._parameters(), (), self._arguments)
        except _GuardsHold as held:
            self.present = held.values
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if isinstance(error.inner_exception, NotCacheable):
                name = type(model).__name__
                raise CacheError(f"{name} cannot go on from a cache: {error.inner_exception}") from None
            raise
        self.result = results[0]

    @torch.no_grad()
    def holds(self) -> bool:
        """Whether the call would take the same graph.

        What Dynamo guards is all that the graph depends on: modules, hooks, modes, types, and each number that was read.
        """
        if not self._may_have_hooks and self._holds():
            return True
        # To look for hooks takes as long as the guards, so it is done only where there are some.
        with without_input_gradients(self._model):
            holds = self._holds()
        self._may_have_hooks = self._may_have_hooks or (holds and any_input_gradients(self._model))
        return holds

    def _holds(self) -> bool:
        try:
            self._call(self._parameters(), **self._arguments)
        except _GuardsHold as held:
            self.present = held.values
            return True
        except (_ModelChanged, torch._dynamo.exc.TorchDynamoException):
            pass
        return False


class _GuardsHold(Exception):
    """Raised in place of the captured graph, with what it takes besides sizes, in order."""

    def __init__(self, values: list[Any]) -> None:
        self.values = values


class _ModelChanged(Exception):
    """Raised in place of any other graph of the same model."""
