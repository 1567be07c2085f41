"""Is an optimized model ever slower than what its user had? Against the original as it is, and compiled by torch.compile.

For each model, number of rows and length, the contestants take turns in one process: the original, the original under
`torch.compile`, and the optimized model under each policy, compiled. Rows of several are padded on the left, to three quarters
of the length in the mean. What counts is the time relative to the faster of the two originals. Then one more token over a cache,
against the original's `DynamicCache`.

    python bench/never_slower.py --out bench/results/never-slower.json [--only "llama forward"]

What is in `--out` already is not measured again; all of it takes hours, a model and mode some ten minutes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated
from typing import Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import rewriter
from rewriter import Exact
from rewriter import SeparatorMask
from rewriter import SlidingWindow
from rewriter.demo.models import load_bundled
from rewriter.demo.models import load_smollm2

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
CONTEXTS = (64, 256, 1024, 4096, 8192)
MODES = ("forward", "training", "decode")
ORIGINAL, COMPILED = "original", "torch.compile"
POLICIES: dict[str, rewriter.Policy] = {
    "Exact()": Exact(),
    "SlidingWindow(256, sinks=4)": SlidingWindow(256, sinks=4),
    "SeparatorMask, a tenth of the tokens": SeparatorMask(tuple(range(0, 4096, 10)), window=256),
}
LIMIT = 0.97
"""Of the faster original's speed: what noise leaves of "never slower"."""


def models() -> dict[str, Callable[[], Any]]:
    def llama() -> Any:
        sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8}
        config = transformers.LlamaConfig(
            vocab_size=4096, num_key_value_heads=2, max_position_embeddings=16384, **sizes
        )
        return transformers.LlamaForCausalLM(config)

    def gpt2() -> Any:
        sizes = {"n_embd": 256, "n_layer": 4, "n_head": 8, "n_positions": 16384, "attn_pdrop": 0.0}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=4096, **sizes))

    return {
        "llama": llama,
        "gpt2": gpt2,
        "bundled": lambda: load_bundled()[0],
        "smollm2": lambda: load_smollm2()[0],
    }


def batch(rows: int, length: int, vocabulary: int) -> dict[str, Tensor]:
    """Token ids, and a mask of rows that begin from 0 to half of the length."""
    ids = torch.randint(min(vocabulary, 4096), (rows, length))
    if rows == 1:
        return {"input_ids": ids}
    begins = torch.arange(rows) * length // (2 * (rows - 1))
    return {"input_ids": ids, "attention_mask": (torch.arange(length) >= begins[:, None]).long()}


def contestants(model: Any) -> dict[str, Any]:
    own = {name: rewriter.optimize(model, policy, strict=True) for name, policy in POLICIES.items()}
    return {ORIGINAL: model, COMPILED: torch.compile(model, dynamic=True), **own}


def forward(call: Any, given: dict[str, Tensor]) -> None:
    with torch.no_grad():
        call(**given, use_cache=False, logits_to_keep=1)


def training(call: Any, given: dict[str, Tensor]) -> None:
    call(**given, labels=given["input_ids"], use_cache=False).loss.backward()
    for parameter in call.parameters():
        parameter.grad = None


def steps_over_cache(call: Any, ids: Tensor, steps: int = 16) -> Callable[[], None]:
    """Takes some tokens, one by one, over a cache that holds the text."""
    is_own = isinstance(call, rewriter.OptimizedModel)
    cache: Any = call.new_cache(ids.size(1) + 4096) if is_own else transformers.DynamicCache(config=call.config)

    def take(new: Tensor) -> None:
        with torch.no_grad():
            call(input_ids=new, past_key_values=cache, logits_to_keep=1)

    take(ids)

    def run() -> None:
        for _ in range(steps):
            take(ids[:, -1:])

    return run


def in_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The shortest time of each, after one call that compiles."""
    best = dict.fromkeys(calls, math.inf)
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - begin)
    return best


def measurements(only: str, rounds: int, longest: int, done: set[str]) -> Iterator[tuple[str, dict[str, float]]]:
    """What is measured, `model mode rows length`, and the seconds of each contestant."""
    for name, make in models().items():
        for mode in MODES:
            if only and only != f"{name} {mode}":
                continue
            sizes = (
                [(1, length) for length in CONTEXTS]
                if mode == "decode"
                else [(rows, length) for rows in (1, 4) for length in LENGTHS]
            )
            sizes = [size for size in sizes if size[1] <= longest and f"{name} {mode} {size[0]} {size[1]}" not in done]
            if not sizes:
                continue
            torch.manual_seed(0)
            model = make().train(mode == "training")
            everyone = contestants(model)
            for rows, length in sizes:
                given = batch(rows, length, model.config.vocab_size)
                if mode == "decode":
                    runners = {
                        label: steps_over_cache(call, given["input_ids"])
                        for label, call in everyone.items()
                        if label != COMPILED  # a growing cache is another graph again and again
                    }
                else:
                    run = forward if mode == "forward" else training
                    runners = {label: lambda call=call: run(call, given) for label, call in everyone.items()}  # noqa: B023
                yield f"{name} {mode} {rows} {length}", in_turns(runners, rounds)


def speeds(seconds: dict[str, float]) -> dict[str, float]:
    """Of the optimized models, relative to the faster original."""
    fastest = min(value for label, value in seconds.items() if label in (ORIGINAL, COMPILED))
    return {label: fastest / value for label, value in seconds.items() if label in POLICIES}


def table(results: dict[str, dict[str, float]]) -> Table:
    shown = Table(title="Speed relative to the faster of original and torch.compile", title_justify="left")
    for column in ("model", "mode", "rows", "tokens", *POLICIES):
        shown.add_column(column, justify="left" if column in ("model", "mode") else "right")
    for key, seconds in results.items():
        found = speeds(seconds)
        cells = [
            f"{found[label]:.2f}x" if found[label] >= LIMIT else f"[red]{found[label]:.2f}x[/red]" for label in POLICIES
        ]
        shown.add_row(*key.split(), *cells)
    return shown


def main(
    out: Annotated[Path, typer.Option(help="JSON to write, and to go on with.")] = Path("never-slower.json"),
    only: Annotated[str, typer.Option(help="One model and mode, as 'llama forward'.")] = "",
    rounds: Annotated[int, typer.Option(help="Rounds of the timings.")] = 5,
    longest: Annotated[int, typer.Option(help="Most tokens.")] = LENGTHS[-1],
    threads: Annotated[int, typer.Option(help="Of torch.")] = 2,
) -> None:
    torch.set_num_threads(threads)
    results: dict[str, Any] = {"torch": torch.__version__, "threads": threads, "seconds": {}}
    if out.is_file():
        results = json.loads(out.read_text(encoding="utf-8"))
    seconds = results["seconds"]
    for key, times in measurements(only, rounds, longest, set(seconds)):
        seconds[key] = times
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(key, {label: f"{speed:.2f}" for label, speed in speeds(times).items()}, flush=True)
    Console(width=150).print(table(seconds))


if __name__ == "__main__":
    typer.run(main)
