"""How fast are engines of TensorRT on a GPU, and do they give what the model gives?

Three models in fp16 are exported with `prefill` and `decode`; the engines are compared with the model, and then take turns with
the package of AOTInductor and with the optimized model under torch.compile: one prompt at two lengths, then single tokens. Needs
a GPU of a compute capability that the installed TensorRT builds for; of data centres TensorRT-RTX 1.7 has 8.0 alone.

    python bench/engines_on_gpu.py --out bench/results/engines-on-gpu.json
    python bench/engines_on_gpu.py --rehearse --out rehearsal.json     # small, on the CPU; the files in the place of engines
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
from torch import Tensor

import rewriter
from rewriter import DynamicMask
from rewriter import Exact
from rewriter import SlidingWindow
from rewriter import export

STEPS = 32


def models(rehearsed: bool) -> dict[str, tuple[Callable[[], Any], rewriter.Policy]]:
    """Of the shape of SmolLM2-135M, with random weights."""
    sizes: dict[str, Any] = {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
    }
    if rehearsed:
        sizes.update(vocab_size=64, hidden_size=36, intermediate_size=48, num_hidden_layers=1)

    def llama() -> Any:
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))

    def qwen3() -> Any:
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, head_dim=64 if not rehearsed else 4))

    keep = 8 if rehearsed else 512
    return {
        "Llama": (llama, Exact()),
        "Llama under a window": (llama, SlidingWindow(keep, sinks=4)),
        "Qwen3": (qwen3, DynamicMask(keep, local=keep // 2)),
    }


def measure(
    build: Callable[[], Any], policy: rewriter.Policy, lengths: tuple[int, ...], device: torch.device, folder: Path
) -> dict[str, Any]:
    """Seconds of a prompt of each length and of one token after it, by contestant, and how far engines are off the model."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    on_gpu = device.type == "cuda"
    model = build().to(device, torch.float16 if on_gpu else torch.float32).eval()
    most = max(lengths) + STEPS
    two = torch.randint(3, 60, (2, 16), device=device)
    kwargs = {"input_ids": two, "attention_mask": torch.ones_like(two), "use_cache": False}
    eager = rewriter.optimize(model, policy, backend="eager", strict=True, progress=False)
    profile = {"batch": (1, 1, 4), "tokens": (2, lengths[0], max(lengths)), "kept": (1, 1, 8)}
    file = folder / "model.trt.onnx"
    report = export.tensorrt(eager, kwargs=kwargs, path=file, cache=True, max_length=most, profile=profile)
    engine = file.with_suffix(".engine") if on_gpu else file
    off = export.compare(engine)
    export.aot_inductor(eager, kwargs=kwargs, path=folder / "model.pt2", max_length=most)
    compiled = rewriter.optimize(model, policy, strict=True, progress=False)

    def over_artifact(artifact: Any) -> Callable[[Tensor], Callable[[Tensor], Any]]:
        def start(prompt: Tensor) -> Callable[[Tensor], Any]:
            cache = artifact.new_cache(1)
            artifact.run(cache, prompt)
            return lambda token: artifact.run(cache, token)

        return start

    def over_model(prompt: Tensor) -> Callable[[Tensor], Any]:
        cache = compiled.new_cache(most)
        compiled(input_ids=prompt, past_key_values=cache, logits_to_keep=1)
        return lambda token: compiled(input_ids=token, past_key_values=cache, logits_to_keep=1)

    contestants = {
        "engine": over_artifact(export.load(engine)),
        "package": over_artifact(export.load(folder / "model.pt2")),
        "torch.compile": over_model,
    }
    best = {f"{who}, {length}": [math.inf, math.inf] for who in contestants for length in lengths}

    def clock() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    for round_ in range(4):
        for length in lengths:
            ids = torch.randint(3, 60, (1, length), device=device)
            for who, start in contestants.items():
                began = clock()
                go_on = start(ids)
                read = clock()
                for _ in range(STEPS):
                    go_on(ids[:, :1])
                times = (read - began, (clock() - read) / STEPS)
                if round_:  # the first one compiles
                    own = best[f"{who}, {length}"]
                    own[:] = [min(a, b) for a, b in zip(own, times, strict=True)]
    return {"policy": str(policy), "engines": report.engines, "compared": off, "seconds": best}


def main(
    out: Annotated[Path, typer.Option(help="File of the results.")],
    rehearse: Annotated[bool, typer.Option("--rehearse", help="Small models on the CPU; nothing is measured.")] = False,
    only: Annotated[str | None, typer.Option(help="One model.")] = None,
) -> None:
    device = torch.device("cpu" if rehearse else "cuda")
    if not rehearse and not torch.cuda.is_available():
        raise typer.BadParameter("engines run on a GPU, and there is none here; --rehearse runs the files on the CPU")
    lengths = (16, 24) if rehearse else (1024, 4096)
    card = "rehearsal" if rehearse else torch.cuda.get_device_name()
    stored: dict[str, Any] = {"card": card, "torch": torch.__version__, "models": {}}
    table = Table(title=f"Engines, {card}", title_justify="left")
    for column in (
        "model",
        "off the model",
        "tokens",
        "prompt: of the package",
        "of torch.compile",
        "one token",
        "same",
    ):
        table.add_column(column)
    for name, (build, policy) in models(rehearse).items():
        if only not in (None, name):
            continue
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            row = measure(build, policy, lengths, device, Path(folder))
        stored["models"][name] = row
        out.write_text(json.dumps(stored, indent=1) + "\n")
        off = max(c["relative"] for c in row["compared"])
        for length in lengths:
            engine, *others = (row["seconds"][f"{who}, {length}"] for who in ("engine", "package", "torch.compile"))
            ratios = (f"{engine[part] / other[part]:.2f}x" for part in (0, 1) for other in others)
            table.add_row(name, f"{off:.0e}", f"{length:,}", *ratios)
    Console(width=150).print(table)


if __name__ == "__main__":
    typer.run(main)
