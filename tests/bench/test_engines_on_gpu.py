"""The measurement of engines on a GPU cannot rot: it is rehearsed here, with ONNX files in the place of engines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rewriter.export.targets.tensorrt_engine import installed

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(
    not hasattr(installed(), "ComputeCapability"),
    reason="needs TensorRT-RTX, which builds without a GPU: the extra tensorrt",
)
def test_a_model_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "rehearsal.json"
    command = [
        sys.executable,
        "bench/engines_on_gpu.py",
        "--rehearse",
        "--only",
        "Llama under a window",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found["card"] == "rehearsal" and list(found["models"]) == ["Llama under a window"]
    row = found["models"]["Llama under a window"]
    assert set(row["engines"]) == {"prefill", "decode"} and max(c["relative"] for c in row["compared"]) < 1e-3
    contestants = {f"{who}, {length}" for who in ("engine", "package", "torch.compile") for length in (16, 24)}
    assert row["seconds"].keys() == contestants
    assert all(0 < seconds < 60 for pair in row["seconds"].values() for seconds in pair)
