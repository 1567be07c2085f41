"""`PerLayer`: a policy for each attention site."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Any
from typing import ClassVar

from rewriter.errors import PolicyError
from rewriter.passes.policy import Policy


@dataclass(frozen=True)
class PerLayer(Policy):
    """A policy for each attention site, numbered from 0 in the order of the model.

    Args:
        layers: keys are numbers (`0`), ranges with both ends (`"1-8"`), or `"default"` for all sites that no other key names.

    Raises:
        PolicyError: a key is none of these, or names a site twice; at the first call, when it names a site that the model does
            not have, or the model has one that no key names.
    """

    needs_causal: ClassVar[bool] = False

    layers: Mapping[int | str, Policy]

    def __post_init__(self) -> None:
        by_layer: dict[int, Policy] = {}
        default: Policy | None = None
        for key, policy in self.layers.items():
            if not isinstance(policy, Policy):
                raise PolicyError(f"PerLayer: the policy of {key!r} is {policy!r}, expected a policy such as Exact()")
            if isinstance(policy, PerLayer):
                raise PolicyError(f"PerLayer: the policy of {key!r} is itself a PerLayer")
            if policy.is_program:
                raise PolicyError(f"PerLayer: the policy of {key!r} is a program for the whole model, {policy}")
            if key == "default":
                default = policy
                continue
            for layer in layer_numbers(key):
                if layer in by_layer:
                    raise PolicyError(f"PerLayer: layer {layer} is named twice")
                by_layer[layer] = policy
        object.__setattr__(self, "_by_layer", by_layer)
        object.__setattr__(self, "_default", default)

    @property
    def adds_parameters(self) -> bool:  # type: ignore[override]
        return any(part.adds_parameters for part in self.parts())

    @property
    def is_lossless(self) -> bool:  # type: ignore[override]
        return all(part.is_lossless for part in self.parts())

    def __hash__(self) -> int:
        return hash((tuple(sorted(self._by_layer.items(), key=lambda item: item[0])), self._default))

    def for_layer(self, layer: int) -> Policy:
        policy = self._by_layer.get(layer, self._default)
        if policy is None:
            raise PolicyError(f'PerLayer says nothing of layer {layer}; add "default": Exact(), or another policy')
        return policy

    def keeps_all(self, length: int) -> bool:
        return all(part.keeps_all(length) for part in self.parts())

    def check_sites(self, num_sites: int) -> None:
        missing = sorted(layer for layer in self._by_layer if num_sites and layer >= num_sites)
        if missing:
            raise PolicyError(
                f"PerLayer names layer {missing[0]}, and the model's attention sites are 0 to {num_sites - 1}; "
                "explain(model, ...) lists them"
            )
        for layer in range(num_sites):
            self.for_layer(layer)

    def parts(self) -> tuple[Policy, ...]:
        return (*self._by_layer.values(), *([] if self._default is None else [self._default]))

    def to_dict(self) -> dict[str, Any]:
        return {"policy": "PerLayer", "layers": {str(k): p.to_dict() for k, p in self.layers.items()}}

    @classmethod
    def _build(cls, fields: dict[str, Any]) -> PerLayer:
        layers = fields.get("layers", {})
        return cls({int(k) if str(k).isdigit() else k: Policy.from_dict(v) for k, v in layers.items()})

    _by_layer: dict[int, Policy] = field(init=False, repr=False, compare=False)
    _default: Policy | None = field(init=False, repr=False, compare=False)


def layer_numbers(key: int | str, of: str = "PerLayer", examples: str = '3, "1-8" or "default"') -> Sequence[int]:
    """The attention sites that a user means by `3` or `"1-8"`.

    Raises:
        PolicyError: neither, in the words of the policy `of`.
    """
    if isinstance(key, int) and not isinstance(key, bool) and key >= 0:
        return (key,)
    if isinstance(key, str):
        low, dash, high = key.partition("-")
        if low.isdigit() and (high.isdigit() if dash else True):
            first, last = int(low), int(high) if dash else int(low)
            if first <= last:
                return range(first, last + 1)
    raise PolicyError(f"{of}: {key!r} is not a layer; write {examples}")
