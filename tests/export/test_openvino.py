"""OpenVINO, the second runtime that files are for, which shares no code with ONNX Runtime: it takes no functions of a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
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
    artifact = export.load(path, runtime="openvino")
    for rows, length in ((2, 9), (3, 21), (1, 40)):
        ids = torch.randint(3, 64, (rows, length))
        mask = torch.ones_like(ids)
        mask[0, : length // 4] = 0
        expected = export.load(path)(input_ids=ids, attention_mask=mask)
        actual = artifact(input_ids=ids, attention_mask=mask)
        torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
    assert max(c["relative"] for c in export.compare(path, "openvino")) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_packed_documents_stay_apart(runtime: str, tiny_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    torch._dynamo.reset()
    fast = prepared(tiny_model("llama", "sdpa", layers=1), SlidingWindow(5, sinks=1))
    ids, places = torch.randint(3, 64, (2, 9)), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 3, 0, 1, 2]])
    path = tmp_path / "model.onnx"
    kwargs = {"input_ids": ids, "position_ids": places, "use_cache": False}
    export.onnx(fast, kwargs=kwargs, path=path, functions=runtime == "onnxruntime")
    artifact = export.load(path, runtime)
    for lengths in ((4, 5), (7, 1, 20), (1, 1, 1, 30), (40,)):
        ids = torch.randint(3, 64, (1, sum(lengths)))
        places = torch.cat([torch.arange(length) for length in lengths])[None]
        actual = artifact(input_ids=ids, position_ids=places)
        expected = fast(input_ids=ids, position_ids=places, use_cache=False).logits
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        if len(lengths) > 1:
            as_one = fast(input_ids=ids, use_cache=False).logits
            assert not torch.allclose(as_one, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("name", "policy"), [("llama", SlidingWindow(5, sinks=1)), ("qwen3", DynamicMask(5))], ids=str)
def test_openvino_generates_over_the_cache(
    name: str, policy: rewriter.Policy, tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    torch._dynamo.reset()
    fast = prepared(tiny_model(name, "sdpa", layers=1), policy)
    path = tmp_path / "model.onnx"
    export.onnx(fast, kwargs=call(), path=path, functions=False, cache=True)
    ids = torch.randint(3, 64, (2, 11))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    actual = export.load(path, runtime="openvino").generate(ids, mask, max_new_tokens=12)
    assert torch.equal(actual, export.load(path).generate(ids, mask, max_new_tokens=12))


def test_a_runtime_that_cannot_open_a_file_says_so(tiny_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    torch._dynamo.reset()
    path = tmp_path / "model.onnx"
    export.onnx(prepared(tiny_model("llama", "sdpa", layers=1), Exact()), kwargs=call(), path=path)
    with pytest.raises(
        export.ArtifactError, match=r"(?s)model\.onnx cannot be loaded in openvino: .*LiveRangeAttention"
    ):
        export.load(path, runtime="openvino")
    with pytest.raises(export.ArtifactError, match="does not open in 'tflite'; it opens in onnxruntime, openvino"):
        export.load(path, runtime="tflite")
