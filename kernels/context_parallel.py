"""Context parallelism: the tokens of a text are spread over processes, and each attends with the rows that it has.

Of the keys of other processes only those travel that a row here still sees (arXiv 2310.01889 moves all of them around a ring).
Who needs which key follows from the live ranges, which every process knows of the whole text; so what is sent is agreed
without a word. Attention over the keys that are here runs while the others travel, and both are merged by their log-sum-exp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.weak
from rewriter.kernels.arguments import AttentionArguments
from rewriter.kernels.ops import empty_outputs
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class ContextGroup:
    """The processes that share the tokens of a text.

    Attributes:
        name: of the process group, as torch.distributed's functional collectives know it.
        rank, size: this process, and how many there are.
        brings_gradients_together: whether `fully_shard` sums the gradients of all of them.
        gathers_outputs: whether what the model returns for each token, logits say, is brought together in each process; each
            has those of its own tokens otherwise.
    """

    name: str
    rank: int
    size: int
    brings_gradients_together: bool = False
    gathers_outputs: bool = True

    @property
    def num_chunks(self) -> int:
        """Parts of equal length that a text is cut into; each process has two of them."""
        return 2 * self.size


def share_tokens(
    start: Sequence[Tensor], end: Sequence[Tensor], num_tokens: int, size: int, device: torch.device
) -> Tensor:
    """Which tokens each process has: as many, and with about as many pairs of query and key that see each other.

    A text is cut into two chunks for each process. Of all ways to give each process two of them, the one that pairs the dearest
    with the cheapest has the least highest cost; for a causal mask these are the first and the last. Where neighbours cost
    nearly the same, they stay together, as they see the same keys.

    Args:
        start, end: int32 `[B|1, H|1, S]` of each attention of the model whose ranges are known before it runs. Where there is
            none, the mask is taken for a causal one.
        num_tokens: S, a multiple of twice the number of processes.
        size: processes.
        device: of the result.

    Returns:
        int64 `[size, S / size]`, each row ascending.
    """
    cost = torch.zeros(num_tokens, dtype=torch.int64)  # whole numbers, that no machine rounds otherwise than another
    for first, last in zip(start, end, strict=True):
        cost += _live_pairs(first, last, num_tokens)
    if not start:
        cost = torch.arange(num_tokens)
    chunks = cost.view(2 * size, -1).sum(dim=1)
    order = chunks.argsort(stable=True)
    pairs = torch.stack((order[:size], order.flip(0)[:size]), dim=1).sort(dim=1).values
    pairs = pairs[pairs[:, 0].argsort()]
    neighbours = torch.arange(2 * size).view(size, 2)
    if 100 * int(chunks[neighbours].sum(dim=1).max()) <= _NEARLY * int(chunks[pairs].sum(dim=1).max()):
        pairs = neighbours
    within = torch.arange(num_tokens // (2 * size))
    tokens = (pairs[:, :, None] * within.numel() + within).flatten(1)
    return tokens.to(device)


_NEARLY = 102
"""Per cent of the least cost, what neighbours may cost."""


def _live_pairs(start: Tensor, end: Tensor, num_tokens: int) -> Tensor:
    """int64 `[S]`, on the CPU: 256 times the keys that each row sees, in the mean over batch and heads."""
    begins, ends = (bound.flatten(0, 1).clamp(0, num_tokens).long() for bound in torch.broadcast_tensors(start, end))
    lives = (begins < ends).long()
    change = torch.zeros(num_tokens + 1, dtype=torch.int64, device=start.device)
    change.index_add_(0, begins.flatten(), lives.flatten()).index_add_(0, ends.flatten(), -lives.flatten())
    return change.cumsum(0)[:-1].cpu() * 256 // begins.size(0)


def needed_keys(start: Tensor, end: Tensor, tokens: Tensor) -> Tensor:
    """Which keys the rows of each process see.

    Args:
        start, end: int32 `[B|1, H|1, S]`.
        tokens: int64 `[size, S / size]`, of `share_tokens`.

    Returns:
        bool `[size, B|1, H|1, S]`.
    """
    start, end = (bound.contiguous() for bound in torch.broadcast_tensors(start, end))
    rows = tokens.to(torch.int32)
    sees = [torch.searchsorted(own, end) > torch.searchsorted(own, start) for own in rows]
    return torch.stack(sees) & (start < end)


@dataclass(frozen=True)
class _Exchange:
    """Which keys leave for other processes, and where those that arrive are put. Keys are flattened, `[B * H * S]`.

    Attributes:
        own: int64 `[S / size]`, the tokens of this process.
        leaving: int64, places among this process's keys, those for the first process first.
        num_leaving: of them, for each process.
        arriving: int64, places in `[B * H * width]`, in the order of arrival.
        num_arriving: of them, from each process.
        tokens: int64 `[B * H * width]`, the token of each place, 0 where it is empty.
        is_filled: bool `[B * H * width]`.
        width: places for each row and head: the most that one of them needs.
    """

    own: Tensor
    leaving: Tensor
    num_leaving: list[int]
    arriving: Tensor
    num_arriving: list[int]
    tokens: Tensor
    is_filled: Tensor
    width: int

    @staticmethod
    def of(needed: Tensor, tokens: Tensor, num_batch: int, num_heads: int, rank: int) -> _Exchange:
        """What the process of this rank sends and gets; all agree on it, as all know what everyone needs."""
        size, own = tokens.size(0), tokens[rank]
        needed = needed.expand(size, num_batch, num_heads, -1)
        others = torch.arange(size, device=needed.device) != rank
        sent = needed[..., own] & others[:, None, None, None]
        got = needed[rank][:, :, tokens].permute(2, 0, 1, 3) & others[:, None, None, None]
        # In [B, H, sender, token] the keys of a row and head stand one after the other: there they are counted.
        per_head = got.permute(1, 2, 0, 3).flatten(2)
        place = (per_head.cumsum(dim=2) - 1).unflatten(2, (size, -1)).permute(2, 0, 1, 3)
        counts = torch.cat((sent.flatten(1).sum(dim=1), got.flatten(1).sum(dim=1), per_head.sum(dim=2).amax()[None]))
        *counted, width = counts.tolist()  # the only time that the host waits
        row = torch.arange(num_batch * num_heads, device=needed.device).view(num_batch, num_heads, 1)
        arriving = (row * width + place)[got]
        of_place = torch.zeros(num_batch * num_heads * width, dtype=torch.int64, device=needed.device)
        of_place[arriving] = tokens[:, None, None, :].expand(got.shape)[got]
        is_filled = torch.zeros_like(of_place, dtype=torch.bool)
        is_filled[arriving] = True
        leaving = (row * own.numel() + torch.arange(own.numel(), device=needed.device)).expand(sent.shape)[sent]
        return _Exchange(own, leaving, counted[:size], arriving, counted[size:], of_place, is_filled, width)


_exchanges: Any = torch.utils.weak.WeakTensorKeyDictionary()
"""By what is needed: attentions with the same ranges share it."""


def _exchange_of(needed: Tensor, tokens: Tensor, key: Tensor, rank: int) -> _Exchange:
    known: dict[Any, _Exchange] = _exchanges.setdefault(needed, {})
    kind = (key.size(0), key.size(1), rank)
    if kind not in known:
        known[kind] = _Exchange.of(needed, tokens, *kind)
    return known[kind]


def process_group(name: str) -> Any:
    """The process group of a name that functional collectives use."""
    resolve: Any = torch.distributed.distributed_c10d._resolve_process_group
    return resolve(name)


def _start_exchange(rows: Tensor, given: list[int], taken: list[int], group: Any) -> tuple[Tensor, Any]:
    """`[n, D]`, those for each process one after the other, and what waits until they are there."""
    arrived = rows.new_empty(sum(taken), rows.size(1))
    work = torch.distributed.all_to_all_single(arrived, rows, taken, given, group=group, async_op=True)
    return arrived, work


class _ContextAttention(torch.autograd.Function):
    """Attention of the rows that are here over all keys that they see."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        start: Tensor,
        end: Tensor,
        needed: Tensor,
        tokens: Tensor,
        bias: Tensor | None,
        sinks: Tensor | None,
        scale: float | None,
        softcap: float | None,
        group_name: str,
    ) -> Tensor:
        if is_fake(query):
            return empty_outputs(query, value)[0]
        group = process_group(group_name)
        exchange = _exchange_of(needed, tokens, key, group.rank())
        packed = torch.cat((key, value), dim=3).flatten(0, 2)[exchange.leaving]
        arrived, work = _start_exchange(packed, exchange.num_leaving, exchange.num_arriving, group)
        row = exchange.own
        start, end = torch.broadcast_tensors(start, end)
        settings: dict[str, Any] = {"query_index": row, "scale": scale, "softcap": softcap}
        here = AttentionArguments(
            *(query, key, value, _at(start, row), _at(end, row)),
            **settings,
            bias=None if bias is None else _at(bias, row),
            sinks=sinks,
        )
        output, lse = torch.ops.rewriter.live_range_attention(*here.astuple())
        work.wait()
        away = None
        if exchange.width:
            away = _arrived_keys(exchange, arrived, query, key, value, start, end, bias, settings)
            output, lse = _merged(output, lse, *torch.ops.rewriter.live_range_attention(*away.astuple()))
        ctx.group, ctx.exchange = group, exchange
        ctx.settings, ctx.bias_shape = (scale, softcap), None if bias is None else bias.shape
        tensors = (query, key, value, here.start, here.end, here.bias, sinks, output, lse)
        extra = () if away is None else (away.key, away.value, away.start, away.end, away.bias)
        ctx.save_for_backward(*tensors, *extra)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, start, end, bias, sinks, output, lse, *away = ctx.saved_tensors
        exchange, (scale, softcap) = ctx.exchange, ctx.settings
        no_grad_lse = torch.zeros_like(lse)

        def gradients(key: Tensor, value: Tensor, start: Tensor, end: Tensor, bias: Any, sinks: Any) -> Any:
            # With the output and the log-sum-exp of all keys: weights, and what is taken off them, are those of the whole.
            a = AttentionArguments(
                query, key, value, start, end, exchange.own, None, bias, sinks, None, scale, softcap
            ).astuple()
            return torch.ops.rewriter.live_range_attention_backward(
                grad_output, no_grad_lse, *a[:3], output, lse, *a[3:]
            )

        back, of_away = _empty_rows(key, value, 0), None
        if away:
            its_key, its_value, its_start, its_end, its_bias = away
            of_away = gradients(its_key, its_value, its_start, its_end, its_bias, None)
            back = torch.cat((of_away[1], of_away[2]), dim=3).flatten(0, 2)[exchange.arriving]
        returned, work = _start_exchange(back, exchange.num_arriving, exchange.num_leaving, ctx.group)
        grad_query, grad_key, grad_value, grad_bias, grad_sinks = gradients(key, value, start, end, bias, sinks)
        if of_away is not None:
            grad_query = grad_query + of_away[0]
        work.wait()
        total = torch.cat((grad_key, grad_value), dim=3).flatten(0, 2).to(torch.promote_types(key.dtype, torch.float32))
        first = 0
        for count in exchange.num_leaving:  # one process after the other: sums are the same in each run
            part = slice(first, first + count)
            total.index_add_(0, exchange.leaving[part], returned[part].to(total.dtype))
            first += count
        total = total.view(*key.shape[:3], -1).to(key.dtype)
        grads: list[Tensor | None] = [None] * 12
        grads[:3] = grad_query, *total.split((key.size(3), value.size(3)), dim=3)
        if ctx.bias_shape is not None and ctx.needs_input_grad[7]:
            grads[7] = _grad_of_bias(ctx.bias_shape, exchange, grad_bias, None if of_away is None else of_away[3], key)
        if sinks is not None:
            grads[8] = grad_sinks
        return tuple(grads)


def _empty_rows(key: Tensor, value: Tensor, count: int) -> Tensor:
    return key.new_empty(count, key.size(3) + value.size(3))


def _at(whole: Tensor, tokens: Tensor) -> Tensor:
    return whole.index_select(2, tokens)


def _arrived_keys(
    exchange: _Exchange,
    arrived: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor,
    end: Tensor,
    bias: Tensor | None,
    settings: dict[str, Any],
) -> AttentionArguments:
    """The keys of other processes, in as many places for each row and head; nobody sees an empty one."""
    sizes = (*key.shape[:2], exchange.width)
    rows = _empty_rows(key, value, exchange.tokens.numel()).zero_()
    rows[exchange.arriving] = arrived
    keys, values = rows.view(*sizes, -1).split((key.size(3), value.size(3)), dim=3)
    tokens = exchange.tokens.view(sizes)

    def placed(whole: Tensor) -> Tensor:
        return whole.expand(*sizes[:2], -1).gather(2, tokens)

    first, last = placed(start), placed(end)
    last = torch.where(exchange.is_filled.view(sizes), last, first)
    own_bias = None if bias is None else placed(bias)
    return AttentionArguments(query, keys.contiguous(), values.contiguous(), first, last, bias=own_bias, **settings)


def _merged(output: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from that over each."""
    total = torch.logaddexp(lse, other_lse)
    sees = total != -math.inf
    one, two = (torch.where(sees, torch.exp(part - total), 0.0)[..., None] for part in (lse, other_lse))
    return (output * one + other * two).to(output.dtype), total


def _grad_of_bias(shape: torch.Size, exchange: _Exchange, here: Tensor, away: Tensor | None, key: Tensor) -> Tensor:
    """Of the bias of all keys, by the rows that are here."""

    def summed(grad: Tensor) -> Tensor:
        dims = [dim for dim in (0, 1) if shape[dim] == 1 and grad.size(dim) > 1]
        return grad.sum(dim=dims, keepdim=True) if dims else grad

    total = here.new_zeros(*key.shape[:2], shape[2])
    if away is not None:
        filled = exchange.is_filled.view(away.shape)
        total.scatter_add_(2, exchange.tokens.view(away.shape), torch.where(filled, away, 0.0))
    return summed(total).index_add(2, exchange.own, summed(here))


class _SumOverProcesses(torch.autograd.Function):
    """The sum; its gradient is that of the sum of what all processes make of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group_name: str) -> Tensor:
        ctx.group_name = group_name
        return _all_reduced(x, group_name)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduced(grad, ctx.group_name), None


def _all_reduced(x: Tensor, group_name: str) -> Tensor:
    total = x.clone()
    if not is_fake(x):
        torch.distributed.all_reduce(total, group=process_group(group_name))
    return total


class _GatherTokens(torch.autograd.Function):
    """The tokens of all processes, in their order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, dim: int, group_name: str) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.dim, ctx.group_name = dim, group_name
        if is_fake(x):
            sizes = list(x.shape)
            sizes[dim] = sizes[dim] * tokens.size(0)
            return x.new_empty(sizes)
        moved = x.movedim(dim, 0).contiguous()
        whole = moved.new_empty(tokens.numel(), *moved.shape[1:])
        torch.distributed.all_gather_into_tensor(whole, moved, group=process_group(group_name))
        return whole.index_select(0, tokens.flatten().argsort()).movedim(0, dim).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        group = process_group(ctx.group_name)
        moved = grad.movedim(ctx.dim, 0).index_select(0, tokens.flatten()).contiguous()
        own = moved.new_empty(tokens.size(1), *moved.shape[1:])
        torch.distributed.reduce_scatter_tensor(own, moved, group=group)
        return own.movedim(0, ctx.dim), None, None, None


def _register(name: str, schema: str, function: type[torch.autograd.Function]) -> None:
    """An operator that communicates, with a backward that does; compilers leave it as it is (`rewriter.code`)."""
    _library.define(f"{name}{schema}")

    def with_gradients(*given: Any) -> Any:
        return function.apply(*given)

    def without(*given: Any) -> Any:
        with torch.no_grad():
            return function.apply(*given)

    _library.impl(name, with_gradients, "Autograd")
    for key in ("CPU", "CUDA", "Meta"):
        _library.impl(name, without, key)
    torch.library.register_fake(f"rewriter::{name}", without, lib=_library)
    OPERATORS.add(getattr(torch.ops.rewriter, name).default)


def _register_plan(name: str, function: Any, fake: Any) -> None:
    registered = torch.library.custom_op(f"rewriter::{name}", function, mutates_args=())
    registered.register_fake(fake)


OPERATORS: set[Any] = set()
"""Those that communicate."""

_library = torch.library.Library("rewriter", "FRAGMENT")
_register(
    "context_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor start, Tensor end, Tensor needed, Tensor tokens, Tensor? bias, "
    "Tensor? sinks, float? scale, float? softcap, str group) -> Tensor",
    _ContextAttention,
)
_register("sum_over_processes", "(Tensor x, str group) -> Tensor", _SumOverProcesses)
_register("gather_tokens", "(Tensor x, Tensor tokens, int dim, str group) -> Tensor", _GatherTokens)
_register_plan(
    "share_tokens",
    share_tokens,
    lambda start, end, num_tokens, size, device: torch.empty(
        size, num_tokens // size, dtype=torch.int64, device=device
    ),
)
_register_plan(
    "needed_keys",
    needed_keys,
    lambda start, end, tokens: start.new_empty(
        (tokens.size(0), *torch.broadcast_shapes(start.shape, end.shape)), dtype=torch.bool
    ),
)
