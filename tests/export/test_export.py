"""Artifacts give what the model gives, in Python and in C++, and say so when they cannot."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_models import SEPARATORS
from exported_models import call
from exported_models import prepared
from rewriter.export.artifact import cases_path
from rewriter.export.artifact import report_path
from rewriter.export.targets import tensorrt as tensorrt_engine
from torch import Tensor
from torch import nn
from typer.testing import CliRunner

import rewriter
from rewriter import Calibrate
from rewriter import ChunkedEviction
from rewriter import DynamicMask
from rewriter import Exact
from rewriter import PerLayer
from rewriter import SeparatorMask
from rewriter import SlidingWindow
from rewriter import export
from rewriter.cli import app

RUNNER = Path(export.__file__).parent / "runner"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> tuple[rewriter.OptimizedModel, Path, export.ExportReport]:
    """A package with a cache of 48 tokens, compiled once: one layer of a tiny Llama under a separator mask; the soak has two."""
    import transformers

    torch.manual_seed(0)
    torch._dynamo.reset()
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    fast = prepared(transformers.LlamaForCausalLM(config), SeparatorMask(SEPARATORS, initial=1, window=5))
    path = tmp_path_factory.mktemp("package") / "model.pt2"
    return fast, path, export.aot_inductor(fast, kwargs=call(), path=path, max_length=48)


@torch.no_grad()
def test_a_package_with_a_cache_reads_a_whole_text_in_one_call(
    package: tuple[rewriter.OptimizedModel, Path, export.ExportReport],
) -> None:
    fast, path, _ = package
    artifact = export.load(path)
    ids = torch.randint(3, 64, (3, 21))
    mask = (torch.arange(21) >= 2 * torch.arange(3)[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    expected = fast(**given, use_cache=False).logits
    torch.testing.assert_close(artifact(**given)[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        artifact(input_ids=ids), fast(input_ids=ids, use_cache=False).logits, rtol=1e-4, atol=1e-4
    )
    assert artifact(input_ids=ids[:, :1]).shape == (3, 1, 64)


def test_a_package_agrees_with_the_model(package: tuple[Any, Path, export.ExportReport]) -> None:
    _, path, report = package
    assert report.agrees and [c["sizes"] for c in report.compared] == [[3, 37], [1, 48]]
    assert max(c["relative"] for c in report.compared) < 1e-5
    assert list(report.entry_points) == ["prefill", "decode"] and report.max_length == 48
    assert report.functions == {"rewriter::live_range_attention": 2} and not report.kernels and not report.fallbacks
    written = json.loads(report_path(path).read_text())
    assert written["policy"]["policy"] == "SeparatorMask" and written["num_bytes"] == path.stat().st_size
    result = CliRunner().invoke(app, ["verify", str(path)])
    assert result.exit_code == 0 and result.output.count("yes") == 2, result.output


@torch.no_grad()
def test_a_package_generates_as_the_model_does(package: tuple[Any, Path, export.ExportReport]) -> None:
    fast, path, _ = package
    artifact = export.load(path)
    prompt = torch.randint(3, 64, (3, 11))
    mask = (torch.arange(11) >= torch.tensor([[0], [4], [7]])).long()
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = fast.generate(prompt, attention_mask=mask, **options)
    assert torch.equal(artifact.generate(prompt, mask, max_new_tokens=12), expected)
    # Views of a longer tensor have other strides.
    cache, logits = artifact.new_cache(3), []
    for part in (slice(0, 4), slice(4, 5), slice(5, 9), slice(9, 11)):
        rows = torch.arange(part.stop - part.start)
        logits.append(artifact.run(cache, prompt[:, part], logits_to_keep=rows))
    torch.testing.assert_close(
        torch.cat(logits, 1), fast(input_ids=prompt, use_cache=False).logits, rtol=1e-4, atol=1e-4
    )


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cmake = str(Path(sys.executable).with_name("cmake"))  # the test extra installs it
    build = tmp_path_factory.mktemp("runner")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in ([cmake, "-S", str(RUNNER), "-B", str(build), prefix], [cmake, "--build", str(build)]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "runner"


def run(runner: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([runner, *map(str, arguments)], capture_output=True, text=True)


@torch.no_grad()
def test_the_runner_prints_the_models_tokens_and_clear_errors(
    runner: Path, package: tuple[Any, Path, export.ExportReport], tmp_path: Path
) -> None:
    fast, path, _ = package
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for length in (1, 2, 17):
        prompt = torch.randint(3, 64, (1, length))
        expected = fast.generate(prompt, **options)[0, length:].tolist()
        done = run(runner, path, 9, *prompt[0].tolist())
        assert (done.returncode, done.stdout.split()) == (0, [str(t) for t in expected]), done.stderr
    cut = tmp_path / "cut.pt2"
    cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    cases: list[tuple[str, tuple[object, ...]]] = [
        ("usage: runner", (path, 3)),
        ("is not a file", (tmp_path / "none.pt2", 3, 5)),
        ("cannot be loaded", (cut, 3, 5)),
        ("'x' is not a number", (path, 3, "x")),
        ("token 64 is not from 0 to 63", (path, 3, 64)),
        ("50 tokens do not fit: the package was exported for 48", (path, 3, *range(3, 53))),
        ("49 tokens do not fit", (path, 10, *range(3, 43))),
        ("NEW_TOKENS must be at least 1", (path, 0, 5)),
    ]
    for message, arguments in cases:
        done = run(runner, *arguments)
        assert done.returncode in (1, 2) and message in done.stderr, (message, done)


def test_loading_says_what_is_wrong(package: tuple[Any, Path, export.ExportReport], tmp_path: Path) -> None:
    _, original, _ = package

    def copied(change: Callable[[dict[str, Any]], Any] | None = None) -> Path:
        path = tmp_path / original.name
        for part in (original, report_path(original), cases_path(original)):
            shutil.copy(part, tmp_path / part.name)
        if change is not None:
            report = json.loads(report_path(path).read_text())
            change(report)
            report_path(path).write_text(json.dumps(report))
        return path

    def refuse(message: str, path: Path) -> None:
        with pytest.raises(export.ArtifactError, match=message):
            export.load(path)

    path = copied()
    path.write_bytes(path.read_bytes()[:-100])
    refuse("damaged or cut off", path)
    result = CliRunner().invoke(app, ["verify", str(path)])
    assert result.exit_code == 2 and "damaged or cut off" in " ".join(result.output.replace("│", " ").split())
    refuse("format 0, this version reads 2", copied(lambda r: r.update(format=0)))
    refuse("compiled for sparc, this machine is", copied(lambda r: r.update(machine=["sparc", "cpu"])))
    refuse("compiled with torch 1.0", copied(lambda r: r["versions"].update(torch="1.0")))
    refuse("is not there", tmp_path / "other.pt2")
    path = copied()
    report_path(path).write_text("{}")
    refuse("no report of an artifact", path)
    path = copied()
    cases_path(path).write_bytes(b"nothing")
    with pytest.raises(export.ArtifactError, match="cannot be read"):
        export.compare(path)


def test_calls_are_checked(package: tuple[Any, Path, export.ExportReport]) -> None:
    artifact = export.load(package[1])
    ids = torch.randint(3, 64, (2, 9))
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("input_ids must be int64, got int32", lambda: artifact.run(artifact.new_cache(2), ids.int())),
        ("at least one token", lambda: artifact.run(artifact.new_cache(2), ids[:, :0])),
        ("batch is", lambda: artifact.run(artifact.new_cache(3), ids)),
        ("50 more do not fit", lambda: artifact.run(artifact.new_cache(1), torch.ones(1, 50, dtype=torch.long))),
        (
            "attention_mask must have sizes",
            lambda: artifact.run(artifact.new_cache(2), ids, torch.ones(2, 5, dtype=torch.long)),
        ),
        (
            "takes input_ids, attention_mask, position_ids; got input_ids, labels",
            lambda: artifact(input_ids=ids, labels=ids),
        ),
        ("takes input_ids, attention_mask, position_ids; got nothing", lambda: artifact()),
    ]
    for message, act in cases:
        with pytest.raises(export.ArtifactError, match=message):
            act()
    cache = artifact.new_cache(2)
    artifact.run(cache, ids)
    assert cache.length == 9


@pytest.mark.soak
@pytest.mark.parametrize(
    ("name", "policy", "entry_points"),
    [
        ("qwen3", DynamicMask(6, local=2), ["prefill", "decode"]),
        ("gemma2", PerLayer({0: SlidingWindow(4, sinks=1), "default": Exact()}), ["forward"]),
        ("llama", ChunkedEviction(24, capacity=4, calibration=(Calibrate("0-100%", "all", phase="local"),)), ["chunk"]),
    ],
    ids=["dynamic mask", "per layer, forward alone", "first phase of chunked eviction"],
)
def test_other_packages(
    name: str, policy: rewriter.Policy, entry_points: list[str], tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    fast = prepared(tiny_model(name, "eager" if name == "gemma2" else "sdpa"), policy)
    path = tmp_path / "model.pt2"
    report = export.aot_inductor(fast, kwargs=call(), path=path, cache=entry_points != ["forward"])
    assert list(report.entry_points) == entry_points
    assert report.agrees and max(c["relative"] for c in report.compared) < 1e-4, report.compared


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("llama", SeparatorMask(SEPARATORS, initial=1, window=5)),
        ("llama", SeparatorMask(SEPARATORS, initial=1, window=5, max_separators=2)),
        ("qwen3", DynamicMask(5)),
        pytest.param("gemma2", Exact(), marks=pytest.mark.soak),
        pytest.param("gpt2", PerLayer({0: Exact(), "default": SlidingWindow(5, sinks=1)}), marks=pytest.mark.soak),
        ("bert", Exact()),
        # Its softmax has sinks, and every second layer a window of its own.
        pytest.param("gpt_oss", SlidingWindow(5, sinks=1), marks=pytest.mark.soak),
    ],
    ids=str,
)
def test_onnx_runtime_gives_what_the_model_gives(
    name: str, policy: rewriter.Policy, tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    import onnx

    torch._dynamo.reset()
    fast = prepared(tiny_model(name, "eager" if name in ("gemma2", "gpt_oss") else "sdpa"), policy)
    kwargs = call()
    if name == "bert":
        del kwargs["use_cache"]
    path = tmp_path / "model.onnx"
    report = export.onnx(fast, kwargs=kwargs, path=path)
    assert report.agrees and max(c["relative"] for c in report.compared) < 1e-4, report.compared
    assert report.functions["rewriter::LiveRangeAttention"] == 2
    model = onnx.load(str(path))
    assert {f.name for f in model.functions} == {n.removeprefix("rewriter::") for n in report.functions}
    assert {e.domain: e.version for e in model.opset_import}[""] >= 23
    assert not any(a.name == "is_causal" for n in model.graph.node for a in n.attribute)
    ids = torch.randint(3, 64, (4, 21))
    artifact = export.load(path)
    logits = artifact(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert logits.shape == (4, 21, 64)
    with pytest.raises(export.ArtifactError, match="the artifact takes input_ids, attention_mask"):
        artifact(input_ids=ids)
    with pytest.raises(export.ArtifactError, match="was exported for 2 to 64"):
        artifact(input_ids=torch.ones(1, 65, dtype=torch.long), attention_mask=torch.ones(1, 65, dtype=torch.long))


def test_torch_tensorrt_that_is_missing_is_an_error(tiny_model: Callable[..., nn.Module]) -> None:
    if not _has_torch_tensorrt():
        with pytest.raises(export.ExportError, match="torch-tensorrt is not installed"):
            tensorrt_engine.compile_engine(prepared(tiny_model("llama", "sdpa", layers=1), Exact()), call())


def _has_torch_tensorrt() -> bool:
    import importlib.util

    return importlib.util.find_spec("torch_tensorrt") is not None


@pytest.mark.skipif(not torch.cuda.is_available() or not _has_torch_tensorrt(), reason="needs torch-tensorrt and a GPU")
def test_torch_tensorrt_runs_the_model(tiny_model: Callable[..., nn.Module]) -> None:
    fast = prepared(tiny_model("llama", "sdpa").cuda(), Exact())
    kwargs = {n: v.cuda() if isinstance(v, Tensor) else v for n, v in call().items()}
    engine = tensorrt_engine.compile_engine(fast, kwargs)
    actual = engine(*(v for v in kwargs.values() if isinstance(v, Tensor)))
    torch.testing.assert_close(actual, fast(**kwargs).logits, rtol=1e-3, atol=1e-3)


def test_an_operator_that_onnx_lacks_is_named(tiny_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = tiny_model("gpt_oss", "eager", layers=1)
    model.config._experts_implementation = "grouped_mm"  # type: ignore[union-attr]
    path = tmp_path / "model.onnx"
    with pytest.raises(
        export.ExportError, match=r"cannot write this model as ONNX: No ONNX function found for.*grouped"
    ):
        export.onnx(prepared(model, Exact()), kwargs=call(), path=path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("exporter", ["onnx", "aot_inductor"])
def test_a_mask_that_the_call_gives(exporter: str, tiny_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = tiny_model("llama", "sdpa")
    fast = prepared(model, Exact())
    index = torch.arange(12)
    mask = ((index[:, None] >= index) & (index[:, None] // 5 == index // 5)).expand(2, 1, 12, 12).contiguous()
    kwargs = {"input_ids": torch.randint(3, 64, (2, 12)), "attention_mask": mask, "use_cache": False}
    path = tmp_path / ("model.onnx" if exporter == "onnx" else "model.pt2")
    options = {} if exporter == "onnx" else {"cache": False}
    report = getattr(export, exporter)(fast, kwargs=kwargs, path=path, **options)
    assert report.agrees, report.compared
    holes = mask.clone()
    holes[:, :, 8, 6] = False
    given = {"input_ids": kwargs["input_ids"], "attention_mask": holes}
    expected = model(**given, use_cache=False).logits
    torch.testing.assert_close(export.load(path)(**given), expected, rtol=1e-4, atol=1e-4)


def test_refusals_come_before_anything_is_compiled(tiny_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    policy = SeparatorMask(SEPARATORS, initial=1, window=3, max_separators=2, capacity=8)
    fast = prepared(tiny_model("llama", "sdpa"), policy)
    for exporter in (export.onnx, export.tensorrt):
        with pytest.raises(export.ExportError, match="has no form in ONNX's standard operators"):
            exporter(fast, kwargs=call(), path=tmp_path / "model.onnx")
    plain = prepared(tiny_model("llama", "sdpa"), Exact())
    with pytest.raises(export.ExportError, match="opset must be at least 23"):
        export.onnx(plain, kwargs=call(), path=tmp_path / "model.onnx", opset=17)
    with pytest.raises(export.ExportError, match=r"no call of LlamaForCausalLM\.forward"):
        export.onnx(plain, (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11), {}, tmp_path / "model.onnx")
    short = {"input_ids": torch.ones(1, 1, dtype=torch.long), "use_cache": False}
    with pytest.raises(export.ExportError, match="at least two rows of two tokens"):
        export.onnx(plain, kwargs=short, path=tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
    result = CliRunner().invoke(app, ["export", "--model", str(tmp_path), "--to", "onnx", "--out", "x.onnx"])
    assert result.exit_code == 2 and "config.json" in result.output
