"""Models spread over processes: weights by torch, `fully_shard` (FSDP2) and tensor parallelism (`parallelize_module`), and the
tokens of a text, context parallelism.

`fully_shard(fast)` gathers all weights when an optimized model is called, and frees them after: the call in between is captured
as ever. On parts of a model it gathers them while the model runs, by hooks that no graph can hold. In tensor parallelism
weights stay DTensors, and each process computes its own heads: attention is of plain tensors, and operators on DTensors stay in a
graph as the model wrote them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rewriter.errors import RewriteError
from rewriter.kernels.context_parallel import ContextGroup
from rewriter.kernels.context_parallel import process_group

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


def check_call(context: ContextGroup, model: nn.Module, given: Mapping[str, Any]) -> None:
    """A call whose tokens are spread over processes.

    Args:
        given: its arguments, by name.

    Raises:
        RewriteError: it asks for a cache, processes are given different arguments, or nobody would bring gradients together.
    """
    if given.get("use_cache") or given.get("past_key_values") is not None:
        raise RewriteError(
            "in context parallelism each process has a part of the keys, and none a cache of all; leave use_cache and "
            "past_key_values out"
        )
    brought_together = is_gathered_by_fully_shard(model) or DistributedDataParallel._get_active_ddp_module()
    learns = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters())
    if learns and not brought_together:
        raise RewriteError(
            "in context parallelism each process has the gradients of its own tokens, and nothing here brings them together; "
            "distribute with shard=True, put DistributedDataParallel around the model, or call it under torch.no_grad()"
        )
    own = [(name, _digest(value)) for name, value in given.items()]
    own += [
        ("model and policy", f"{model._get_name()} {model.extra_repr()}"),
        ("training or evaluation", f"{model.training}, {torch.is_grad_enabled()}"),
    ]
    all_given: list[Any] = [None] * context.size
    torch.distributed.all_gather_object(all_given, own, group=process_group(context.name))
    if any(other != all_given[0] for other in all_given):
        names = sorted({name for other in all_given for name, _ in set(other) ^ set(all_given[0])})
        raise RewriteError(
            f"processes of one cp dimension take the same policy and model, and are given the same whole texts, and "
            f"{', '.join(names)} differ between them; let one process read the batch and broadcast it, or give a sampler the "
            "rank along 'dp' alone"
        )


def _digest(value: Any) -> str:
    """What tells an argument from another: of a tensor its sizes, and a sum of its values, each times a number of its place."""
    if not isinstance(value, Tensor):
        return repr(value) if isinstance(value, (bool, int, float, str, type(None))) else type(value).__name__
    flat = value.detach().flatten().double()
    places = torch.arange(1, flat.numel() + 1, device=flat.device, dtype=torch.float64)
    return f"{value.dtype} {list(value.shape)} {float((flat * torch.cos(places)).sum())!r} {float(flat.sum())!r}"
