"""What the placeholders of a captured graph hold."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node


@dataclass(frozen=True)
class InputSource:
    """Where the value of a placeholder comes from.

    Attributes:
        kind: "parameter" or "buffer" of the model, "argument" of the call, or "constant": a tensor from elsewhere.
        name: qualified name, or the argument's.
    """

    kind: str
    name: str


@dataclass(frozen=True)
class GraphInput(InputSource):
    """A placeholder's source, and its value when it was captured."""

    value: Any


def is_size(value: Any) -> bool:
    """Whether what a placeholder holds is a number: inputs are tensors, and the mesh of processes of tensor parallelism."""
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat))


NOT_AN_INPUT = InputSource("", "")


def source_of(node: Node) -> InputSource:
    """The source of a captured graph's placeholder; `NOT_AN_INPUT` for any other node."""
    source: InputSource = node.meta.get("input", NOT_AN_INPUT)
    return source


def set_source(node: Node, path: str) -> InputSource:
    """Notes where a placeholder's value comes from, by Dynamo's name for it."""
    node.meta["input"] = InputSource(_kind(path), readable_source(path))
    return source_of(node)


def _kind(path: str) -> str:
    if "._parameters[" in path:
        return "parameter"
    if "._buffers[" in path:
        return "buffer"
    is_argument = re.fullmatch(r"L(\['\w+'\])(\['[\w.]+'\]|\[\d+\])*", path)
    return "argument" if "._modules[" not in path and is_argument else "constant"


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
