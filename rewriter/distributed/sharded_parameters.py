"""Parameters in pieces, gathered layer by layer: `distribute(..., shard="layers")`.

Each parameter becomes a DTensor, some of its rows in each process, as FSDP2 makes them: optimizers, gradient clipping and
checkpoints take it so. Where the model reads it, it is gathered by an operator, `rewriter::all_gather_parameters`, which a graph
can hold, unlike FSDP2's hooks (SimpleFSDP, arXiv 2411.00284). `passes/lower/sharded_parameters.py` joins those of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from typing import Any

import torch
from torch import nn

from rewriter.errors import RewriteError
from rewriter.optimized_model import OptimizedModel
from rewriter.sharding import PIECES
from rewriter.sharding import is_dtensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard_parameters(model: nn.Module, mesh: DeviceMesh) -> None:
    """Leaves some rows of each parameter in each process of a mesh of one dimension; they must be the same in all before.

    Raises:
        RewriteError: a parameter has no rows, or is of a class of its own; nothing is changed then.
    """
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor import distribute_tensor

    for path, own in model.named_parameters():
        if is_dtensor(own.data):
            raise RewriteError(
                f"{path} is in pieces already; distribute an optimized model once, and not after fully_shard"
            )
        if own.dim() == 0:
            raise RewriteError(
                f"{path} is a single number, which has no rows to share; give it the shape [1], or shard=True"
            )
        if type(own.data) is not torch.Tensor:
            raise RewriteError(
                f"{path} is a {type(own.data).__name__}; parameters are shared among processes as plain tensors: share "
                "them before other libraries take them apart"
            )
    group = mesh.get_group().group_name
    known: dict[nn.Parameter, nn.Parameter] = {}  # one that several modules have stays one
    for module in model.modules():
        rows = {}
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in known:
                piece = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
                known[parameter] = nn.Parameter(piece, requires_grad=parameter.requires_grad)
            rows[name] = parameter.size(0)
            module._parameters[name] = known[parameter]
        if rows:
            vars(module)[PIECES] = (rows, mesh.size(), group)
            module.__class__ = _reading_whole(type(module), tuple(rows))


@contextmanager
def whole_parameters(fast: OptimizedModel) -> Iterator[None]:
    """Inside, each process of `distribute(fast, mesh, shard="layers")` has all parameters whole: to generate, or to save.

        with rewriter.whole_parameters(fast):
            fast.generate(ids, max_new_tokens=20)
            fast.save_pretrained(folder)

    All processes enter it together. They must have room for the whole model. Parameters are frozen inside, as what is changed
    there would be lost after it.

    Args:
        fast: an optimized model; one without parameters in pieces stays as it is.
    """
    changed: list[tuple[nn.Module, dict[str, Any], type[nn.Module], Any]] = []
    whole: dict[nn.Parameter, nn.Parameter] = {}
    try:
        for module in fast.modules():
            if PIECES not in vars(module):
                continue
            changed.append((module, dict(module._parameters), type(module), vars(module).pop(PIECES)))
            module.__class__ = type(module).__bases__[0]
            for name, parameter in module._parameters.items():
                if parameter is not None and is_dtensor(parameter):
                    if parameter not in whole:
                        gathered: Any = parameter.detach()
                        whole[parameter] = nn.Parameter(gathered.full_tensor(), requires_grad=False)
                    module._parameters[name] = whole[parameter]
        yield
    finally:
        for module, parameters, kind, pieces in changed:
            module._parameters.update(parameters)
            module.__class__ = kind
            vars(module)[PIECES] = pieces


_classes: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def _reading_whole(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The class, whose parameters of these names are gathered when they are read; one for all layers, which are then alike."""
    if (kind, names) not in _classes:
        properties = {name: property(_reader(name)) for name in names}
        _classes[kind, names] = type(f"Sharded{kind.__name__}", (kind,), properties)
    return _classes[kind, names]


def _reader(name: str) -> Any:
    def read(module: nn.Module) -> Any:
        parameter: Any = module._parameters[name]
        if not is_dtensor(parameter):  # assigned later on
            return parameter
        rows, processes, group = getattr(module, PIECES)
        return torch.ops.rewriter.all_gather_parameters([parameter.to_local()], [rows[name]], processes, group)[0]

    return read
