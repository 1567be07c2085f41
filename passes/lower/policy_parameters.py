"""Trainable parameters of policies among a graph's inputs: a marker operator names them, and is erased when they are found."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx import Node


@torch.library.custom_op("rewriter::policy_parameters", mutates_args=())
def policy_parameters(parameters: Sequence[Tensor], names: str) -> None:
    """Marks the policies' parameters among a graph's inputs; erased when they are found.

    Args:
        names: of each, the number of its site and what the policy calls it, in one string: `0.W 0.A 1.W 1.A`.
    """


@policy_parameters.register_fake
def _(parameters: Sequence[Tensor], names: str) -> None:
    pass


torch.fx.node.has_side_effect(torch.ops.rewriter.policy_parameters.default)  # it has no result, and is not dead


def take_policy_parameters(module: GraphModule) -> dict[int, dict[str, Node]]:
    """The parameters by site and name; their markers are erased."""
    found: dict[int, dict[str, Node]] = {}
    for node in list(module.graph.nodes):
        if node.target is torch.ops.rewriter.policy_parameters.default:
            nodes, names = node.args
            for parameter, name in zip(nodes, names.split(), strict=True):
                layer, _, own = name.partition(".")
                found.setdefault(int(layer), {})[own] = parameter
            module.graph.erase_node(node)
    return found
