"""ONNX files that generate: `prefill` and `decode` over fixed-size tensors of a cache, which the files take and return."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from exported_models import SEPARATORS
from exported_models import call
from exported_models import prepared
from rewriter.export import verify
from rewriter.export.artifact import part_path
from rewriter.export.targets import onnx as target
from torch import nn

import rewriter
from rewriter import DynamicMask
from rewriter import Exact
from rewriter import PerLayer
from rewriter import SeparatorMask
from rewriter import SlidingWindow
from rewriter import export


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("llama", SeparatorMask(SEPARATORS, initial=1, window=5)),
        ("qwen3", DynamicMask(5, local=2)),
        ("gpt2", PerLayer({0: SlidingWindow(5, sinks=1), "default": Exact()})),
        pytest.param("llama", Exact(), marks=pytest.mark.soak),
        pytest.param("gemma2", SlidingWindow(5), marks=pytest.mark.soak),
        pytest.param("llama", SeparatorMask(SEPARATORS, initial=1, window=3, max_separators=2), marks=pytest.mark.soak),
    ],
    ids=str,
)
@torch.no_grad()
def test_files_generate_what_the_model_generates(
    name: str, policy: rewriter.Policy, tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    torch._dynamo.reset()
    layers = 2 if isinstance(policy, PerLayer) else 1
    fast = prepared(tiny_model(name, "eager" if name == "gemma2" else "sdpa", layers=layers), policy)
    path = tmp_path / "model.onnx"
    report = export.onnx(fast, kwargs=call(), path=path, cache=True, max_length=48)
    assert report.agrees and max(c["relative"] for c in report.compared) < 1e-5
    assert list(report.entry_points) == ["prefill", "decode"] and not report.no_decode
    assert set(report.beside) == {"model.decode.onnx", "model.onnx.data"}
    assert report.functions["rewriter::LiveRangeAttention"] == 2 * layers
    artifact = export.load(path)
    ids = torch.randint(3, 64, (3, 14))
    mask = (torch.arange(14) >= 4 * torch.arange(3)[:, None]).long()
    expected = fast.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(artifact.generate(ids, mask, max_new_tokens=20), expected)
    whole = artifact(input_ids=ids)
    torch.testing.assert_close(whole, fast(input_ids=ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, export.ExportReport]:
    """Of a tiny Llama with a cache of 48 tokens."""
    import transformers

    torch.manual_seed(0)
    torch._dynamo.reset()
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    fast = prepared(transformers.LlamaForCausalLM(config), Exact())
    path = tmp_path_factory.mktemp("files") / "model.onnx"
    return path, export.onnx(fast, kwargs=call(), path=path, cache=True, max_length=48)


def test_weights_are_written_once(files: tuple[Path, export.ExportReport]) -> None:
    path, _ = files
    places: dict[str, set[str]] = {}
    for file in (path, part_path(path, "decode")):
        model = onnx.load(str(file), load_external_data=False)
        for tensor in (t for t in model.graph.initializer if t.dims and math.prod(t.dims) >= 1024):
            assert tensor.data_location == onnx.TensorProto.EXTERNAL
            entries = {e.key: e.value for e in tensor.external_data}
            assert entries["location"] == "model.onnx.data" and int(entries["offset"]) % 4096 == 0
            places.setdefault(file.name, set()).add(entries["offset"])
    of_prefill, of_decode = places.values()
    assert of_prefill == of_decode and len(of_prefill) == 7


@torch.no_grad()
def test_a_full_cache_is_an_error(files: tuple[Path, export.ExportReport]) -> None:
    path, report = files
    assert report.max_length == 48
    artifact = export.load(path)
    cache = artifact.new_cache(1)
    artifact.run(cache, torch.randint(3, 64, (1, 47)))
    before = [t.clone() for t in cache.tensors]
    with pytest.raises(export.ArtifactError, match="the cache has 47 of at most 48 tokens, and 2 more do not fit"):
        artifact.run(cache, torch.randint(3, 64, (1, 2)))
    assert cache.length == 47 and all(torch.equal(a, b) for a, b in zip(before, cache.tensors, strict=True))
    assert artifact.run(cache, torch.randint(3, 64, (1, 1))).shape == (1, 1, 64)


@pytest.mark.parametrize("name", ["model.decode.onnx", "model.onnx.data"])
def test_every_file_is_needed_and_checked(name: str, files: tuple[Path, export.ExportReport], tmp_path: Path) -> None:
    path, _ = files
    for file in path.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damaged = bytearray((tmp_path / name).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / name).write_bytes(damaged)
    with pytest.raises(export.ArtifactError, match=f"{name} is damaged or cut off"):
        export.load(tmp_path / path.name)
    (tmp_path / name).unlink()
    with pytest.raises(export.ArtifactError, match=rf"{name} is not there; it belongs to model\.onnx"):
        export.load(tmp_path / path.name)


def test_another_name_or_format_is_an_error(files: tuple[Path, export.ExportReport], tmp_path: Path) -> None:
    path, report = files
    for file in path.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for name in ("model.onnx", "model.onnx.json"):
        (tmp_path / name).rename(tmp_path / name.replace("model", "other"))
    with pytest.raises(
        export.ArtifactError, match=r"written under another name: its decode is one of model\.decode\.onnx"
    ):
        export.load(tmp_path / "other.onnx")
    older = {**report.to_dict(), "format": 1, "engine": None}
    (tmp_path / "other.onnx.json").write_text(json.dumps(older))
    with pytest.raises(export.ArtifactError, match="has format 1, this version reads 2; export the model again"):
        export.load(tmp_path / "other.onnx")


def test_an_export_that_fails_leaves_the_one_before_it(
    files: tuple[Path, export.ExportReport], tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, report = files
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}

    def fails(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(onnx, "save_model", fails)
    torch._dynamo.reset()
    with pytest.raises(OSError, match="no space left"):
        export.onnx(prepared(tiny_model("llama", "sdpa", layers=1), Exact()), kwargs=call(), path=path)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before
    assert export.load(path).report.sha256 == report.sha256


def test_cases_fit_what_an_engine_takes(files: tuple[Path, export.ExportReport]) -> None:
    def points(batch: tuple[int, int], tokens: tuple[int, int]) -> list[Any]:
        return [
            SimpleNamespace(name="prefill", ranges={"batch": batch, "tokens": tokens, "kept": (1, 1)}),
            SimpleNamespace(name="decode", ranges={"batch": batch}),
        ]

    assert verify._sizes(points((1, 1024), (2, 4096)), None) == [(3, 37), (1, 150)]
    assert verify._sizes(points((1, 1), (512, 512)), None) == [(1, 516), (1, 516)]
    assert verify._sizes(points((2, 2), (2, 48)), 48) == [(2, 37), (2, 48)]
    assert verify._sizes(points((1, 8), (2, 7)), 7) == [(3, 7), (1, 7)]


@torch.no_grad()
def test_a_cache_has_the_types_of_the_model(tiny_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    torch._dynamo.reset()
    fast = prepared(tiny_model("qwen3", "sdpa", layers=1).to(torch.bfloat16), DynamicMask(5))
    path = tmp_path / "model.onnx"
    report = export.onnx(fast, kwargs=call(), path=path, cache=True)
    assert report.agrees
    cache = export.load(path).new_cache(2)
    before = [(t.dtype, t.shape) for t in cache.tensors]
    assert {dtype for dtype, _ in before} == {torch.bfloat16, torch.float32, torch.int32}
    export.load(path).run(cache, torch.randint(3, 64, (2, 6)))
    assert [(t.dtype, t.shape) for t in cache.tensors] == before


@pytest.mark.parametrize("functions", [True, False])
def test_large_weights_stand_in_a_file_of_their_own(
    functions: bool, tiny_model: Callable[..., nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "LARGEST_FILE", 1000)
    torch._dynamo.reset()
    path = tmp_path / "model.onnx"
    report = export.onnx(
        prepared(tiny_model("llama", "sdpa", layers=1), Exact()), kwargs=call(), path=path, functions=functions
    )
    assert report.agrees and list(report.beside) == ["model.onnx.data"]
    assert "cache=True" in report.no_decode
    with pytest.raises(export.ArtifactError, match=r"no decode, it has forward \(.*export with cache=True"):
        export.load(path).new_cache(1)


def test_a_model_without_a_cache_is_an_error(tiny_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    torch._dynamo.reset()
    kwargs = call()
    del kwargs["use_cache"]
    fast = prepared(tiny_model("bert", "sdpa"), Exact())
    with pytest.raises(export.ExportError, match="cache=True asks for prefill and decode, and there is no decode step"):
        export.onnx(fast, kwargs=kwargs, path=tmp_path / "model.onnx", cache=True)
    with pytest.raises(export.ExportError, match="max_length=48 bounds the cache, and there is none; give cache=True"):
        export.onnx(fast, kwargs=kwargs, path=tmp_path / "model.onnx", max_length=48)
    assert not list(tmp_path.iterdir())
