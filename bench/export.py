"""How large are artifacts, how long do they take to load, and how fast are they beside the model that they were made of?

Each model under a policy is compiled to a package with `prefill` and `decode` (AOTInductor), and written as an ONNX file. Then
one prompt and single tokens, in the package, in the optimized model run as it is ("eager"), and compiled by torch.compile;
and one forward in ONNX Runtime. In each round the contestants take turns.

    python bench/export.py --out bench/results/export.json

What is in `--out` already is not run again; a model takes some minutes.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated
from typing import Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

import rewriter
from rewriter import DynamicMask
from rewriter import Exact
from rewriter import SeparatorMask
from rewriter import SlidingWindow
from rewriter import export
from rewriter.demo.models import load_bundled

PROMPT, STEPS, MAX_LENGTH = 1024, 32, 2048


def models() -> dict[str, tuple[Callable[[], Any], rewriter.Policy]]:
    def config(kind: Any, **others: Any) -> Any:
        sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
        return kind(vocab_size=512, intermediate_size=128, max_position_embeddings=MAX_LENGTH, **sizes, **others)

    def gpt2() -> Any:
        sizes = {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": MAX_LENGTH}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))

    separators = SeparatorMask.from_tokenizer(load_bundled()[1], window=256)
    return {
        "bundled": (lambda: load_bundled()[0], separators),
        "Llama": (lambda: transformers.LlamaForCausalLM(config(transformers.LlamaConfig)), SlidingWindow(256, sinks=4)),
        "Qwen3": (
            lambda: transformers.Qwen3ForCausalLM(config(transformers.Qwen3Config, head_dim=16)),
            DynamicMask(192, local=64),
        ),
        "Gemma2": (
            lambda: transformers.Gemma2ForCausalLM(
                config(transformers.Gemma2Config, head_dim=16, sliding_window=256, attn_implementation="eager")
            ),
            Exact(),
        ),
        "GPT-2": (gpt2, Exact()),
    }


def seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


@torch.no_grad()
def measure(name: str, build: Callable[[], Any], policy: rewriter.Policy, rounds: int, folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = build().eval()
    ids = torch.randint(3, 500, (1, PROMPT + STEPS))
    two = ids[:, :16].repeat(2, 1)
    kwargs = {"input_ids": two, "attention_mask": torch.ones_like(two), "use_cache": False}
    eager = rewriter.optimize(model, policy, backend="eager", strict=True)
    package, file = folder / f"{name}.pt2", folder / f"{name}.onnx"
    row: dict[str, Any] = {
        "model": name,
        "policy": str(policy),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    reports = []
    row["aot_export_seconds"] = seconds(
        lambda: reports.append(export.aot_inductor(eager, kwargs=kwargs, path=package, max_length=MAX_LENGTH))
    )
    row["onnx_export_seconds"] = seconds(lambda: reports.append(export.onnx(eager, kwargs=kwargs, path=file)))
    row["relative_difference"] = [max(c["relative"] for c in r.compared) for r in reports]
    row["bytes"] = [r.num_bytes for r in reports]
    loaded: list[Any] = []
    row["load_seconds"] = [seconds(lambda path=path: loaded.append(export.load(path))) for path in (package, file)]
    compiled = rewriter.optimize(model, policy, strict=True)
    caches: dict[str, Any] = {}

    def over_model(who: str, fast: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
        def prefill() -> None:
            caches[who] = fast.new_cache(MAX_LENGTH)
            fast(input_ids=ids[:, :PROMPT], past_key_values=caches[who], logits_to_keep=1)

        def steps() -> None:
            for place in range(PROMPT, PROMPT + STEPS):
                fast(input_ids=ids[:, place : place + 1], past_key_values=caches[who], logits_to_keep=1)

        return prefill, steps

    def prefill() -> None:
        caches["package"] = loaded[0].new_cache(1)
        loaded[0].run(caches["package"], ids[:, :PROMPT])

    def steps() -> None:
        for place in range(PROMPT, PROMPT + STEPS):
            loaded[0].run(caches["package"], ids[:, place : place + 1])

    contestants = {"eager": over_model("eager", eager), "torch.compile": over_model("torch.compile", compiled)}
    contestants["package"] = (prefill, steps)
    best = {who: [math.inf, math.inf] for who in contestants}
    mask = torch.ones_like(ids[:, :PROMPT])
    forward = math.inf
    for round_ in range(rounds + 1):
        for who, (whole, single) in contestants.items():
            times = [seconds(whole), seconds(single) / STEPS]
            if round_:  # the first one compiles
                best[who] = [min(a, b) for a, b in zip(best[who], times, strict=True)]
        forward = min(forward, seconds(lambda: loaded[1](input_ids=ids[:, :PROMPT], attention_mask=mask)))
    return {**row, "prefill_and_token_seconds": best, "onnx_forward_seconds": forward}


def main(
    out: Annotated[Path, typer.Option(help="File of the results.")] = Path("bench/results/export.json"),
    only: Annotated[str | None, typer.Option(help="Models, separated by commas.")] = None,
    rounds: Annotated[int, typer.Option(help="Times that the contestants take turns.")] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    torch.set_num_threads(threads)
    rows = json.loads(out.read_text())["rows"] if out.exists() else []
    done = {row["model"] for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        for name, (build, policy) in models().items():
            if (only is None or name in only.split(",")) and name not in done:
                rows.append(measure(name, build, policy, rounds, Path(folder)))
                result = {"threads": threads, "torch": torch.__version__, "prompt": PROMPT, "rows": rows}
                out.write_text(json.dumps(result, indent=1) + "\n")
    Console(width=170).print(table(rows))


def table(rows: list[dict[str, Any]]) -> Table:
    result = Table(title=f"Artifacts; a prompt of {PROMPT:,} tokens, then single ones", title_justify="left")
    columns = ("package, ONNX file", "load, s", "off the model", "prefill of eager", "of torch.compile")
    for column in (
        "model",
        "policy",
        *columns,
        "one token of eager",
        "of torch.compile",
        "ONNX forward of eager prefill",
    ):
        result.add_column(column, justify="left" if column in ("model", "policy") else "right")
    for row in rows:
        best = row["prefill_and_token_seconds"]
        ratios = [best["package"][i] / best[who][i] for i in (0, 1) for who in ("eager", "torch.compile")]
        result.add_row(
            row["model"],
            row["policy"],
            ", ".join(f"{n / 2**20:.1f}" for n in row["bytes"]) + " MiB",
            ", ".join(f"{s:.2f}" for s in row["load_seconds"]),
            ", ".join(f"{d:.0e}" for d in row["relative_difference"]),
            *(f"{r:.2f}x" for r in ratios),
            f"{row['onnx_forward_seconds'] / best['eager'][0]:.2f}x",
        )
    return result


if __name__ == "__main__":
    typer.run(main)
