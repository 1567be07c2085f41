"""Engines over a cache: TensorRT builds them here, and what runs them is tried with a stand-in for its runtime."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from typing import ClassVar

import numpy as np
import pytest
import torch
from exported_models import call
from exported_models import prepared
from rewriter.export.artifact import ExportReport
from rewriter.export.artifact import part_path
from rewriter.export.artifact import report_path
from rewriter.export.loading import Artifact
from rewriter.export.targets import tensorrt_engine
from rewriter.export.targets import tensorrt_runner
from torch import Tensor
from torch import nn

from rewriter import Exact
from rewriter import SlidingWindow
from rewriter import export

pytestmark = pytest.mark.skipif(
    not hasattr(tensorrt_engine.installed(), "ComputeCapability"),
    reason="needs TensorRT-RTX, which builds without a GPU: pip install 'rewriter[tensorrt]'",
)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, export.ExportReport]:
    """Of a tiny Qwen3 under a window, for up to four rows; the path is that of the ONNX file."""
    import transformers

    torch.manual_seed(0)
    torch._dynamo.reset()
    config = transformers.Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    fast = prepared(transformers.Qwen3ForCausalLM(config), SlidingWindow(6, sinks=1))
    path = tmp_path_factory.mktemp("engines") / "model.trt.onnx"
    profile = {"batch": (1, 1, 4), "tokens": (2, 8, 40)}
    return path, export.tensorrt(
        fast, kwargs=call(), path=path, cache=True, capabilities=("8.6", "8.9"), profile=profile
    )


def test_prefill_and_decode_are_engines(engines: tuple[Path, export.ExportReport]) -> None:
    path, report = engines
    assert report.agrees and list(report.engines) == ["prefill", "decode"]
    assert set(report.beside) == {"model.trt.decode.onnx", "model.trt.onnx.data"}
    for name, engine in report.engines.items():
        file = part_path(path.with_suffix(".engine"), name)
        assert file.name == engine["file"] and file.stat().st_size == engine["num_bytes"] and engine["layers"] > 100
    assert report.engines["prefill"]["profile"]["input_ids"] == ((1, 2), (1, 8), (4, 40))
    assert report.engines["decode"]["profile"]["site0.key"] == ((1, 2, 7, 16), (1, 2, 7, 16), (4, 2, 7, 16))
    commands = path.with_name(path.name + ".sh").read_text().splitlines()
    assert len(commands) == 3 and "--onnx=model.trt.decode.onnx --saveEngine=model.trt.decode.engine" in commands[2]
    assert "table0.origin:4x1x1" in commands[2] and "table0.length" not in commands[2]


def test_engines_are_an_artifact_of_their_own(engines: tuple[Path, export.ExportReport]) -> None:
    file = engines[0].with_suffix(".engine")
    report = ExportReport.read(file)
    assert report.target == "tensorrt_engine" and report.machine[1] == "cuda"
    assert report.entry_points["prefill"]["ranges"] == {"batch": [1, 4], "tokens": [2, 40], "kept": [1, 64]}
    assert report.entry_points["decode"]["ranges"] == {"batch": [1, 4]}
    assert list(report.beside) == ["model.trt.decode.engine"]
    if not torch.cuda.is_available():
        assert not report.compared and any("rewriter verify model.trt.engine" in note for note in report.notes)
        with pytest.raises(export.ArtifactError, match="engines run on NVIDIA GPUs, and there is none here"):
            export.load(file)


@pytest.mark.parametrize(
    ("capability", "version", "message"),
    [
        ((9, 0), None, "built for compute capability 8.6, 8.9, and this GPU has 9.0"),
        ((8, 6), "1.2", r"tensorrt_rtx \S+ built the engine, and 1\.2 is installed"),
    ],
)
def test_another_machine_is_an_error(
    capability: tuple[int, int],
    version: str | None,
    message: str,
    engines: tuple[Path, export.ExportReport],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    if version is not None:
        monkeypatch.setattr(tensorrt_engine.installed(), "__version__", version)
    with pytest.raises(export.ArtifactError, match=message):
        export.load(engines[0].with_suffix(".engine"))


def test_an_engine_that_is_cut_off_is_an_error(engines: tuple[Path, export.ExportReport], tmp_path: Path) -> None:
    file = engines[0].with_suffix(".engine")
    for name in (file, part_path(file, "decode"), report_path(file)):
        (tmp_path / name.name).write_bytes(name.read_bytes())
    decode = part_path(tmp_path / file.name, "decode")
    decode.write_bytes(decode.read_bytes()[:1000])
    with pytest.raises(export.ArtifactError, match=r"model\.trt\.decode\.engine is damaged or cut off"):
        export.load(tmp_path / file.name)


class StandInRuntime:
    """TensorRT's runtime as its documentation has it, over the memory of this machine: ONNX Runtime computes.

    An "engine" is a file with the path of an ONNX file. Shapes and addresses are set by name; results are written to the
    addresses that were set.
    """

    __version__ = "1"
    types: ClassVar = {
        "tensor(float)": "FLOAT",
        "tensor(int64)": "INT64",
        "tensor(int32)": "INT32",
        "tensor(bool)": "BOOL",
    }

    class ILogger:
        def __init__(self) -> None:
            self.said: list[str] = []

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    @classmethod
    def Runtime(cls, logger: Any) -> StandInRuntime:
        return cls(logger)

    def deserialize_cuda_engine(self, plan: bytes) -> StandInRuntime | None:
        import onnxruntime

        if not plan.startswith(b"/"):
            return None
        self.session = onnxruntime.InferenceSession(plan.decode(), providers=["CPUExecutionProvider"])
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.outputs = {o.name: o for o in self.session.get_outputs()}
        return self

    @property
    def num_io_tensors(self) -> int:
        return len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, number: int) -> str:
        return [*self.inputs, *self.outputs][number]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self.types[(self.inputs | self.outputs)[name].type])

    def create_execution_context(self) -> StandInRuntime:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        return self

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return shape[0] <= 4 or "." in name

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return next(r for n, r in self._results() if n == name).shape

    def execute_async_v3(self, stream: int) -> bool:
        for name, result in self._results():
            ctypes.memmove(self.addresses[name], result.tobytes(), result.nbytes)
        return stream == 0

    def _results(self) -> list[tuple[str, np.ndarray]]:
        numpy_of = {"FLOAT": np.float32, "INT64": np.int64, "INT32": np.int32, "BOOL": np.bool_}
        given = {}
        for name in self.inputs:
            dtype = numpy_of[self.get_tensor_dtype(name).name]
            size = int(np.prod(self.shapes[name])) * np.dtype(dtype).itemsize
            given[name] = np.frombuffer(ctypes.string_at(self.addresses[name], size), dtype).reshape(self.shapes[name])
        return list(zip(self.outputs, self.session.run(list(self.outputs), given), strict=True))


@pytest.fixture
def on_the_stand_in(engines: tuple[Path, export.ExportReport], tmp_path: Path) -> Callable[..., Any]:
    """Makes the call of an entry point: its engine is a file that names the ONNX file it was built from."""
    path, _ = engines
    report = ExportReport.read(path.with_suffix(".engine"))

    def make(entry_point: str, plan: bytes | None = None) -> Any:
        file = tmp_path / f"{entry_point}.engine"
        file.write_bytes(plan or str(part_path(path, entry_point)).encode())
        return tensorrt_runner.load_engine(StandInRuntime, file, report, entry_point, torch.device("cpu"))

    return make


@torch.no_grad()
def test_engines_generate_what_their_files_generate(
    engines: tuple[Path, export.ExportReport], on_the_stand_in: Callable[..., Any]
) -> None:
    path, _ = engines
    report = ExportReport.read(path.with_suffix(".engine"))
    artifact = Artifact(
        replace(report, machine=(report.machine[0], "cpu")), {name: on_the_stand_in(name) for name in report.engines}
    )
    ids = torch.randint(3, 64, (3, 12))
    mask = (torch.arange(12) >= 3 * torch.arange(3)[:, None]).long()
    expected = export.load(path).generate(ids, mask, max_new_tokens=10)
    assert torch.equal(artifact.generate(ids, mask, max_new_tokens=10), expected)
    with pytest.raises(export.ArtifactError, match="input_ids has 5 batch, and the artifact was exported for 1 to 4"):
        artifact.generate(ids[:1].expand(5, -1), max_new_tokens=1)
    with pytest.raises(
        export.ArtifactError, match="input_ids has 41 tokens, and the artifact was exported for 2 to 40"
    ):
        artifact(input_ids=torch.randint(3, 64, (1, 41)))


def test_what_an_engine_does_not_take_is_an_error(
    engines: tuple[Path, export.ExportReport], on_the_stand_in: Callable[..., Any]
) -> None:
    with pytest.raises(export.ArtifactError, match=r"TensorRT does not load .*decode\.engine: it does not say why"):
        on_the_stand_in("decode", b"no engine")
    with pytest.raises(export.ArtifactError, match=r"has the tensors .*logits_to_keep.*, and its report"):
        on_the_stand_in("decode", str(engines[0]).encode())
    report = ExportReport.read(engines[0].with_suffix(".engine"))
    decode = on_the_stand_in("decode")
    tensors: list[Tensor] = [i.example({"batch": 5}, torch.device("cpu")) for i in report.inputs("decode")]
    with pytest.raises(export.ArtifactError, match=r"the engine takes no input_ids of \[5, 1\]"):
        decode(*tensors)
    with pytest.raises(export.ArtifactError, match="input_ids is on meta, and the engine runs on cpu"):
        decode(*(t.to("meta") for t in tensors))


def test_plugins_cannot_be_added() -> None:
    """Our kernels as a plugin: TensorRT-RTX has no way to add one to a network. Where this fails, it has one now."""
    trt = tensorrt_engine.installed()
    assert trt is not None and trt.__name__ == "tensorrt_rtx"
    assert not any(hasattr(trt.INetworkDefinition, f"add_plugin{kind}") for kind in ("", "_v2", "_v3"))


def test_nothing_is_left_where_an_engine_cannot_be_built(tiny_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    torch._dynamo.reset()
    fast = prepared(tiny_model("llama", "sdpa", layers=1), Exact())
    with pytest.raises(export.ExportError, match=r"builds no engine for compute capability 3\.5"):
        export.tensorrt(fast, kwargs=call(), path=tmp_path / "m.onnx", cache=True, max_length=48, capabilities=("3.5",))
    with pytest.raises(
        export.ExportError, match=r"m\.engine is the name of an engine; give that of the ONNX file, m\.onnx"
    ):
        export.tensorrt(fast, kwargs=call(), path=tmp_path / "m.engine")
    assert not list(tmp_path.iterdir())
