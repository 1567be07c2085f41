"""Parameters in pieces: each process holds some rows of each, and all are brought together where the model needs them.

As in ZeRO's third stage (arXiv 1910.02054) and FSDP2. Here bringing them together is an operator of the graph, as in SimpleFSDP
(arXiv 2411.00284), and its backward brings gradients together. A compiler may then do it again in the backward, in place of
keeping whole parameters until then, and start it before its result is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rewriter.kernels.context_parallel import process_group
from torch import Tensor


def num_rows(rows: int, processes: int) -> int:
    """Rows of the largest piece; others are filled up to it while they travel. torch.chunk cuts so, and so do DTensors."""
    return -(-rows // processes)


def all_gather_start(pieces: Sequence[Tensor], rows: Sequence[int], processes: int, group: str) -> Tensor:
    """Sends this process's pieces to all others; `all_gather_wait` takes what is returned."""
    own = torch.cat([_filled(piece, num_rows(n, processes)).flatten() for piece, n in zip(pieces, rows, strict=True)])
    return torch.ops._c10d_functional.all_gather_into_tensor(own, processes, group)


def all_gather_wait(sent: Tensor, pieces: Sequence[Tensor], rows: Sequence[int], processes: int) -> list[Tensor]:
    """The whole parameters, of the pieces that were given to `all_gather_start`."""
    parts = torch.ops._c10d_functional.wait_tensor(sent).view(processes, -1)
    whole, first = [], 0
    for piece, n in zip(pieces, rows, strict=True):
        sizes = (num_rows(n, processes), *piece.shape[1:])
        length = sizes[0] * piece.shape[1:].numel()
        filled = piece.new_empty(processes, *sizes)
        filled.flatten(1).copy_(parts[:, first : first + length])
        whole.append(filled.flatten(0, 1)[:n])
        first += length
    return whole


def reduce_scatter_start(gradients: Sequence[Tensor], processes: int, group: str) -> Tensor:
    """Sends gradients of whole parameters to the processes that hold the rows; `reduce_scatter_wait` takes what is returned."""
    filled = [_filled(grad, processes * num_rows(grad.size(0), processes)) for grad in gradients]
    for_each = torch.cat([grad.reshape(processes, -1) for grad in filled], dim=1)
    mean = (for_each / processes).flatten()
    return torch.ops._c10d_functional.reduce_scatter_tensor(mean, "sum", processes, group)


def reduce_scatter_wait(sent: Tensor, gradients: Sequence[Tensor], processes: int, group: str) -> list[Tensor]:
    """The mean over all processes, of the rows that this one holds."""
    own = torch.ops._c10d_functional.wait_tensor(sent)
    rank, pieces, first = process_group(group).rank(), [], 0
    for grad in gradients:
        rows = num_rows(grad.size(0), processes)
        length = rows * grad.shape[1:].numel()
        piece = own[first : first + length].view(rows, *grad.shape[1:])
        pieces.append(piece[: _own_rows(grad.size(0), processes, rank)].clone())
        first += length
    return pieces


def all_gather_parameters(pieces: Sequence[Tensor], rows: Sequence[int], processes: int, group: str) -> list[Tensor]:
    """Whole parameters from the pieces that each process has; gradients are the mean over the processes.

    Args:
        pieces: of this process, each `[n, ...]`, all of one dtype; n is that of `torch.chunk`, and may be 0.
        rows: of each whole parameter.
        processes: of the group.
        group: its name, as functional collectives know it.

    Returns:
        Each `[rows, ...]`.
    """
    return all_gather_wait(all_gather_start(pieces, rows, processes, group), pieces, rows, processes)


def reduce_scatter_gradients(gradients: Sequence[Tensor], processes: int, group: str) -> list[Tensor]:
    """The backward of `all_gather_parameters`."""
    return reduce_scatter_wait(reduce_scatter_start(gradients, processes, group), gradients, processes, group)


def _own_rows(rows: int, processes: int, rank: int) -> int:
    most = num_rows(rows, processes)
    return max(0, min(most, rows - rank * most))


def _filled(rows: Tensor, count: int) -> Tensor:
    missing = count - rows.size(0)
    return rows if missing == 0 else torch.cat((rows, rows.new_zeros(missing, *rows.shape[1:])))


def _whole_fakes(pieces: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
    return [piece.new_empty(n, *piece.shape[1:]) for piece, n in zip(pieces, rows, strict=True)]


def _fake_pieces(gradients: Sequence[Tensor], processes: int, group: str) -> list[Tensor]:
    rank = process_group(group).rank()
    return [grad.new_empty(_own_rows(grad.size(0), processes, rank), *grad.shape[1:]) for grad in gradients]


def _elements(shapes: Sequence[Sequence[int]], processes: int) -> int:
    """Of all pieces of one process together, filled up."""
    return sum(num_rows(shape[0], processes) * torch.Size(shape[1:]).numel() for shape in shapes)


def _fake_gather_start(pieces: Sequence[Tensor], rows: Sequence[int], processes: int, group: str) -> Tensor:
    shapes = [(n, *piece.shape[1:]) for piece, n in zip(pieces, rows, strict=True)]
    return pieces[0].new_empty(processes * _elements(shapes, processes))


def _fake_scatter_start(gradients: Sequence[Tensor], processes: int, group: str) -> Tensor:
    return gradients[0].new_empty(_elements([grad.shape for grad in gradients], processes))


def _keep_for_backward(ctx: Any, inputs: Any, output: Any) -> None:
    pieces, rows, ctx.processes, ctx.group = inputs
    ctx.shapes = [(n, *piece.shape[1:]) for piece, n in zip(pieces, rows, strict=True)]
    ctx.options = {"dtype": pieces[0].dtype, "device": pieces[0].device}


def _backward(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, None, None, None]:
    whole = [
        torch.zeros(shape, **ctx.options) if grad is None else grad
        for grad, shape in zip(gradients, ctx.shapes, strict=True)
    ]
    return torch.ops.rewriter.reduce_scatter_gradients(whole, ctx.processes, ctx.group), None, None, None


def _register(function: Any, fake: Any) -> Any:
    registered = torch.library.custom_op(f"rewriter::{function.__name__}", function, mutates_args=())
    registered.register_fake(fake)
    return registered


_register(all_gather_parameters, lambda pieces, rows, processes, group: _whole_fakes(pieces, rows)).register_autograd(
    _backward, setup_context=_keep_for_backward
)
_register(reduce_scatter_gradients, _fake_pieces)
_register(all_gather_start, _fake_gather_start)
_register(all_gather_wait, lambda sent, pieces, rows, processes: _whole_fakes(pieces, rows))
_register(reduce_scatter_start, _fake_scatter_start)
_register(reduce_scatter_wait, lambda sent, gradients, processes, group: _fake_pieces(gradients, processes, group))

ALL_GATHER = torch.ops.rewriter.all_gather_parameters.default
REDUCE_SCATTER = torch.ops.rewriter.reduce_scatter_gradients.default
