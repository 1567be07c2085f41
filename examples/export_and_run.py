"""Exports a model with its policy to one file, loads the file, and compares it with the model.

`--to onnx` writes a file for any ONNX runtime: the model's own call. `--to aot` writes a package of compiled code that also holds a
cache and a decode step, so that it can generate; the same package runs from C++. Either is compared with the model in a fresh
process before the exporter returns, and what was found is in the report.

    python examples/export_and_run.py --to aot --folder exported
"""

from __future__ import annotations

from pathlib import Path

import torch
import typer
from transformers import AutoModelForCausalLM
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import AutoTokenizer

import rewriter
import rewriter.export
from rewriter import SlidingWindow

MODEL = Path(rewriter.__file__).parent / "demo" / "model"


def main(to: str = "onnx", folder: Path = Path("exported"), window: int = 64, layers: int = 4) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    fast = rewriter.optimize(model, SlidingWindow(window, sinks=4), backend="eager")
    ids = tokenizer(["def read(path):\n    with open(path) as file:\n", "import os\n"], padding=True, padding_side="left", return_tensors="pt")
    call = dict(ids)
    call.pop("token_type_ids", None)
    print({k: v.shape for k, v in call.items()})
    folder.mkdir(parents=True, exist_ok=True)
    import time
    t = time.time()
    if to == "onnx":
        report = rewriter.export.onnx(fast, kwargs=call, path=folder / "model.onnx")
        artifact = rewriter.export.load(folder / "model.onnx")
    else:
        report = rewriter.export.aot_inductor(fast, kwargs=call, path=folder / "model.pt2")
        artifact = rewriter.export.load(folder / "model.pt2")
    print(time.time() - t)
    print(report)
    if to == "onnx":
        print((artifact(**call) - fast(**call).logits).abs().max())
    else:
        a = artifact.generate(**call, max_new_tokens=8)
        b = fast.generate(**call, max_new_tokens=8, do_sample=False)
        print(a, b)


if __name__ == "__main__":
    typer.run(main)
