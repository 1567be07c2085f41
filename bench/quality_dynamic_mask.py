"""What does a dynamic mask lose and learn, against full attention and against a window that keeps as many keys?

Recall: multi-query associative recall (arXiv 2312.04927; in arXiv 2508.02124 with 512 pairs and 1,024 to 8,192 tokens),
scaled down. Pairs of a key and a value stand among noise in the first half of a row; keys are asked for in the second.
The models are alike but for the policy: a causal convolution of width 3, then two attention layers.

Text: the bundled small model goes on training on rows of 1,024 tokens while each query sees 128 keys, an eighth, and
reads held-out source code at that length and at longer ones. Before that, what each beginning of `A` loses untrained.

    python bench/quality_dynamic_mask.py --out bench/results/quality-dynamic-mask.json

Two processes of one thread each; what is in `--out` already is not run again.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import as_completed
from dataclasses import asdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch import nn
from transformers import LlamaConfig
from transformers import LlamaForCausalLM
from transformers import PreTrainedTokenizerFast

import rewriter
from rewriter import DynamicMask
from rewriter import SlidingWindow
from rewriter.demo.corpus import held_out_files
from rewriter.demo.corpus import training_files
from rewriter.demo.models import load_bundled

POLICIES = ("full attention", "sliding window", "dynamic mask", "dynamic mask, half of it local")


@dataclass(frozen=True)
class Recall:
    """The recall task and how it is trained; `own_rate` times faster for the policy's own parameters."""

    length: int = 128
    pairs: int = 8
    queries: int = 32
    keep: int = 16
    tokens_of_a_kind: int = 32
    width: int = 64
    layers: int = 2
    heads: int = 2
    batch: int = 64
    steps: int = 1200
    learning_rate: float = 2e-3
    own_rate: float = 30.0
    seeds: tuple[int, ...] = (0, 1, 2)
    test_rows: int = 1024


@dataclass(frozen=True)
class Text:
    """The continued training of the bundled model; `own_rate` times faster for the policy's own parameters."""

    context: int = 1024
    keep: int = 128
    batch: int = 4
    steps: int = 250
    learning_rate: float = 1e-3
    own_rate: float = 30.0
    warmup_steps: int = 20
    seed: int = 0
    held_out_tokens: int = 49_152
    read_in: tuple[int, ...] = (1024, 4096, 16_384)
    first_rates: tuple[float, ...] = (0.0, 0.01, 1.0)


def policy(name: str, keep: int) -> rewriter.Policy | None:
    return {
        "full attention": None,
        "sliding window": SlidingWindow(keep),
        "dynamic mask": DynamicMask(keep),
        "dynamic mask, half of it local": DynamicMask(keep // 2, local=keep // 2),
    }[name]


def optimizer_of(model: nn.Module, task: Recall | Text) -> torch.optim.AdamW:
    own = list(model.policy_parameters.parameters()) if isinstance(model, rewriter.OptimizedModel) else []
    others = [p for p in model.parameters() if all(p is not q for q in own)]
    groups = [{"params": others, "factor": 1.0}, {"params": own, "factor": task.own_rate}]
    return torch.optim.AdamW(groups, lr=task.learning_rate, betas=(0.9, 0.95))


def set_rate(optimizer: torch.optim.AdamW, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def recall_rows(task: Recall, count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Token ids and labels, `[count, length]`; -100 where nothing is asked."""
    kind, half = task.tokens_of_a_kind, task.length // 2
    ids = torch.randint(2 * kind, 3 * kind, (count, task.length), generator=random)
    labels = torch.full_like(ids, -100)
    keys = torch.rand(count, kind, generator=random).argsort(1)[:, : task.pairs]
    values = torch.randint(kind, 2 * kind, (count, task.pairs), generator=random)
    places = 2 * torch.rand(count, half // 2, generator=random).argsort(1)[:, : task.pairs]
    ids.scatter_(1, places, keys)
    ids.scatter_(1, places + 1, values)
    asked = half + torch.rand(count, half, generator=random).argsort(1)[:, : task.queries]
    repeats = task.queries // task.pairs
    ids.scatter_(1, asked, keys.repeat(1, repeats))
    labels.scatter_(1, asked, values.repeat(1, repeats))
    return ids, labels


class RecallModel(nn.Module):
    def __init__(self, task: Recall) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=3 * task.tokens_of_a_kind,
            hidden_size=task.width,
            intermediate_size=2 * task.width,
            num_hidden_layers=task.layers,
            num_attention_heads=task.heads,
            num_key_value_heads=task.heads,
            max_position_embeddings=task.length,
            initializer_range=0.1,
        )
        self.model = LlamaForCausalLM(config)
        self.convolution = nn.Conv1d(task.width, task.width, 3, groups=task.width)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.model.model.embed_tokens(input_ids)
        x = x + self.convolution(nn.functional.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)
        return self.model(inputs_embeds=x, use_cache=False).logits


def run_recall(name: str, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    task = Recall()
    torch.manual_seed(seed)
    model: nn.Module = RecallModel(task)
    random = torch.Generator().manual_seed(seed)
    chosen = policy(name, task.keep)
    if chosen is not None:
        example = {"input_ids": recall_rows(task, 2, torch.Generator())[0]}
        model = rewriter.optimize(model, chosen, strict=True, example_inputs=example)
    optimizer = optimizer_of(model, task)
    begin = time.monotonic()
    for step in range(task.steps):
        set_rate(optimizer, task.learning_rate * min(1.0, (step + 1) / 100) * (1 - step / task.steps))
        ids, labels = recall_rows(task, task.batch, random)
        loss = nn.functional.cross_entropy(model(input_ids=ids).flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    ids, labels = recall_rows(task, task.test_rows, torch.Generator().manual_seed(1000 + seed))
    with torch.no_grad():
        right = torch.cat([model(input_ids=part).argmax(-1) for part in ids.split(task.batch)]) == labels
    accuracy = right[labels != -100].float().mean().item()
    return {"accuracy": accuracy, "last_loss": loss.item(), "seconds": time.monotonic() - begin}


def stream(tokenizer: PreTrainedTokenizerFast, files: list[Path]) -> tuple[Tensor, Tensor]:
    """All files in one row, a first token before each: ids and the bytes that each token stands for, both `[N]`."""
    ids: list[int] = []
    sizes: list[int] = []
    for path in files:
        text = path.read_text(encoding="utf-8", errors="ignore")
        encoding = tokenizer.backend_tokenizer.encode(text)
        ids += [tokenizer.bos_token_id, *encoding.ids]
        sizes += [0, *(len(text[a:b].encode()) for a, b in encoding.offsets)]
    return torch.tensor(ids), torch.tensor(sizes)


@torch.no_grad()
def bits_per_byte(call: Callable[..., Any], ids: Tensor, sizes: Tensor, context: int) -> float:
    """Of a stream that is read in rows of `context` tokens, the first of each row given."""
    nats, num_bytes = 0.0, 0
    for begin in range(0, ids.numel() - context + 1, context):
        row = ids[None, begin : begin + context]
        logits = call(input_ids=row, use_cache=False).logits[0, :-1]
        nats += nn.functional.cross_entropy(logits.float(), row[0, 1:], reduction="sum").item()
        num_bytes += int(sizes[begin + 1 : begin + context].sum())
    return nats / math.log(2) / num_bytes


def run_text(name: str, rate: float | None) -> dict[str, Any]:
    """Continued training; with a `rate`, no training: only what a dynamic mask that begins with A = rate loses."""
    torch.set_num_threads(1)
    task = Text()
    torch.manual_seed(task.seed)
    model, tokenizer = load_bundled()
    test_ids, test_sizes = (t[: task.held_out_tokens] for t in stream(tokenizer, held_out_files()))
    chosen = policy(name, task.keep)
    fast: nn.Module = model if chosen is None else rewriter.optimize(model, chosen, backend="eager", strict=True)
    if rate is not None:
        assert isinstance(fast, rewriter.OptimizedModel)
        for parameters in fast.policy_parameters.values():
            nn.init.constant_(parameters["A"], rate)
    begin = time.monotonic()
    read_in = task.read_in if rate is None else task.read_in[:1]
    before = {str(n): bits_per_byte(fast.eval(), test_ids, test_sizes, n) for n in read_in}
    if rate is not None:
        return {"before": before}
    ids, _ = stream(tokenizer, training_files())
    random = torch.Generator().manual_seed(task.seed)
    optimizer = optimizer_of(fast, task)
    fast.train()
    curve = []
    for step in range(task.steps):
        done = max(0, step - task.warmup_steps) / (task.steps - task.warmup_steps)
        factor = min(1.0, (step + 1) / task.warmup_steps) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        set_rate(optimizer, task.learning_rate * factor)
        offsets = torch.randint(ids.numel() - task.context, (task.batch,), generator=random)
        rows = torch.stack([ids[o : o + task.context] for o in offsets.tolist()])
        loss = fast(input_ids=rows, labels=rows, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(fast.parameters(), 1.0)
        optimizer.step()
        curve.append(loss.item())
    after = {str(n): bits_per_byte(fast.eval(), test_ids, test_sizes, n) for n in task.read_in}
    result = {"before": before, "after": after, "seconds": time.monotonic() - begin, "train_nats_per_token": curve}
    if isinstance(fast, rewriter.OptimizedModel):
        result["A"] = {n: p.tolist() for n, p in fast.policy_parameters.named_parameters() if n.endswith("A")}
    return result


def jobs() -> dict[str, tuple[Any, ...]]:
    """What to run, by the name that the result is stored under; the longest first."""
    result: dict[str, tuple[Any, ...]] = {f"text/{name}": (run_text, name, None) for name in reversed(POLICIES)}
    for name in reversed(POLICIES):
        result |= {f"recall/{name}/seed {seed}": (run_recall, name, seed) for seed in Recall().seeds}
    return result | {f"text/first A {rate:g}": (run_text, "dynamic mask", rate) for rate in Text().first_rates}


def show(results: dict[str, Any]) -> None:
    console = Console(width=140)
    recall = Table(
        title=f"Recall: {Recall().pairs} pairs in {Recall().length} tokens, {Recall().keep} keys kept; accuracy"
    )
    for column in ("policy", *(f"seed {seed}" for seed in Recall().seeds)):
        recall.add_column(column)
    for name in POLICIES:
        runs = [results.get(f"recall/{name}/seed {seed}") for seed in Recall().seeds]
        recall.add_row(name, *("-" if run is None else f"{run['accuracy']:.1%}" for run in runs))
    console.print(recall)
    text = Table(
        title=f"Text: {Text().keep} of {Text().context} keys kept; held-out bits per byte, before and after training"
    )
    for column in ("policy", *(f"rows of {n:,}" for n in Text().read_in)):
        text.add_column(column)
    for name in POLICIES:
        run = results.get(f"text/{name}")
        if run is not None:
            text.add_row(name, *(f"{run['before'][str(n)]:.3f} -> {run['after'][str(n)]:.3f}" for n in Text().read_in))
    console.print(text)
    first = Table(title=f"Dynamic mask before any training, rows of {Text().context:,}, by the first value of A")
    for column in ("A", "held-out bits per byte"):
        first.add_column(column)
    for rate in Text().first_rates:
        run = results.get(f"text/first A {rate:g}")
        if run is not None:
            first.add_row(f"{rate:g}", f"{run['before'][str(Text().context)]:.3f}")
    console.print(first)


def main(
    out: Annotated[Path, typer.Option(help="Results; read first, so that a second call goes on.")],
    only: Annotated[str, typer.Option(help="Run the jobs whose name contains this.")] = "",
) -> None:
    stored: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"results": {}}
    stored |= {"recall": asdict(Recall()), "text": asdict(Text()), "torch": torch.__version__}
    waiting = {name: job for name, job in jobs().items() if name not in stored["results"] and only in name}
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(*job): name for name, job in waiting.items()}
        for future in as_completed(futures):
            stored["results"][futures[future]] = future.result()
            typer.echo(f"done: {futures[future]}")
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(stored, indent=1) + "\n")
    show(stored["results"])


if __name__ == "__main__":
    typer.run(main)
