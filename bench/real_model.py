"""What does a pretrained model gain and lose? SmolLM2-135M-Instruct reads a book, and writes on, under each policy.

For the original, for `torch.compile` and for each policy: the first call, of 256 tokens, in a new process (with nothing compiled
before, and again with what the first process left in Inductor's cache), the first `generate` after it, and the memory that the
call took; the prefill of `--length` tokens and one more token over the cache, in rounds in which the contestants take turns; the
memory of keys and values; and the text's perplexity.

    python bench/real_model.py --out bench/results/real-model.json

What is in `--out` already is not measured again. It takes half an hour on two cores.
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch import nn

import rewriter
from rewriter import Exact
from rewriter import SeparatorMask
from rewriter import SlidingWindow
from rewriter.demo.models import load_smollm2

TEXT = Path(__file__).parent / "texts" / "from-sand-hill-to-pine.txt"
ORIGINAL, COMPILED = "original", "original, torch.compile"
CONTESTANTS = (ORIGINAL, COMPILED, "Exact()", "SlidingWindow(512, sinks=4)", "SeparatorMask(window=256)")
FIRST = 256
"""Tokens of a first call, which is to be compiling and not computing."""
STEPS = 16
"""Tokens that are timed together, one after the other, over a cache."""


def policy_of(contestant: str, tokenizer: Any) -> rewriter.Policy | None:
    """None for those that have none."""
    return {
        "Exact()": Exact(),
        "SlidingWindow(512, sinks=4)": SlidingWindow(512, sinks=4),
        "SeparatorMask(window=256)": SeparatorMask.from_tokenizer(tokenizer, window=256),
    }.get(contestant)


def callable_of(contestant: str, model: Any, tokenizer: Any) -> Any:
    policy = policy_of(contestant, tokenizer)
    if policy is not None:
        return rewriter.optimize(model, policy, strict=True)
    return torch.compile(model, dynamic=True) if contestant == COMPILED else model


def tokens_of(tokenizer: Any, text: Path, length: int) -> Tensor:
    """int64 `[1, length]`"""
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[:, :length]
    if ids.size(1) < length:
        raise typer.BadParameter(f"--text {text} has {ids.size(1)} tokens, fewer than --length {length}")
    return ids


def prefill(call: Any, ids: Tensor) -> Tensor:
    return call(input_ids=ids, use_cache=False, logits_to_keep=1).logits


def perplexity(call: Any, ids: Tensor) -> float:
    logits = call(input_ids=ids, use_cache=False).logits
    return math.exp(nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item())


def seconds_of(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


@torch.no_grad()
def first_call(contestant: str, text: Path) -> dict[str, float]:
    """In this process: seconds of the first prefill and the first `generate`, and how much the most resident memory has grown."""
    model, tokenizer = load_smollm2()
    ids = tokens_of(tokenizer, text, FIRST)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call = callable_of(contestant, model, tokenizer)
    result = {"prefill": seconds_of(lambda: prefill(call, ids))}
    result["memory_bytes"] = 1024.0 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    result["generate"] = seconds_of(lambda: call.generate(ids, **options))
    return result


def in_new_process(contestant: str, text: Path, cache: str) -> dict[str, float]:
    arguments = ["--first-call", contestant, "--text", str(text)]
    done = subprocess.run(
        [sys.executable, __file__, *arguments, "--threads", str(torch.get_num_threads())],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def stepper(contestant: str, call: Any, ids: Tensor) -> tuple[Callable[[], None], Callable[[], int]]:
    """What takes `STEPS` tokens over a cache that holds the text, and what says how many bytes of keys and values it holds."""
    from transformers import DynamicCache

    own = isinstance(call, rewriter.OptimizedModel)
    cache: Any = call.new_cache(ids.size(1) + 1024) if own else DynamicCache(config=call.config)
    call(input_ids=ids, past_key_values=cache, logits_to_keep=1)

    def steps() -> None:
        for _ in range(STEPS):
            call(input_ids=ids[:, -1:], past_key_values=cache, logits_to_keep=1)

    def kept() -> int:
        if own:
            return int(cache.num_bytes)
        return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))

    return steps, kept


def measure(text: Path, length: int, rounds: int, done: dict[str, Any], save: Callable[[], None]) -> None:
    for contestant in CONTESTANTS:
        if contestant in done:
            continue
        with tempfile.TemporaryDirectory() as cache:
            cold = in_new_process(contestant, text, cache)
            warm = in_new_process(contestant, text, cache)
        done[contestant] = {"cold": cold, "warm": warm}
        save()
        print(f"{contestant}: first call {cold['prefill']:.1f} s, warm {warm['prefill']:.1f} s", flush=True)
    if all("prefill" in row for row in done.values()):
        return
    model, tokenizer = load_smollm2()
    ids = tokens_of(tokenizer, text, length)
    calls = {contestant: callable_of(contestant, model, tokenizer) for contestant in CONTESTANTS}
    with torch.no_grad():
        for contestant, call in calls.items():
            done[contestant]["perplexity"] = perplexity(call, ids)
            prefill(call, ids)
            print(f"{contestant}: perplexity {done[contestant]['perplexity']:.2f}", flush=True)
        prefills = in_turns({name: lambda call=call: prefill(call, ids) for name, call in calls.items()}, rounds)
        steppers = {name: stepper(name, call, ids) for name, call in calls.items()}
        for steps, _ in steppers.values():
            steps()  # compiles
        tokens = in_turns({name: steps for name, (steps, _) in steppers.items()}, rounds)
    for contestant, row in done.items():
        row.update(prefill=prefills[contestant], token=tokens[contestant] / STEPS, kept=steppers[contestant][1]())
    save()


def in_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The shortest time of each."""
    best = dict.fromkeys(calls, math.inf)
    for _ in range(rounds):
        for name, call in calls.items():
            best[name] = min(best[name], seconds_of(call))
    return best


def table(result: dict[str, Any]) -> Table:
    rows = result["contestants"]
    title = f"SmolLM2-135M-Instruct, {result['length']:,} tokens of {result['text']}, {result['threads']} threads"
    shown = Table(title=title, title_justify="left")
    columns = (
        "prefill",
        "one more token",
        "memory of keys and values",
        "perplexity",
        "first call, warm",
        "first generate, warm",
        "memory",
    )
    for column in ("", *columns):
        shown.add_column(column, justify="right" if column else "left")
    original = rows[ORIGINAL]
    for name, row in rows.items():
        shown.add_row(
            name,
            f"{original['prefill'] / row['prefill']:.2f}x",
            f"{original['token'] / row['token']:.2f}x",
            f"{row['kept'] / original['kept']:.0%}",
            f"{row['perplexity']:.2f}",
            f"{row['cold']['prefill']:.0f} s, {row['warm']['prefill']:.0f} s",
            f"{row['cold']['generate']:.0f} s, {row['warm']['generate']:.0f} s",
            f"{row['cold']['memory_bytes'] / 2**20:,.0f} MiB",
        )
    return shown


def main(
    out: Annotated[Path, typer.Option(help="JSON to write, and to go on with.")] = Path("real-model.json"),
    text: Annotated[Path, typer.Option(help="A text file.")] = TEXT,
    length: Annotated[int, typer.Option(help="Tokens of the text.")] = 4096,
    rounds: Annotated[int, typer.Option(help="Rounds of the timings.")] = 3,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 2,
    first: Annotated[str, typer.Option("--first-call", hidden=True)] = "",
) -> None:
    torch.set_num_threads(threads)
    if first:
        print(json.dumps(first_call(first, text)))
        return
    settings = {"text": text.name, "length": length, "threads": threads, "torch": torch.__version__}
    result: dict[str, Any] = {**settings, "contestants": {}}
    if out.is_file():
        result = json.loads(out.read_text(encoding="utf-8"))
        different = [name for name, value in settings.items() if result[name] != value]
        if different:
            raise typer.BadParameter(f"{out} was measured with another {different[0]}; give another --out")

    def save() -> None:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    measure(text, length, rounds, result["contestants"], save)
    Console(width=150).print(table(result))


if __name__ == "__main__":
    typer.run(main)
