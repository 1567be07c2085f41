"""Whole models on a GPU: Llamas of one and of eight billion random parameters in bf16, beside the original, compiled, and Flex.

    bench/on_gpu.sh --only whole     one prefill, one training step, 1.2 billion parameters
    bench/on_gpu.sh --only llama     both sizes, every length and policy, and generation; as far as the minutes reach

The shapes are those of Llama 3.2 1B and Llama 3.1 8B (their config.json) with a smaller vocabulary. A training step has no
optimizer; eight billion parameters train with a quarter of the layers, so that activations of 32,768 tokens have room.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from gpu_machine import Machine
from gpu_sections import INITIAL
from gpu_sections import WINDOW
from gpu_sections import Figures
from gpu_sections import Row
from gpu_sections import Sizes
from torch import Tensor

import rewriter
from rewriter import DynamicMask
from rewriter import Exact
from rewriter import SeparatorMask
from rewriter import SlidingWindow


@dataclass(frozen=True)
class Shape:
    """Attributes:
    layers, training_layers: of the model that reads and generates, and of the one that trains.
    prefill, training: numbers of tokens.
    prompt, new: tokens of a prompt, and those that are generated after it.
    """

    hidden: int
    intermediate: int
    layers: int
    training_layers: int
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 32000
    prefill: tuple[int, ...] = (8192, 32768, 131072)
    training: tuple[int, ...] = (8192, 32768)
    prompt: int = 8192
    new: int = 64


SHAPES = {"1B": Shape(2048, 8192, 16, 16), "8B": Shape(4096, 14336, 32, 8)}
TINY = Shape(32, 32, 1, 1, heads=2, kv_heads=1, vocabulary=64, prefill=(24,), training=(20,), prompt=12, new=3)
"""Of a rehearsal."""

ORIGINAL, COMPILED, FLEX = "original", "original, inductor", "FlexAttention, inductor"
RECORDED = ", CUDA graph"
"""Behind the name of a policy: each token of a generation is one graph."""


def policies(keep: int) -> dict[str, rewriter.Policy]:
    separators = SeparatorMask(tuple(range(16)), window=WINDOW, initial=INITIAL)
    return {
        "window": SlidingWindow(WINDOW, sinks=4),
        "dynamic": DynamicMask(keep),
        "separators": separators,
        "exact": Exact(),
    }


def whole_rows(machine: Machine, sizes: Sizes) -> Iterator[Row]:
    """Prefill and one training step of 1.2 billion parameters, eager, beside the original; two of them compiled."""
    shape = TINY if machine.rehearsed else SHAPES["1B"]
    prefill, train = (shape.prefill[0], shape.training[0]) if machine.rehearsed else (16384, 8192)

    def whole(contestant: str, backend: str) -> Figures:
        run = functools.partial(contestant_of, machine, shape, shape.layers, contestant, backend, sizes.keep)
        return {**read(machine, run(), shape, prefill), **train_step(machine, run(), shape, train)}

    names = [ORIGINAL, *policies(sizes.keep)]
    for name in names[: 2 if machine.rehearsed else None]:
        yield Row(name, partial(whole, name, "eager"))
    if not machine.rehearsed:
        yield Row("dynamic, inductor", partial(whole, "dynamic", "inductor"))
        yield Row(COMPILED, partial(whole, COMPILED, "inductor"))


def llama_rows(machine: Machine, sizes: Sizes) -> Iterator[Row]:
    """Each size, length and contestant: prefill, training step, tokens of a generation."""
    shapes = {"tiny": TINY} if machine.rehearsed else SHAPES
    names = [ORIGINAL, "window"] if machine.rehearsed else [ORIGINAL, COMPILED, FLEX, *policies(sizes.keep)]
    recorded = [] if machine.rehearsed else [name + RECORDED for name in policies(sizes.keep)]
    backend = "eager" if machine.rehearsed else "inductor"
    for label, shape in shapes.items():
        for what, lengths, layers, measured in (
            ("prefill", shape.prefill, shape.layers, read),
            ("training", shape.training, shape.training_layers, train_step),
            ("generation", (shape.prompt,), shape.layers, generate),
        ):
            for length in lengths:
                for name in [*names, *recorded] if what == "generation" else names:
                    if name in (COMPILED, FLEX) and what == "generation":
                        continue  # transformers compiles the original's there by itself
                    make = partial(contestant_of, machine, shape, layers, name, backend, sizes.keep)
                    yield Row(
                        f"{label} {what} {length} {name}",
                        lambda make=make, measured=measured, shape=shape, length=length: measured(  # type: ignore[misc]
                            machine, make(), shape, length
                        ),
                    )


@functools.lru_cache(maxsize=1)
def model_of(device: str, shape: Shape, layers: int, attention: str) -> Any:
    """The last one is kept: rows of one model follow one another."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=131072 + 4096,
        attn_implementation=attention,
    )
    with torch.device(device):
        return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def contestant_of(machine: Machine, shape: Shape, layers: int, name: str, backend: str, keep: int) -> Any:
    model = model_of(machine.device, shape, layers, "flex_attention" if name == FLEX else "sdpa")
    policy = policies(keep).get(name.removesuffix(RECORDED))
    if policy is not None:
        return rewriter.optimize(model, policy, backend=backend, strict=True, cuda_graphs=name.endswith(RECORDED))
    return model if name == ORIGINAL else torch.compile(model, dynamic=False)


def timed(machine: Machine, name: str, call: Callable[[], Any]) -> Figures:
    """Milliseconds, the median of three after one that compiles, and the most memory."""
    call()
    return {f"{name}_ms": machine.wall(call, repeats=3)["wall_ms"], f"{name}_peak_mib": machine.peak_mib(call)}


def ids_of(machine: Machine, shape: Shape, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(shape.vocabulary, (1, length), generator=generator).to(machine.device)


def read(machine: Machine, run: Any, shape: Shape, length: int) -> Figures:
    """A prefill, logits of the last token."""
    ids = ids_of(machine, shape, length)

    def call() -> Tensor:
        with torch.no_grad():
            return run(input_ids=ids, use_cache=False, logits_to_keep=1).logits

    return timed(machine, "prefill", call)


def train_step(machine: Machine, run: Any, shape: Shape, length: int) -> Figures:
    """A forward and a backward, without the optimizer."""
    ids = ids_of(machine, shape, length)

    def call() -> None:
        run(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        for parameter in run.parameters():
            parameter.grad = None

    return timed(machine, "train", call)


def generate(machine: Machine, run: Any, shape: Shape, length: int) -> Figures:
    """Tokens after a prompt, greedy: what more of them take. The original's cache is static, and compiled by transformers."""
    ids = ids_of(machine, shape, length)
    options = {} if isinstance(run, rewriter.OptimizedModel) else {"cache_implementation": "static"}

    def call(new: int) -> None:
        with torch.no_grad():
            run.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new,
                min_new_tokens=new,
                **options,
            )

    many, few = (machine.wall(partial(call, new), repeats=3)["wall_ms"] for new in (shape.new, 1))
    peak = machine.peak_mib(partial(call, shape.new))
    return {"ms_per_token": (many - few) / (shape.new - 1), "prompt_ms": few, "peak_mib": peak}
