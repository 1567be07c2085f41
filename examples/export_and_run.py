"""Exports a model with its policy to a file, loads the file, and compares it with the model.

`--to onnx` writes the model's own call for any ONNX runtime. `--to aot` writes a package of compiled code that also holds a cache
and a decode step, so that it generates, from C++ too; compiling it takes minutes. The exporter itself compares what it wrote with
the model, in a fresh process and at other sizes, before it returns.
"""

from __future__ import annotations

from pathlib import Path

import rewriter.export
import torch
import typer
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer

import rewriter
from rewriter import SlidingWindow

MODEL = Path(rewriter.__file__).parent / "demo" / "model"


@torch.no_grad()
def main(to: str = "onnx", folder: Path = Path("exported"), window: int = 64, layers: int = 4) -> float:
    """Prints how large the artifact is and how far it is off; returns the largest difference of the logits."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    model.model.layers = model.model.layers[:layers]
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    fast = rewriter.optimize(model, SlidingWindow(window, sinks=4), backend="eager", strict=True)
    texts = ["def read(path):\n    with open(path) as file:\n        return", "import os\nimport"]
    batch = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    call = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    expected = fast(**call).logits

    folder.mkdir(parents=True, exist_ok=True)
    if to == "onnx":
        report = rewriter.export.onnx(fast, kwargs=call, path=folder / "model.onnx")
        actual = rewriter.export.load(folder / "model.onnx")(**call)
        real = call["attention_mask"].bool()
        difference = (actual - expected)[real].abs().max().item()
    else:
        report = rewriter.export.aot_inductor(fast, kwargs=call, path=folder / "model.pt2")
        artifact = rewriter.export.load(folder / "model.pt2")
        actual = artifact.run(artifact.new_cache(len(texts)), **call)  # the last token's logits
        difference = (actual - expected[:, -1:]).abs().max().item()
        print(tokenizer.decode(artifact.generate(**call, max_new_tokens=16)[0]))
    print(f"{report.target}: {report.num_bytes:,} bytes; entry points: {', '.join(report.entry_points)}")
    print(f"compared by the exporter: {', '.join(str(case) for case in report.compared)}")
    print(f"largest difference of the logits here: {difference:.1e}")
    return difference


if __name__ == "__main__":
    typer.run(main)
