"""Models whose weights are spread over processes by torch: `fully_shard` (FSDP2), and tensor parallelism (`parallelize_module`).

`fully_shard(fast)` gathers all weights when an optimized model is called, and frees them after: the call in between is captured
as ever. On parts of a model it gathers them while the model runs, by hooks that no graph can hold. In tensor parallelism
weights stay DTensors, and each process computes its own heads: attention is of plain tensors, and operators on DTensors stay in a
graph as the model wrote them.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

_MARKS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")
_MANAGED = "_rewriter_gathered_by_fully_shard"


def let_dynamo_guard(model: nn.Module) -> None:
    """Takes off what `fully_shard` marks modules with. It is for Dynamo alone, which then takes their numbers for sizes that may
    change, those of heads too, and looks for fewer changes of the model."""
    if getattr(model, _MARKS[0], False):
        for module in model.modules():
            for mark in _MARKS:
                vars(module).pop(mark, None)
        vars(model)[_MANAGED] = True


def is_gathered_by_fully_shard(model: nn.Module) -> bool:
    """Whether `fully_shard` gathers the weights, of this model or of one that it is a part of."""
    return any(getattr(model, mark, False) for mark in (_MARKS[0], _MANAGED))


def sharded_parts(model: nn.Module) -> list[str]:
    """Names of the modules, "" for the model itself, that gather weights while it runs."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [name for name, m in model.named_modules() if isinstance(m, fsdp.FSDPModule)]


def is_dtensor(value: Any) -> bool:
    """Whether a value is a tensor in pieces on several processes."""
    tensor: Any = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(value, tensor.DTensor)


def arrived(value: Any) -> Any:
    """A value as a tensor with memory: what a collective gives is waited for."""
    collectives: Any = sys.modules.get("torch.distributed._functional_collectives")
    if collectives is None or not isinstance(value, collectives.AsyncCollectiveTensor):
        return value
    return torch.ops._c10d_functional.wait_tensor(value)


def holds_dtensors(model: nn.Module) -> bool:
    """Whether weights are in pieces now: not gathered by `fully_shard`, or each process's own in tensor parallelism."""
    return any(map(is_dtensor, model.parameters()))
