"""`ModelWrapper`: a module in the place of a model, for libraries that were written for the model.

What the wrapper does not define is the model's: attributes, the signature of `forward`, the names in a state dict, and what
`isinstance` says. So a Trainer, a pipeline or peft, which ask a model what it is, get the model's answers.
"""

from __future__ import annotations

import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from rewriter.errors import RewriteError

OWN_PARAMETERS = "policy_parameters"
"""Under this name a state dict holds what the policy adds to the model's parameters."""


class _Forward:
    """The wrapper's `run`, with the signature of the model's `forward`. An assignment to `forward` takes its place.

    It is the same method each time that it is asked for, as libraries that replace it look for the one that they have replaced.
    """

    def __get__(self, wrapper: ModelWrapper | None, owner: type) -> Any:
        if wrapper is None:
            return owner.run  # type: ignore[attr-defined]
        own = wrapper.model.forward
        known = _FORWARDS.get(wrapper)
        if known is None or known[0] != own:
            known = _FORWARDS[wrapper] = (own, _run_like(own))
        return types.MethodType(known[1], wrapper)


_FORWARDS: weakref.WeakKeyDictionary[ModelWrapper, tuple[Any, Any]] = weakref.WeakKeyDictionary()
"""Of each wrapper the model's `forward`, and the function that stands for it."""


def _run_like(own: Any) -> Callable[..., Any]:
    def forward(self: ModelWrapper, *args: Any, **kwargs: Any) -> Any:
        return type(self).run(self, *args, **kwargs)

    for name in ("__name__", "__qualname__", "__doc__", "__module__"):
        setattr(forward, name, getattr(own, name, getattr(forward, name)))
    signature = inspect.signature(own)
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    parameters = [p.replace(name="self_") if p.name == "self" else p for p in signature.parameters.values()]
    forward.__signature__ = signature.replace(parameters=[first, *parameters])  # type: ignore[attr-defined]
    return forward


class ModelWrapper(nn.Module):
    """A module that stands for another one.

    Attributes:
        model: the module that it stands for.
    """

    model: nn.Module
    forward: Any = _Forward()

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.register_state_dict_post_hook(_without_prefix)
        self.register_load_state_dict_pre_hook(_with_prefix)
        self.register_load_state_dict_post_hook(_name_as_the_model_does)
        self.training = model.training

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What a call does."""
        return self.model(*args, **kwargs)

    @property
    def __class__(self) -> Any:
        """`isinstance(wrapper, C)` holds for the wrapper's own classes and for those of the model."""
        model = self.__dict__.get("_modules", {}).get("model")
        return type(self) if model is None else model.__class__

    @__class__.setter
    def __class__(self, new: type) -> None:
        # torch's fully_shard makes a class of its own and of ours, as it believes: the bases that it adds go before ours.
        added = tuple(base for base in new.__bases__ if base is not self.__class__)
        object.__dict__["__class__"].__set__(self, type(new.__name__, (*added, type(self)), dict(new.__dict__)))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Before the model is there, while a copy is made, say, nothing is the model's.
            if "model" not in self.__dict__.get("_modules", ()) or name.startswith("__"):
                raise
            return getattr(self.model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """What the model has and the wrapper has not is set on the model."""
        model = self.__dict__.get("_modules", {}).get("model")
        if model is None or name in self.__dict__ or name in self._own_names() or not hasattr(model, name):
            super().__setattr__(name, value)
        else:
            setattr(model, name, value)

    def _own_names(self) -> set[str]:
        declared = (name for kind in type(self).__mro__ for name in inspect.get_annotations(kind))
        return {*self._modules, *self._parameters, *self._buffers, *dir(type(self)), *declared}

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self.model)})

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The usual way compares `__class__` with the type, and these differ here.
        return _blank, (type(self),), self.__getstate__()

    def _fqn_modifiers(self) -> dict[str, str]:
        """Asked by torch.distributed.checkpoint, which would look names of the state dict up in the wrapper."""
        raise RewriteError(
            "torch.distributed.checkpoint looks parameters up by their names, which are those of the model inside; "
            "give get_state_dict, set_state_dict and the like rewriter.for_checkpoint(fast) in its place"
        )

    def _get_name(self) -> str:
        """The model's: transformers' Trainer knows by it how labels are shifted."""
        own: str = self.model._get_name()
        return own

    def __repr__(self) -> str:
        return type(self).__name__ + super().__repr__().removeprefix(self._get_name())


def _blank(kind: Any) -> Any:
    return kind.__new__(kind)


def _without_prefix(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Parameters are called as the model calls them.

    Inside another module they keep the names of `named_parameters`, which libraries look up in a state dict.
    """
    del module, metadata
    if not prefix:
        _rename(state, lambda key: key.removeprefix("model."))


def _rename(state: dict[str, Any], name: Callable[[str], str]) -> None:
    """All at once: a new name may be the old one of another entry."""
    renamed = {name(key): value for key, value in state.items()}
    state.clear()
    state.update(renamed)


def _with_prefix(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, *messages: list[str]
) -> None:
    del metadata, strict, messages
    module.__dict__["_loads_alone"] = not prefix
    if not prefix:
        _rename(state, lambda key: key if key.startswith(f"{OWN_PARAMETERS}.") else f"model.{key}")


def _name_as_the_model_does(module: nn.Module, incompatible: Any) -> None:
    """The keys that a state dict lacks, or has besides, in its own names."""
    if module.__dict__.pop("_loads_alone", False):
        for keys in incompatible:
            keys[:] = [key.removeprefix("model.") for key in keys]
