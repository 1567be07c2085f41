"""Does a pretrained model still find what policies keep? SmolLM2-135M-Instruct, and tasks after RULER's definitions.

Six tasks of arXiv 2404.06654 (sections 3.1 to 3.3), in words and by a generator of their own: one note among a book's
sentences, one of several, all notes of one name, a chain of names for one number, words that come often in a list, and the one
that comes most often in a skewed one. The context is a book's sentences, or the list, as long as asked. An answer is right by the
part of the expected words that the model writes. Contestants keep equal shares of the pairs, as in `quality_real.py`; truncation
keeps that share of the tokens, half of them from the begin and half from the end.

    python bench/retrieval_real.py --out bench/results/retrieval-real.json --lengths 2048

What is in `--out` already is not run again.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from typing import Any

import torch
import typer
from quality_real import SINKS
from quality_real import TEXTS
from rich.console import Console
from rich.table import Table
from torch import Tensor

import rewriter
from rewriter import Exact
from rewriter import SeparatorMask
from rewriter import SlidingWindow
from rewriter.comparison.budget import at_budget
from rewriter.demo.models import load_smollm2
from rewriter.errors import PolicyError

TEXT = TEXTS / "from-sand-hill-to-pine.txt"
NAMES = (
    *("amber", "birch", "cedar", "dahlia", "elder", "fern", "ginger", "hazel", "iris"),
    *("jasmine", "laurel", "maple", "nettle", "olive", "poppy", "rowan", "sage", "thyme"),
)
WORDS = (
    *("anchor", "basket", "candle", "dragon", "engine", "feather", "garden", "hammer", "island", "jacket"),
    *("kettle", "ladder", "mirror", "needle", "orange", "pencil", "quarry", "ribbon", "saddle", "timber"),
    *("umbrella", "velvet", "window", "yellow", "zipper", "barrel", "copper", "dinner", "forest", "gravel"),
)
NEW = 40
"""Tokens of an answer at most."""


@dataclass(frozen=True)
class Question:
    """A context's parts that are put among its sentences, what is asked, and what an answer must hold.

    Attributes:
        notes: lines to be spread over the context; where the first one lies is the question's depth.
        listed: a context that is no book; None for a book's sentences.
    """

    notes: tuple[str, ...]
    ask: str
    answers: tuple[str, ...]
    listed: Callable[[int], list[str]] | None = None


def number(source: random.Random) -> str:
    return str(source.randrange(10**5, 10**6))


def single(source: random.Random) -> Question:
    name, value = source.choice(NAMES), number(source)
    return Question((f"Remember: the number of {name} is {value}.",), f"What is the number of {name}?", (value,))


def among_keys(source: random.Random) -> Question:
    names = source.sample(NAMES, 4)
    values = [number(source) for _ in names]
    notes = tuple(f"Remember: the number of {n} is {v}." for n, v in zip(names, values, strict=True))
    return Question(notes, f"What is the number of {names[0]}?", (values[0],))


def several_values(source: random.Random) -> Question:
    name, values = source.choice(NAMES), [number(source) for _ in range(3)]
    notes = tuple(f"Remember: one number of {name} is {v}." for v in values)
    return Question(notes, f"What are all three numbers of {name}?", tuple(values))


def chain(source: random.Random) -> Question:
    names, value = source.sample(NAMES, 3), number(source)
    notes = [f"Note: {names[0]} has the value {value}."]
    notes += [f"Note: {after} has the value of {before}." for before, after in itertools.pairwise(names)]
    return Question(tuple(notes), f"Which names have the value {value}?", tuple(names))


def common_words(source: random.Random) -> Question:
    words = source.sample(WORDS, len(WORDS))
    often, rare = words[:3], words[3:]

    def listed(count: int) -> list[str]:
        # Each of three as often as six of the others together.
        return [source.choice(often) if source.random() < 0.5 else source.choice(rare) for _ in range(count)]

    return Question((), "Which three words of the list come most often?", tuple(often), listed)


def skewed_words(source: random.Random) -> Question:
    words = source.sample(WORDS, len(WORDS))
    weights = [1 / (rank + 1) ** 2 for rank in range(len(words))]

    def listed(count: int) -> list[str]:
        return source.choices(words, weights, k=count)

    return Question((), "Which word of the list comes most often?", (words[0],), listed)


TASKS: dict[str, Callable[[random.Random], Question]] = {
    "one note": single,
    "one of four notes": among_keys,
    "three values": several_values,
    "a chain of names": chain,
    "common words": common_words,
    "the most frequent word": skewed_words,
}


def prompt_of(question: Question, tokenizer: Any, sentences: list[str], length: int, depth: float) -> Tensor:
    """Token ids of a conversation of about `length` tokens, int64 `[1, n]`, its first note at `depth`, the others behind it."""
    if question.listed is not None:
        parts = [f"{word}," for word in question.listed(length)]
        begin = "Here is a list of words."
    else:
        parts, begin = list(sentences), "Here is a text, with notes in it."

    def ids(count: int) -> Tensor:
        used = parts[:count]
        for place, note in enumerate(question.notes):
            at = depth + (1 - depth) * place / max(1, len(question.notes))
            used.insert(int(at * count) + place, note)
        text = f"{begin}\n\n{' '.join(used)}\n\n{question.ask} Answer in a few words."
        message = [{"role": "user", "content": text}]
        found = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return found["input_ids"]

    return ids(max(1, bisect_right(range(1, len(parts) + 1), length, key=lambda count: ids(count).size(1))))


def score(answer: str, question: Question) -> float:
    """The part of the expected words that an answer holds."""
    written = set(re.findall(r"\w+", answer.lower()))
    return sum(word.lower() in written for word in question.answers) / len(question.answers)


def contestants(tokenizer: Any, ids: Tensor, shares: tuple[float, ...]) -> dict[str, rewriter.Policy | float]:
    """By name a policy, or the share of the tokens that truncation keeps; windows are those of these ids."""
    found: dict[str, rewriter.Policy | float] = {"dense": Exact()}
    for share in shares:
        found[f"window and sinks, {share:.0%}"] = at_budget(SlidingWindow(1, sinks=SINKS), share, ids)
        try:
            found[f"separators, {share:.0%}"] = at_budget(SeparatorMask.from_tokenizer(tokenizer), share, ids)
        except PolicyError:
            print(f"more than {share:.0%} of the context are separators", flush=True)
        found[f"truncation, {share:.0%}"] = share
    return found


@torch.no_grad()
def answer_of(call: Any, ids: Tensor, tokenizer: Any) -> str:
    own = call.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    return str(tokenizer.decode(own[0, ids.size(1) :], skip_special_tokens=True))


def truncated(ids: Tensor, share: float) -> Tensor:
    """The first and the last tokens, this share of them together."""
    kept = max(2, int(share * ids.size(1)))
    return torch.cat((ids[:, : kept // 2], ids[:, -(kept - kept // 2) :]), dim=1)


def measure(
    text: Path, lengths: list[int], samples: int, shares: tuple[float, ...], out: Path, rows: list[dict[str, Any]]
) -> None:
    model, tokenizer = load_smollm2()
    model.eval()
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(text.read_text(encoding="utf-8").split()))
    done = {(row["length"], row["contestant"], row["task"], row["sample"]) for row in rows}
    for length in lengths:
        example = prompt_of(single(random.Random(0)), tokenizer, sentences, length, 0.5)
        for name, policy in contestants(tokenizer, example, shares).items():
            torch._dynamo.reset()
            call = rewriter.optimize(
                model, Exact() if isinstance(policy, float) else policy, strict=True, progress=False
            )
            for task, make in TASKS.items():
                for sample in range(samples):
                    if (length, name, task, sample) in done:
                        continue
                    source = random.Random(f"{task} {sample}")
                    question, depth = make(source), (sample + 0.5) / samples
                    ids = prompt_of(question, tokenizer, sentences, length, depth)
                    if isinstance(policy, float):
                        ids = truncated(ids, policy)
                    answer = answer_of(call, ids, tokenizer)
                    row = {"length": length, "contestant": name, "task": task, "sample": sample, "depth": depth}
                    rows.append({**row, "score": score(answer, question), "answer": answer})
                    out.write_text(json.dumps({"samples": samples, "rows": rows}, indent=1) + "\n", encoding="utf-8")
            own = [r["score"] for r in rows if r["length"] == length and r["contestant"] == name]
            print(f"{length:,} tokens, {name}: {sum(own) / len(own):.0%}", flush=True)


def table(result: dict[str, Any]) -> Table:
    shown = Table(title=f"Answers that are right, {result['samples']} of each", title_justify="left")
    for column in ("tokens", "", *TASKS, "all"):
        shown.add_column(column, justify="left" if not column else "right")
    groups: dict[tuple[int, str], dict[str, list[float]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["length"], row["contestant"]), {}).setdefault(row["task"], []).append(row["score"])
    for (length, name), tasks in groups.items():
        means = [sum(tasks[task]) / len(tasks[task]) for task in TASKS if task in tasks]
        cells = [f"{mean:.0%}" for mean in means]
        shown.add_row(f"{length:,}", name, *cells, *[""] * (len(TASKS) - len(cells)), f"{sum(means) / len(means):.0%}")
    return shown


def main(
    out: Annotated[Path, typer.Option(help="JSON to write, and to go on with.")] = Path("retrieval-real.json"),
    text: Annotated[Path, typer.Option(help="A text file, the sentences of the contexts.")] = TEXT,
    lengths: Annotated[str, typer.Option(help="Tokens of a context, separated by commas.")] = "2048,4096,8192",
    samples: Annotated[int, typer.Option(help="Questions of each task.")] = 10,
    shares: Annotated[str, typer.Option(help="Parts of the pairs that are kept, separated by commas.")] = "0.5,0.25",
    threads: Annotated[int, typer.Option(help="Of torch.")] = 2,
) -> None:
    torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    if out.is_file():
        before = json.loads(out.read_text(encoding="utf-8"))
        if before["samples"] != samples:
            raise typer.BadParameter(f"{out} was measured with --samples {before['samples']}")
        rows = before["rows"]
    parts = tuple(float(share) for share in shares.split(","))
    measure(text, [int(length) for length in lengths.split(",")], samples, parts, out, rows)
    Console(width=170).print(table({"samples": samples, "rows": rows}))


if __name__ == "__main__":
    typer.run(main)
