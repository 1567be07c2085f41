"""What the exporters' tests export: a call, and models whose weights make every key matter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import rewriter

SEPARATORS = tuple(range(3, 20))


def call() -> dict[str, Any]:
    ids = torch.randint(3, 64, (2, 9))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


def prepared(model: nn.Module, policy: rewriter.Policy) -> rewriter.OptimizedModel:
    """Weights large enough that every key matters; dynamic masks whose scores differ."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(6)
    fast = rewriter.optimize(model.eval(), policy, backend="eager", strict=True)
    for parameters in fast.policy_parameters.values():
        nn.init.uniform_(parameters["A"], -1, 1)
    return fast
