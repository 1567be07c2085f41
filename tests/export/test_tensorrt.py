"""TensorRT's own parser and builder on what the exporter writes. Building needs no GPU; an engine is not run here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exported_models import SEPARATORS
from exported_models import call
from exported_models import prepared
from rewriter.export.artifact import report_path
from rewriter.export.targets import tensorrt as exporter
from rewriter.export.targets import tensorrt_engine
from rewriter.passes.graph.origin import line_of
from torch import Tensor
from torch import nn

import rewriter
from rewriter import DynamicMask
from rewriter import Exact
from rewriter import SeparatorMask
from rewriter import SlidingWindow
from rewriter import export

needs_builder = pytest.mark.skipif(
    tensorrt_engine.installed() is None, reason="needs the extra tensorrt: pip install 'rewriter[tensorrt]'"
)
BUILDS_FOR_OTHERS = hasattr(tensorrt_engine.installed(), "ComputeCapability")

CASES = [
    ("llama", Exact()),
    ("llama", SeparatorMask(SEPARATORS, initial=1, window=3)),
    ("llama", SeparatorMask(SEPARATORS, initial=1, window=3, max_separators=2)),
    ("llama", DynamicMask(keep=4)),
    ("qwen3", SlidingWindow(5, sinks=1)),
    ("gemma2", SlidingWindow(5)),
    ("gpt2", Exact()),
    ("bert", Exact()),
]


@needs_builder
@pytest.mark.parametrize(("name", "policy"), CASES, ids=str)
def test_an_engine_is_built(
    name: str, policy: rewriter.Policy, tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    fast = prepared(tiny_model(name, "eager" if name == "gemma2" else "sdpa"), policy)
    kwargs = call()
    if name == "bert":
        del kwargs["use_cache"]
    path = tmp_path / "model.trt.onnx"
    report = export.tensorrt(fast, kwargs=kwargs, path=path)
    assert report.agrees and not report.functions
    engine = report.engines["forward"]
    assert engine["layers"] > 100 and engine["activation_bytes"] > 0
    assert (tmp_path / "model.trt.engine").stat().st_size == engine["num_bytes"]
    assert engine["profile"]["input_ids"][0] == (1, 2) and engine["profile"]["input_ids"][2] == (8, 64)
    assert json.loads(report_path(path).read_text())["engines"]["forward"]["capabilities"] == list(
        engine["capabilities"]
    )
    command = (tmp_path / "model.trt.onnx.sh").read_text()
    assert "--minShapes=input_ids:1x2,attention_mask:1x2" in command and "--maxShapes=input_ids:8x64" in command


@needs_builder
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_engine_has_the_models_types(
    dtype: torch.dtype, tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    import onnx

    fast = rewriter.optimize(
        tiny_model("llama", "sdpa", layers=1).to(dtype).eval(), Exact(), backend="eager", strict=True
    )
    path = tmp_path / "model.onnx"
    report = export.tensorrt(fast, kwargs=call(), path=path)
    assert report.agrees and report.dtype == str(dtype).removeprefix("torch.")
    weights = [t.data_type for t in onnx.load(str(path)).graph.initializer if len(t.dims) == 2]
    own = {torch.float16: onnx.TensorProto.FLOAT16, torch.bfloat16: onnx.TensorProto.BFLOAT16}[dtype]
    assert len(weights) >= 8 and set(weights) == {own}
    assert export.load(path)(**{n: t for n, t in call().items() if n != "use_cache"}).dtype == dtype


@needs_builder
@pytest.mark.skipif(not BUILDS_FOR_OTHERS, reason="this TensorRT builds for its own GPU only")
def test_capabilities_are_asked_for(tiny_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    fast = prepared(tiny_model("llama", "sdpa", layers=1), Exact())
    report = export.tensorrt(fast, kwargs=call(), path=tmp_path / "one.onnx", capabilities=("8.6",))
    assert report.engines["forward"]["capabilities"] == ("8.6",)
    with pytest.raises(export.ExportError, match=r"builds no engine for compute capability 3\.5; it knows .*8\.0"):
        export.tensorrt(fast, kwargs=call(), path=tmp_path / "two.onnx", capabilities=("8.6", "3.5"))
    with pytest.raises(export.ExportError, match="no engine for compute capability"):
        export.tensorrt(fast, kwargs=call(), path=tmp_path / "two.onnx", capabilities=())
    assert not list(tmp_path.glob("two*"))


@needs_builder
def test_a_profile_bounds_the_engine(tiny_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    fast = prepared(tiny_model("llama", "sdpa", layers=1), Exact())
    memory = []
    for most in (16, 64):
        profile = {"batch": (1, 1, 2), "tokens": (2, 8, most)}
        report = export.tensorrt(fast, kwargs=call(), path=tmp_path / f"{most}.onnx", profile=profile)
        assert report.engines["forward"]["profile"]["input_ids"] == ((1, 2), (1, 8), (2, most))
        memory.append(report.engines["forward"]["activation_bytes"])
    assert memory[0] < memory[1]
    for wrong, message in (
        ({"rows": (1, 1, 1)}, r"names 'rows', which no input has; its sizes are batch, tokens"),
        ({"tokens": (2, 8, 65)}, r"profile of tokens must be three sizes that ascend, from 2 to 64, got \(2, 8, 65\)"),
        ({"tokens": (8, 2, 64)}, "three sizes that ascend"),
    ):
        with pytest.raises(export.ExportError, match=message):
            export.tensorrt(fast, kwargs=call(), path=tmp_path / "wrong.onnx", profile=wrong)
    assert not list(tmp_path.glob("wrong*"))


@needs_builder
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_have_the_sizes_that_the_model_allows(dtype: torch.dtype, tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.ViTConfig(image_size=16, patch_size=4, **sizes)
    model = transformers.ViTModel(config, add_pooling_layer=False).to(dtype).eval()
    fast = rewriter.optimize(model, Exact(), backend="eager", strict=True)
    images = torch.randn(2, 3, 16, 16, dtype=dtype)
    report = export.tensorrt(fast, kwargs={"pixel_values": images}, path=tmp_path / "model.onnx")
    assert report.agrees and report.engines and report.dtype == str(dtype).removeprefix("torch.")
    assert report.engines["forward"]["profile"]["pixel_values"] == ((1, 3, 16, 16), (1, 3, 16, 16), (8, 3, 16, 16))
    artifact = export.load(tmp_path / "model.onnx")
    assert artifact(pixel_values=images).shape == (2, 17, 32)
    with pytest.raises(export.ArtifactError, match=r"pixel_values must have sizes \['batch', 3, 16, 16\]"):
        artifact(pixel_values=torch.randn(2, 3, 16, 20, dtype=dtype))


class Determinant(nn.Module):
    """ONNX has an operator for it, and TensorRT's parser has not."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 16)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        y = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        return y + torch.linalg.det(y.unflatten(-1, (4, 4)))[..., None]


@needs_builder
def test_what_the_parser_refuses_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    ids = torch.randint(3, 64, (2, 9))
    fast = rewriter.optimize(Determinant().eval(), Exact(), backend="eager", strict=True)
    with pytest.raises(
        export.ExportError, match=r"parser does not take the model: Det \(node .*, test_tensorrt\.py:\d+\)"
    ):
        export.tensorrt(fast, kwargs={"input_ids": ids}, path=tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_without_tensorrt_the_file_is_written_and_the_report_says_so(
    tiny_model: Callable[..., nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "installed", lambda: None)
    fast = prepared(tiny_model("llama", "sdpa", layers=1), SlidingWindow(5, sinks=1))
    report = export.tensorrt(fast, kwargs=call(), path=tmp_path / "model.onnx")
    assert report.agrees and not report.engines
    assert any("no parser has seen it" in note for note in report.notes)
    assert not (tmp_path / "model.engine").exists()


@needs_builder
def test_a_file_that_is_cut_off_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"cut off")
    with pytest.raises(export.ExportError, match="parser does not take the model"):
        tensorrt_engine.build(tensorrt_engine.installed(), file, tmp_path / "model.engine", {}, None)
    assert not (tmp_path / "model.engine").exists()


def test_the_line_of_a_stack_trace_is_that_of_a_file() -> None:
    trace = 'File "/a/b/model.py", line 12, in forward\n    return x\n  File "<eval_with_key>.3", line 4, in forward\n    y = x'
    assert line_of(trace) == "model.py:12" and line_of("") == ""
