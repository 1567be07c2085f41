"""OpenVINO, the second runtime that files are for, which shares no code with ONNX Runtime: it takes no functions of a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import openvino
import pytest
import torch
from exported_models import SEPARATORS
from exported_models import call
from exported_models import prepared
from torch import nn

import rewriter
from rewriter import DynamicMask
from rewriter import Exact
from rewriter import SeparatorMask
from rewriter import SlidingWindow
from rewriter import export


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("llama", Exact()),
        ("llama", SeparatorMask(SEPARATORS, initial=1, window=5)),
        ("llama", SeparatorMask(SEPARATORS, initial=1, window=3, max_separators=2)),
        ("qwen3", DynamicMask(5)),
        ("gpt2", SlidingWindow(5, sinks=1)),
        pytest.param("gemma2", Exact(), marks=pytest.mark.soak),
        ("bert", Exact()),
    ],
    ids=str,
)
def test_openvino_gives_what_the_model_gives(
    name: str, policy: rewriter.Policy, tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    torch._dynamo.reset()
    fast = prepared(tiny_model(name, "eager" if name == "gemma2" else "sdpa"), policy)
    kwargs = call()
    if name == "bert":
        del kwargs["use_cache"]
    path = tmp_path / "model.onnx"
    report = export.onnx(fast, kwargs=kwargs, path=path, functions=False)
    assert report.agrees and not report.functions
    model = onnx.load(str(path))
    assert not model.functions and {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(str(path)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for rows, length in ((2, 9), (3, 21), (1, 40)):
        ids = torch.randint(3, 64, (rows, length))
        mask = torch.ones_like(ids)
        mask[0, : length // 4] = 0
        expected = export.load(path)(input_ids=ids, attention_mask=mask)
        given = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        actual = torch.from_numpy(compiled(given)[0])
        torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
