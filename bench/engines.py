"""What does TensorRT's own parser and builder make of exported models, and how much memory would the engines need?

Models of several kinds are exported by `rewriter.export.tensorrt`, which parses the files and builds engines of them (needs the
extra `tensorrt`, and no GPU), of the model's own call, and where it generates of `prefill` and `decode`. The files are compared
with the model in ONNX Runtime and in OpenVINO. Then one small Llama, for engines of one row and up to so many tokens: its
activation memory, as the builder says it.

    python bench/engines.py --out bench/results/engines.json

What is in `--out` already is not built again.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated
from typing import Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

import rewriter
from export import models as exported_models
from rewriter import Exact
from rewriter import SlidingWindow
from rewriter import export
from rewriter.demo.models import load_smollm2

TOKENS = (1024, 4096, 16384)
"""Most tokens of the engines whose memory is asked for."""

MOST = 2048
"""Tokens of the engines of causal models, of one row."""

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 128}


def text() -> dict[str, Any]:
    ids = torch.randint(5, 500, (2, 16), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def llama(most_tokens: int = MOST) -> Any:
    sizes = {"vocab_size": 512, "num_key_value_heads": 2, "max_position_embeddings": most_tokens, **SIZES}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def bert() -> Any:
    return transformers.BertModel(transformers.BertConfig(vocab_size=512, **SIZES), add_pooling_layer=False)


def vit() -> Any:
    config = transformers.ViTConfig(image_size=32, patch_size=4, **SIZES)
    return transformers.ViTModel(config, add_pooling_layer=False)


def whisper() -> Any:
    config = transformers.WhisperConfig(
        d_model=64,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=128,
        num_mel_bins=16,
        max_source_positions=50,
    )
    return transformers.models.whisper.modeling_whisper.WhisperEncoder(config)


def models() -> dict[str, tuple[Callable[[], Any], rewriter.Policy, dict[str, Any]]]:
    """Of each how it is made, the policy, and a call."""
    causal = {**text(), "use_cache": False}
    images = {"pixel_values": torch.randn(2, 3, 32, 32)}
    sound = {"input_features": torch.randn(2, 16, 100)}
    with_a_cache = {name: (build, policy, causal) for name, (build, policy) in exported_models().items()}
    return {
        **with_a_cache,
        "BERT": (bert, Exact(), text()),
        "ViT": (vit, Exact(), images),
        "Whisper's encoder": (whisper, Exact(), sound),
        "Llama, bf16": (lambda: llama().to(torch.bfloat16), SlidingWindow(256, sinks=4), causal),
        "SmolLM2-135M": (lambda: load_smollm2()[0], SlidingWindow(512, sinks=4), causal),
    }


def measure(
    build: Callable[[], Any], policy: rewriter.Policy, kwargs: dict[str, Any], **options: Any
) -> dict[str, Any]:
    """What was built, by entry point, or the reason why nothing was."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    fast = rewriter.optimize(build().eval(), policy, backend="eager", progress=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.trt.onnx"
        try:
            report = export.tensorrt(fast, kwargs=kwargs, path=path, **options)
        except export.ExportError as error:
            return {"policy": str(policy), "refused": str(error)[:500]}
        try:
            openvino: float | str = max(c["relative"] for c in export.compare(path, "openvino"))
        except export.ArtifactError as error:
            openvino = str(error).replace(str(path), "the file")[:300]
        file_bytes = sum(file.stat().st_size for file in Path(folder).iterdir() if ".onnx" in file.name)
    if not report.engines:
        raise typer.BadParameter("no TensorRT is installed: pip install 'rewriter[tensorrt]'")
    onnxruntime = max(c["relative"] for c in report.compared)
    return {
        "policy": str(policy),
        "file_bytes": file_bytes,
        "relative": onnxruntime,
        "openvino": openvino,
        "engines": {
            name: {part: value for part, value in engine.items() if part != "profile"}
            for name, engine in report.engines.items()
        },
    }


def table(rows: dict[str, dict[str, Any]]) -> Table:
    result = Table(title="Engines", title_justify="left")
    for name in (
        "model",
        "policy",
        "of",
        "layers",
        "engine",
        "activations",
        "parsed and built",
        "off the model",
        "in OpenVINO",
    ):
        result.add_column(name)
    for name, row in rows.items():
        if "refused" in row:
            result.add_row(name, row["policy"], row["refused"])
            continue
        for point, engine in row["engines"].items():
            sizes = (f"{engine[part] / 2**20:,.1f} MiB" for part in ("num_bytes", "activation_bytes"))
            openvino = row["openvino"] if isinstance(row["openvino"], str) else f"{row['openvino']:.0e}"
            seconds, off = f"{engine['build_seconds']:.1f} s", f"{row['relative']:.0e}"
            result.add_row(name, row["policy"], point, str(engine["layers"]), *sizes, seconds, off, openvino)
    return result


def main(
    out: Annotated[Path, typer.Option(help="File of the results.")] = Path("bench/results/engines.json"),
    only: Annotated[str | None, typer.Option(help="One model.")] = None,
) -> None:
    stored = json.loads(out.read_text()) if out.exists() else {"torch": torch.__version__, "models": {}, "memory": {}}
    out.parent.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        out.write_text(json.dumps(stored, indent=1) + "\n")

    for name, (build, policy, kwargs) in models().items():
        if name not in stored["models"] and only in (None, name):
            profile = {"batch": (1, 1, 1), "tokens": (2, 512, MOST)}
            most = {"profile": profile} if "use_cache" in kwargs else {}
            stored["models"][name] = measure(build, policy, kwargs, **most)
            if "use_cache" in kwargs:
                generates = {"profile": {**profile, "kept": (1, 1, 8)}, "cache": True, "max_length": MOST}
                stored["models"][f"{name}, with a cache"] = measure(build, policy, kwargs, **generates)
            save()
    for most in TOKENS if only is None else ():
        if str(most) not in stored["memory"]:
            profile = {"batch": (1, 1, 1), "tokens": (2, most, most)}
            stored["memory"][str(most)] = measure(
                partial(llama, most), SlidingWindow(256, sinks=4), {**text(), "use_cache": False}, profile=profile
            )
            save()
    Console(width=170).print(table(stored["models"]))
    Console(width=170).print(table({f"Llama, 1 row of {most} tokens": row for most, row in stored["memory"].items()}))


if __name__ == "__main__":
    typer.run(main)
