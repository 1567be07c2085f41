"""Pipeline parallelism: `plan_stages` says where a model is cut for unlike devices, `stage` makes a `PipelineStage` of a part.

The masks of the whole model are proven first, and each stage has their live ranges: a layer under a window or separators costs
less than a dense one, and the cut is made by what is left.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_map_only

from rewriter.code import all_guards
from rewriter.errors import RewriteError
from rewriter.generation.model_facts import takes_use_cache
from rewriter.optimized_model import OptimizedModel
from rewriter.passes import ExampleSequence
from rewriter.passes import Explained
from rewriter.passes import Layer
from rewriter.passes import cut
from rewriter.passes import layers_of_graph
from rewriter.passes import sizes_of_row
from rewriter.tracing import explain_output

if TYPE_CHECKING:
    from torch.distributed.pipelining import PipelineStage

BACKWARD = 2
"""A backward computes two products for each one of the forward."""

COPIES = 4
"""Of parameters while a model is trained by Adam: they themselves, gradients, and two moments."""


@dataclass(frozen=True)
class Device:
    """What a stage runs on.

    Attributes:
        flops: operations per second that it reaches in the model's layers. What counts is how devices compare.
        bandwidth: bytes per second to the device of the next stage.
        memory: bytes for parameters, gradients, Adam's moments and what is kept for the backward.
    """

    flops: float
    bandwidth: float = math.inf
    memory: float = math.inf


@dataclass(frozen=True)
class StagePlan:
    """Where a model is cut, and what is predicted of that.

    Attributes:
        devices: of the stages, in order.
        firsts: of each stage its first layer.
        layers: all of them, with their costs for one row of `length` tokens.
        length: tokens of a row.
        rows: of a microbatch.
        microbatches: of a step.
        example_inputs: of the call that the model is traced with.
    """

    devices: tuple[Device, ...]
    firsts: tuple[int, ...]
    layers: tuple[Layer, ...]
    length: int
    rows: int
    microbatches: int
    example_inputs: Mapping[str, Any] = dataclasses.field(repr=False, compare=False)

    def layers_of(self, stage: int) -> range:
        return range(*(*self.firsts, len(self.layers))[stage : stage + 2])

    @property
    def seconds(self) -> tuple[float, ...]:
        """Of each stage, for one microbatch, forward and backward, with what it sends in both."""
        return tuple(
            _seconds(self.layers, self.layers_of(n), device, self.rows) for n, device in enumerate(self.devices)
        )

    @property
    def bytes_held(self) -> tuple[float, ...]:
        """Of each stage: its parameters four times, and what microbatches on their way keep for the backward (1F1B)."""
        return tuple(
            _bytes_held(self.layers, self.layers_of(n), self.rows * min(len(self.devices) - n, self.microbatches))
            for n in range(len(self.devices))
        )

    @property
    def step_seconds(self) -> float:
        """Of all microbatches under 1F1B: the slowest stage takes them one after the other, once the first has come to it."""
        return sum(self.seconds) + (self.microbatches - 1) * max(self.seconds)

    def table(self) -> Table:
        share = sum(self.seconds) / (len(self.seconds) * self.step_seconds) * self.microbatches
        title = f"{len(self.devices)} stages, {self.microbatches} microbatches of {self.rows} x {self.length:,} tokens"
        shown = Table(title=f"{title}: busy {share:.0%} of the time", title_justify="left")
        for column in ("stage", "layers", "of the slowest", "attention", "memory", "sends"):
            shown.add_column(column, justify="left" if column == "layers" else "right")
        for n, (seconds, held) in enumerate(zip(self.seconds, self.bytes_held, strict=True)):
            own = [self.layers[place] for place in self.layers_of(n)]
            attention = sum(layer.attention_flops for layer in own)
            sent = own[-1].output_bytes * self.rows if n + 1 < len(self.devices) else 0
            shown.add_row(
                str(n),
                own[0].path if len(own) == 1 else f"{own[0].path} to {own[-1].path}",
                f"{seconds / max(self.seconds):.2f}",
                f"{attention / sum(layer.attention_flops + layer.matmul_flops for layer in own):.0%}",
                f"{held / 2**20:,.1f} MiB",
                f"{sent / 2**20:,.1f} MiB",
            )
        return shown

    def __str__(self) -> str:
        console = Console(width=120, force_terminal=False)
        with console.capture() as captured:
            console.print(self.table())
        return captured.get()


def plan_stages(
    fast: OptimizedModel,
    devices: Sequence[Device | float],
    *,
    length: int,
    rows: int = 1,
    microbatches: int | None = None,
    example_inputs: Mapping[str, Any] | None = None,
) -> StagePlan:
    """Cuts a model between layers so that the slowest stage is as fast as it can be, within each device's memory.

    What a layer costs is its products with weights, and the pairs of query and key that are alive under the policy; the optimum
    is found by dynamic programming over the places between layers. The model may be on the meta device.

    Args:
        fast: of `optimize`, with at least as many layers as devices.
        devices: in the order of the stages; a number is a device's speed alone.
        length: tokens of a row.
        rows: of a microbatch.
        microbatches: of a step; four times as many as stages when left out.
        example_inputs: the arguments of a call, by name, as stages will be called, with short texts: token ids alone when left
            out. Stages that were traced for two rows serve any number from two on, and all serve any length.

    Raises:
        RewriteError: there are fewer layers than devices, a site is refused, or no cut fits into the memory.
        PolicyError: as the model's call.
    """
    wanted = tuple(d if isinstance(d, Device) else Device(float(d)) for d in devices)
    if not wanted or not all(device.flops > 0 and device.bandwidth > 0 for device in wanted):
        raise RewriteError(f"devices have a speed and a bandwidth above 0, got {list(devices)}")
    if length < 1 or rows < 1 or (microbatches is not None and microbatches < 1):
        raise RewriteError(f"length, rows and microbatches are 1 or more, got {length}, {rows} and {microbatches}")
    if example_inputs is None:
        example_inputs = {"input_ids": torch.zeros(rows, 32, dtype=torch.int64, device=fast._device)}
    layers = tuple(_layers(_traced(fast, example_inputs, length), length))
    if len(layers) < len(wanted):
        raise RewriteError(f"{len(wanted)} stages need as many layers, and the model has {len(layers)}")
    count = 4 * len(wanted) if microbatches is None else microbatches
    firsts = _best_cut(layers, wanted, rows, count)
    return StagePlan(wanted, firsts, layers, length, rows, count, dict(example_inputs))


def stage(fast: OptimizedModel, plan: StagePlan, rank: int, *, group: Any = None) -> PipelineStage:
    """The part of a model that one process computes, for torch's schedules.

        part = rewriter.stage(fast, plan, rank)
        schedule = torch.distributed.pipelining.Schedule1F1B(part, plan.microbatches, loss_fn=loss)
        optimizer = torch.optim.AdamW(part.submod.parameters())
        schedule.step(input_ids=ids, target=labels)  # every process is given the same call

    The last stage returns the model's logits, or its output where that is a tensor.

    Args:
        fast: as it was planned for.
        plan: of `plan_stages`.
        rank: of the stage, from 0.
        group: the processes of the stages; all when left out.

    Raises:
        RewriteError: there is no such stage, a site is refused, or a parameter is needed by two stages.
    """
    from torch.distributed.pipelining import PipelineStage

    parts = _parts(fast, plan)
    if not 0 <= rank < len(parts):
        raise RewriteError(f"the plan has stages 0 to {len(parts) - 1}, got {rank}")
    part = parts[rank]
    device = next(p.device for p in part.parameters())
    if fast.backend != "eager":
        part.compile(dynamic=True, fullgraph=True)
    return PipelineStage(part, rank, len(parts), device, group=group)


def _traced(fast: OptimizedModel, example_inputs: Mapping[str, Any], length: int) -> Explained:
    given = dict(example_inputs)
    if takes_use_cache(fast.model):
        given["use_cache"] = False
    if any(p.is_meta for p in fast.model.parameters()):
        given = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), given)
    parameters = dict(fast.policy_parameters.named_parameters(remove_duplicate=False))
    values = {name: value for name, value in example_inputs.items() if isinstance(value, Tensor)}
    result = explain_output(
        fast.model, fast.policy, parameters, given, ExampleSequence(length, values), kernel=fast.kernel
    )
    refused = [plan for plan in result.sites if plan.reason is not None]
    if refused:
        raise RewriteError(
            f"{len(refused)} of {len(result.sites)} attention sites are refused, and a stage would keep their masks: site "
            f"{refused[0].layer} ({refused[0].site.module_path or '-'}): {refused[0].reason}"
        )
    inputs = tuple(
        dataclasses.replace(i, kind="parameter", name=f"policy_parameters.{i.name}") if i.name in parameters else i
        for i in result.inputs
    )
    return dataclasses.replace(result, inputs=inputs)


def _layers(result: Explained, length: int) -> list[Layer]:
    sizes = sizes_of_row(result.sites[0], length)
    flops = {site: prediction.flops for site, prediction in result.predictions.items()}
    return layers_of_graph(result.module, result.sites, flops, result.inputs, sizes)


def _parts(fast: OptimizedModel, plan: StagePlan) -> list[GraphModule]:
    result = _traced(fast, plan.example_inputs, plan.length)
    fast._take(result)
    parts = cut(result.module, result.inputs, result.sites, plan.firsts)
    owners: dict[int, int] = {}
    for number, part in enumerate(parts):
        for name, parameter in part.named_parameters():
            if owners.setdefault(id(parameter), number) != number:
                raise RewriteError(
                    f"{name} is a parameter of stages {owners[id(parameter)]} and {number}, whose gradients no schedule brings "
                    "together; untie it (config.tie_word_embeddings=False), or let one stage have both its places"
                )
    check = _SizeCheck(result)
    for part in parts:
        part.train(fast.model.training)
        part.register_forward_pre_hook(check, with_kwargs=True)
    return parts


class _SizeCheck:
    """Raises where a stage is called with sizes that its graph was not traced for; lays its arguments out as they were then."""

    def __init__(self, result: Explained) -> None:
        placeholders = [n for n in result.module.graph.nodes if n.op == "placeholder"]
        held = [n for n in placeholders if not isinstance(n.meta["val"], (int, float, torch.SymInt, torch.SymFloat))]
        arguments = {i.name: n.meta["val"] for n, i in zip(held, result.inputs, strict=True) if i.kind == "argument"}
        self.fakes = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        sizes: list[Any] = [size for fake in self.fakes.values() for size in fake.shape]
        symbols = [size for size in sizes if isinstance(size, torch.SymInt)]
        self.shape_env = symbols[0].node.shape_env if symbols else None
        self.guards = None if self.shape_env is None else all_guards(self.shape_env, list(self.fakes.values()))

    @torch.compiler.disable
    def __call__(self, module: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        missing = sorted(self.fakes.keys() ^ {name for name, value in kwargs.items() if isinstance(value, Tensor)})
        if missing:
            raise RewriteError(
                f"stages are called with {', '.join(sorted(self.fakes))}, as in example_inputs of plan_stages, in every process; "
                f"differing: {', '.join(missing)}"
            )
        for name, fake in self.fakes.items():
            own, traced = list(kwargs[name].shape), list(fake.shape)
            fits = len(own) == len(traced) and all(
                isinstance(size, torch.SymInt) or size == n for n, size in zip(own, traced, strict=True)
            )
            if not fits or (self.guards and not self._holds(kwargs)):
                raise RewriteError(
                    f"{name} of sizes {own} is no call that the stages were traced for, {traced}, where symbols are two and "
                    "more; give plan_stages example_inputs of as many rows as a microbatch has"
                )
        return args, {name: value.contiguous() if name in self.fakes else value for name, value in kwargs.items()}

    def _holds(self, kwargs: Mapping[str, Any]) -> bool:
        assert self.shape_env is not None
        sizes = [torch.empty(kwargs[name].shape, device="meta") for name in self.fakes]
        return bool(self.shape_env.evaluate_guards_expression(self.guards, sizes))


def _seconds(layers: Sequence[Layer], own: range, device: Device, rows: int) -> float:
    flops = sum(layers[n].matmul_flops + layers[n].attention_flops for n in own) * (1 + BACKWARD)
    sent = 2 * layers[own[-1]].output_bytes if own.stop < len(layers) else 0
    return rows * (flops / device.flops + sent / device.bandwidth)


def _bytes_held(layers: Sequence[Layer], own: range, rows: int) -> float:
    return sum(COPIES * layers[n].parameter_bytes + rows * layers[n].activation_bytes for n in own)


def _best_cut(layers: Sequence[Layer], devices: Sequence[Device], rows: int, microbatches: int) -> tuple[int, ...]:
    """Of each stage the first layer, so that the slowest stage takes the least time; of equal ones, the sum of all.

    Raises:
        RewriteError: no cut fits into the memory.
    """
    count = len(layers)

    def cost(first: int, last: int, stage: int) -> float:
        own, device = range(first, last), devices[stage]
        on_their_way = min(len(devices) - stage, microbatches)
        if _bytes_held(layers, own, rows * on_their_way) > device.memory:
            return math.inf
        return _seconds(layers, own, device, rows)

    # Of the first n layers on the first stages: the slowest one's time, all times, and where each begins.
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for stage in range(len(devices)):
        found = {}
        for last in range(stage + 1, count - len(devices) + stage + 2):
            ways = []
            for first, (slowest, total, firsts) in best.items():
                if first < last and (own := cost(first, last, stage)) < math.inf:
                    ways.append((max(slowest, own), total + own, (*firsts, first)))
            if ways:
                found[last] = min(ways)
        best = found
    if count not in best:
        needed = _bytes_held(layers, range(count), rows)
        raise RewriteError(
            f"no cut of {count} layers fits into the memory of {len(devices)} devices: parameters, gradients, moments and one "
            f"microbatch of {rows} rows need {needed / 2**30:,.2f} GiB, and there are "
            f"{sum(device.memory for device in devices) / 2**30:,.2f}; take more devices, fewer rows or shorter ones"
        )
    return best[count][2]
