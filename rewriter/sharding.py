"""Models spread over processes: weights by torch, `fully_shard` (FSDP2) and tensor parallelism (`parallelize_module`), and the
tokens of a text, context parallelism.

`fully_shard(fast)` gathers all weights when an optimized model is called, and frees them after: the call in between is captured
as ever. On parts of a model it gathers them while the model runs, by hooks that no graph can hold;
`distribute(..., shard="layers")` does it by operators of the graph. In tensor parallelism weights stay DTensors, and each process
computes its own heads: attention is of plain tensors, and operators on DTensors stay in a graph as the model wrote them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten
from torch.utils._pytree import tree_leaves

from rewriter.errors import RewriteError
from rewriter.kernels.context_parallel import ContextGroup
from rewriter.kernels.context_parallel import process_group

_MARKS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")
_MANAGED = "_rewriter_gathered_by_fully_shard"
PIECES = "_rewriter_pieces"
"""Of a module whose parameters are in pieces: the rows of each when it is whole, the number of processes, and their group."""


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


def gathers_layers(model: nn.Module) -> bool:
    """Whether parameters are in pieces, and gathered layer by layer (`distribute(..., shard="layers")`)."""
    return any(PIECES in vars(module) for module in model.modules())


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
    """A call whose tokens are spread over processes. All of them raise, or none.

    Args:
        given: its arguments, by name.

    Raises:
        RewriteError: it asks for a cache, processes are given different arguments, or nobody would bring gradients together.
    """
    own = {name: _digest(value) for name, value in given.items()}
    own["model and policy"] = f"{model._get_name()} {model.extra_repr()}"
    own["training or evaluation"] = f"{model.training}, {torch.is_grad_enabled()}"
    group = process_group(context.name)
    all_given: list[Any] = [None] * context.size
    torch.distributed.all_gather_object(all_given, (own, _reason_against(group, context, model, given)), group=group)
    reasons = [reason for _, reason in all_given if reason is not None]
    if reasons:
        raise RewriteError(reasons[0])
    names = sorted({name for other, _ in all_given for name, _ in set(other.items()) ^ set(all_given[0][0].items())})
    if names:
        raise RewriteError(
            f"processes of one cp dimension take the same policy and model, and are given the same whole texts, and "
            f"{', '.join(names)} differ between them; let one process read the batch and broadcast it, or give a sampler the "
            "rank along 'dp' alone"
        )


def _reason_against(group: Any, context: ContextGroup, model: nn.Module, given: Mapping[str, Any]) -> str | None:
    """Why a call of this process cannot be computed with its tokens spread."""
    if given.get("use_cache") or given.get("past_key_values") is not None:
        return (
            "in context parallelism each process has a part of the keys, and none a cache of all; leave use_cache and "
            "past_key_values out"
        )
    if not torch.is_grad_enabled():
        return None
    learned = [
        n for n, value in given.items() if any(isinstance(v, Tensor) and v.requires_grad for v in tree_leaves(value))
    ]
    if learned:
        return (
            f"{', '.join(learned)} of the call require gradients, of which each process would have those of its own tokens; "
            "compute them inside of the model that is distributed, or detach them"
        )
    learns = any(parameter.requires_grad for parameter in model.parameters())
    if learns and not context.brings_gradients_together and not _is_inside_ddp(model, group):
        return (
            "in context parallelism each process has the gradients of its own tokens, and nothing here brings them together; "
            "distribute with shard=True, put DistributedDataParallel around the model, over the processes of the cp dimension at "
            "least, or call it under torch.no_grad()"
        )
    return None


def _is_inside_ddp(model: nn.Module, group: Any) -> bool:
    """Whether a DistributedDataParallel that runs now holds the model, over the processes of the group at least."""
    outer: Any = DistributedDataParallel._get_active_ddp_module()
    if outer is None or not any(part is model for part in outer.modules()):
        return False
    ranks = torch.distributed.get_process_group_ranks
    return set(ranks(group)) <= set(ranks(outer.process_group))


def _digest(value: Any) -> str:
    """What tells an argument from another: of tensors the sizes, and a sum of their words, each times a number of its place."""
    leaves, structure = tree_flatten(value)
    return f"{structure} {[_digest_of(leaf) for leaf in leaves]}"


def _digest_of(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return repr(leaf) if isinstance(leaf, (bool, int, float, str, type(None))) else type(leaf).__name__
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = leaf.detach().contiguous().flatten()
    flat = torch.view_as_real(flat).flatten() if flat.is_complex() else flat
    bits = flat.view(words[flat.element_size()]).long()
    places = torch.arange(1, bits.numel() + 1, device=bits.device) * 2654435761 + 12345
    return f"{leaf.dtype} {list(leaf.shape)} {int(((bits + 40503) * places).sum())}"
