"""What does a model find in contexts that are up to 32 times as long as its training rows?

The model of `train_retrieval.py` (rows of 512 tokens) is asked for one note among sentences (pass key), or among notes
(key-value), at every depth of the context. The middle of the context cut out; all of it, dense; a window with sinks whose
positions are places in the cache (StreamingLLM, arXiv 2309.17453); and chunked eviction (ParallelComp, arXiv 2502.14317)
with and without eviction of keys and calibration. Accuracy, and the loss of the right answer.

    python bench/quality_chunked.py --model bench/retrieval_model --out bench/results/quality-chunked.json

What is in `--out` already is not run again.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated
from typing import Any

import retrieval
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer

import rewriter
from rewriter import MIXED_CALIBRATION
from rewriter import ChunkedEviction
from rewriter import SeparatorMask

TIMES = (1, 2, 4, 8, 16, 32)
DEPTHS = 4  # bins of the table by depth
CHUNK, KEEP, CAPACITY = 502, 3, 128
BLOCK = 64
AFTER = 11
"""Tokens of BOS, question and answer."""

Answerer = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(context `[N]`, question `[m]`, answer `[a]`) -> logits of the answer's tokens `[a, V]`."""


def cut(model: Any, trained: int) -> Answerer:
    def answer(context: Tensor, question: Tensor, answer: Tensor) -> Tensor:
        room = trained - AFTER + 1
        if context.numel() > room:
            context = torch.cat((context[: room // 2], context[room // 2 - room :]))
        return dense(model)(context, question, answer)

    return answer


def dense(model: Any) -> Answerer:
    def answer(context: Tensor, question: Tensor, answer: Tensor) -> Tensor:
        ids = torch.cat((context, question, answer))[None]
        rows = torch.arange(ids.size(1) - answer.numel() - 1, ids.size(1) - 1)
        return model(input_ids=ids, use_cache=False, logits_to_keep=rows).logits[0]

    return answer


def streaming(model: Any, policy: SeparatorMask) -> Answerer:
    """Over a cache, in which positions are places."""
    fast = rewriter.optimize(model, policy, backend="eager", strict=True)

    def answer(context: Tensor, question: Tensor, answer: Tensor) -> Tensor:
        cache, logits = fast.new_cache(), []
        ids = torch.cat((context, question, answer[:-1]))
        for part in ids.split(BLOCK):
            logits.append(fast(input_ids=part[None], past_key_values=cache).logits[0, -answer.numel() :])
        return torch.cat(logits)[-answer.numel() :]

    return answer


def chunked(model: Any, policy: ChunkedEviction) -> Answerer:
    fast = rewriter.optimize(model, policy, backend="eager", strict=True)

    def answer(context: Tensor, question: Tensor, answer: Tensor) -> Tensor:
        reading = fast.read(context, question, max_new_tokens=answer.numel())
        first = fast(input_ids=question[None], past_key_values=reading.cache).logits[0, -1:]
        if answer.numel() == 1:
            return first
        return torch.cat((first, fast(input_ids=answer[None, :-1], past_key_values=reading.cache).logits[0]))

    return answer


def answerers(model: Any, trained: int) -> dict[str, Answerer]:
    # No separators: the first keys, and a window that fills the capacity. It is compacted every 61 tokens and not at each.
    window = SeparatorMask(
        (0,), initial=4, window=trained - 4 - BLOCK, max_separators=0, capacity=trained - 4, positions="cache"
    )
    plain = {"chunk": CHUNK, "keep_chunks": KEEP}
    return {
        "middle cut out": cut(model, trained),
        "dense": dense(model),
        "window with sinks": streaming(model, window),
        "chunked": chunked(model, ChunkedEviction(**plain)),
        "chunked, evicting": chunked(model, ChunkedEviction(**plain, capacity=CAPACITY)),
        "chunked, calibrated": chunked(model, ChunkedEviction(**plain, calibration=MIXED_CALIBRATION)),
        "chunked, evicting, calibrated": chunked(
            model, ChunkedEviction(**plain, capacity=CAPACITY, calibration=MIXED_CALIBRATION)
        ),
        "chunked, one chunk kept": chunked(model, ChunkedEviction(CHUNK, keep_chunks=1)),
    }


@torch.no_grad()
def measure(answer: Answerer, tokenizer: Any, task: str, length: int, samples: int) -> list[dict[str, float]]:
    """One row for each sample: its depth, whether the answer is right, and its loss in nats per token."""
    rng, rows = random.Random(f"{task} {length}"), []
    for number in range(samples):
        depth = (number + 0.5) / samples
        sample = retrieval.TASKS[task](rng, length - AFTER, depth)
        context, question, right = (
            torch.tensor(tokenizer.convert_tokens_to_ids(list(words)))
            for words in ([retrieval.BOS, *sample.context], sample.question, sample.answer)
        )
        log_p = answer(context, question, right).log_softmax(-1)
        loss = -log_p.gather(1, right[:, None]).mean().item()
        rows.append({"depth": depth, "right": bool((log_p.argmax(-1) == right).all()), "loss": loss})
    return rows


def main(
    out: Annotated[Path, typer.Option(help="File of the results; what it has is not run again.")],
    model: Annotated[Path, typer.Option(help="Folder of the model.")] = Path("bench/retrieval_model"),
    samples: Annotated[int, typer.Option(help="Contexts of each task and length.")] = 32,
    longest: Annotated[int, typer.Option(help="Stop at so many training lengths.")] = TIMES[-1],
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(model)
    small = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    trained = small.config.max_position_embeddings
    everyone = answerers(small, trained)
    results = json.loads(out.read_text()) if out.exists() else []
    done = {(r["task"], r["contestant"], r["times"]) for r in results}
    for times in [t for t in TIMES if t <= longest]:
        for task in retrieval.TASKS:
            for name, answerer in everyone.items():
                if (task, name, times) in done:
                    continue
                begin = time.perf_counter()
                rows = measure(answerer, tokenizer, task, times * trained, samples)
                seconds = time.perf_counter() - begin
                results.append({"task": task, "contestant": name, "times": times, "seconds": seconds, "samples": rows})
                out.write_text(json.dumps(results) + "\n")
    console = Console(width=150)
    for task in retrieval.TASKS:
        console.print(table(results, task, "right", "Right answers"))
        console.print(table(results, task, "loss", "Loss of the right answer, nats per token"))
    console.print(by_depth(results))
    draw(results, out.with_suffix(".png"))


def mean(rows: list[dict[str, float]], what: str) -> float:
    return sum(row[what] for row in rows) / len(rows)


def written(value: float, what: str) -> str:
    return f"{value:.0%}" if what == "right" else f"{value:.2f}"


def table(results: list[dict[str, Any]], task: str, what: str, title: str) -> Table:
    times = sorted({r["times"] for r in results})
    result = Table(title=f"{title}, {task}", title_justify="left")
    for column in ("", *(f"{t}x" for t in times)):
        result.add_column(column, justify="left" if not column else "right")
    by = {(r["contestant"], r["times"]): r["samples"] for r in results if r["task"] == task}
    for name in dict.fromkeys(r["contestant"] for r in results):
        cells = [by.get((name, t)) for t in times]
        result.add_row(name, *("-" if c is None else written(mean(c, what), what) for c in cells))
    return result


def by_depth(results: list[dict[str, Any]]) -> Table:
    """Right answers in each quarter of the context, beyond the trained length."""
    result = Table(title="Right answers by depth of the note, beyond the trained length", title_justify="left")
    for column in ("", "task", *(f"{100 * d // DEPTHS} to {100 * (d + 1) // DEPTHS} %" for d in range(DEPTHS))):
        result.add_column(column, justify="left" if column in ("", "task") else "right")
    for task in retrieval.TASKS:
        for name in dict.fromkeys(r["contestant"] for r in results):
            rows = [
                s
                for r in results
                if (r["task"], r["contestant"]) == (task, name) and r["times"] > 1
                for s in r["samples"]
            ]
            bins = [[s for s in rows if int(s["depth"] * DEPTHS) == d] for d in range(DEPTHS)]
            result.add_row(name, task, *(written(mean(b, "right"), "right") if b else "-" for b in bins))
    return result


def draw(results: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(retrieval.TASKS), figsize=(11, 7), sharex=True)
    for column, task in enumerate(retrieval.TASKS):
        for row, (what, label) in enumerate(
            (("right", "right answers"), ("loss", "loss of the answer, nats per token"))
        ):
            for name in dict.fromkeys(r["contestant"] for r in results):
                own = [r for r in results if (r["task"], r["contestant"]) == (task, name)]
                axes[row][column].plot(
                    [r["times"] for r in own], [mean(r["samples"], what) for r in own], marker=".", label=name
                )
            axes[row][column].set_xscale("log", base=2)
            axes[row][column].set_ylabel(label)
        axes[0][column].set_title(task)
        axes[1][column].set_xlabel("length of the context, in rows of the training length")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    typer.run(main)
