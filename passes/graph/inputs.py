"""What the placeholders of a captured graph hold."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GraphInput:
    """What a placeholder holds.

    Attributes:
        kind: "parameter" or "buffer" of the model, "argument" of the call, or "constant": a tensor from elsewhere.
        name: qualified name, or the argument's.
        value: when captured.
    """

    kind: str
    name: str
    value: Any


def kind_of(path: str) -> str:
    if "._parameters[" in path:
        return "parameter"
    if "._buffers[" in path:
        return "buffer"
    return "argument" if "._modules[" not in path and re.fullmatch(r"L(\['\w+'\])(\['[\w.]+'\])?", path) else "constant"


def readable_source(path: str) -> str:
    """What a user calls a source of Dynamo's.

    `L['kwargs']['input_ids']` -> `input_ids`; `L['args'][0]` -> `argument 0`;
    `L['model']._modules['h']._buffers['bias']` -> `h.bias`.
    """
    position = re.fullmatch(r"L\['args'\]\[(\d+)\]", path)
    if position:
        return f"argument {position[1]}"
    names = re.findall(r"\['([^']*)'\]", path)
    if "._modules[" in path or "._buffers[" in path or "._parameters[" in path:
        return ".".join(re.findall(r"\._(?:modules|buffers|parameters)\['([^']*)'\]", path))
    return names[-1] if names else path
