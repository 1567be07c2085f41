"""The examples at small sizes: each runs, and what it says of itself holds against the original model with a dense mask."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer

import rewriter

FOLDER = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    """An example as a module; what other tests have compiled is forgotten."""
    torch._dynamo.reset()
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def dense_logits(folder: Path, ids: Tensor, visible: Tensor) -> Tensor:
    """The original model's logits `[S, vocabulary]` of one row under a mask, bool `[S, S]`."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(input_ids=ids, attention_mask=visible[None, None], use_cache=False).logits[0]


def test_there_is_a_test_and_a_line_for_each() -> None:
    scripts = sorted(FOLDER.glob("*.py"))
    readme = (FOLDER / "README.md").read_text()
    assert len(scripts) == 8
    for script in scripts:
        assert f"`{script.name}`" in readme
        assert f"test_{script.stem}" in globals()
        assert len(script.read_text().splitlines()) < 60


def test_train_with_a_policy(capsys: pytest.CaptureFixture[str]) -> None:
    before, after = load("train_with_a_policy").main(steps=10, length=64, rows=4, keep=8, backend="eager")
    assert after < before - 0.03
    out = capsys.readouterr().out
    # In each of 4 layers a W of 2 x 64, and an A of 2.
    assert "DynamicMask(keep=8, local=8): 520 parameters of its own" in out
    assert f"{after:.3f} after" in out


def test_generate(capsys: pytest.CaptureFixture[str]) -> None:
    example = load("generate")
    text, replies, sizes, cache = example.main(window=12, sinks=2, max_new_tokens=6, backend="eager")
    query, key = torch.arange(text.size(1))[:, None], torch.arange(text.size(1))[None, :]
    logits = dense_logits(example.MODEL, text, (key <= query) & ((query - key < 12) | (key < 2)))
    assert len(replies) == 3 and text.size(1) > 4 * (12 + 2)
    for begin, end in replies:
        assert 0 < end - begin <= 6
        assert text[0, begin:end].tolist() == logits[begin - 1 : end - 1].argmax(-1).tolist()
    assert cache.capacities == [12 + 2]
    assert len(set(sizes)) == 1
    assert "14 slots" in capsys.readouterr().out


def test_stream(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    caches: list[Any] = []
    made: list[rewriter.OptimizedModel] = []
    new_cache = rewriter.OptimizedModel.new_cache

    def kept(self: rewriter.OptimizedModel, *args: Any) -> Any:
        made.append(self)
        caches.append(new_cache(self, *args))
        return caches[-1]

    monkeypatch.setattr(rewriter.OptimizedModel, "new_cache", kept)
    example = load("stream")
    actual = torch.tensor(example.main(tokens=600, capacity=48, window=16, report=200, backend="eager"))
    tokenizer = AutoTokenizer.from_pretrained(example.MODEL)
    ids = torch.tensor([token for token, _ in zip(example.source_code(tokenizer), range(600), strict=False)])
    # The same ranges in one forward over the whole text.
    with torch.no_grad():
        logits = made[0](input_ids=ids[None], use_cache=False).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    (cache,) = caches
    assert cache.length == 600
    assert cache.capacities == [48 + 1]
    keys_and_values = 4 * 2 * 2 * 32 * 4 * 49  # layers, keys and values, heads, dimension, bytes, slots
    assert keys_and_values <= cache.num_bytes < 1.1 * keys_and_values
    assert capsys.readouterr().out.count("bits per token") == 3


def test_long_context(capsys: pytest.CaptureFixture[str]) -> None:
    reading, right, ids = load("long_context").main(tokens=1500, chunk=192, capacity=40, query=48, backend="eager")
    (scores,), (kept,) = reading.scores, reading.kept
    assert len(scores) == 8
    assert min(range(8), key=scores.__getitem__) == right
    assert right in kept and len(kept) == 2
    # Of each kept chunk 40 keys, and the context's first token once.
    assert capsys.readouterr().out.count(", holds the query") == 1
    first = min(tensor.size(2) for tensor in reading.cache.state() if tensor.dim() == 4)
    assert 81 <= first < 1500 / 4
    assert ids.size(1) > 48
    assert ids[0, :48].tolist() == reading.query_ids[0].tolist()


def run_in_processes(name: str, size: int, *options: str) -> str:
    """What an example prints that is started by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    example = [str(FOLDER / name), "--steps", "2", "--backend", "eager", *options]
    run = subprocess.run([*command, *example], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def test_spread_a_text() -> None:
    """The losses are those of one process."""
    losses = []
    for size in (1, 2):
        printed = run_in_processes("spread_a_text.py", size, "--length", "256", "--window", "32")
        found = re.findall(rf"step \d: loss ([\d.]+) of 256 tokens over {size} processes", printed)
        losses.append([float(loss) for loss in found])
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], abs=2e-4)


def test_train_in_stages() -> None:
    """The losses are those of one stage."""
    losses = []
    for size in (1, 2):
        printed = run_in_processes("train_in_stages.py", size, "--length", "160")
        assert f"{size} stages, 4 microbatches of 2 x 160 tokens" in printed
        losses.append([float(loss) for loss in re.findall(r"step \d: loss ([\d.]+)", printed)])
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], abs=2e-4)


def test_export_and_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    difference = load("export_and_run").main(folder=tmp_path, window=6, layers=1)
    assert difference < 1e-3
    assert (tmp_path / "model.onnx").stat().st_size > 1e6
    assert "onnx: " in capsys.readouterr().out


def test_own_policy() -> None:
    example = load("own_policy")
    losses = example.main(window=8, levels=3, tokens=160, backend="eager")
    own = example.Fading(8, 3)
    tokenizer = AutoTokenizer.from_pretrained(example.MODEL)
    ids = tokenizer(example.inspect.getsource(example.argparse), return_tensors="pt").input_ids[:, :160]

    life = torch.tensor([8 * max(2**level for level in range(4) if place % 2**level == 0) for place in range(160)])
    query, key = torch.arange(160)[:, None], torch.arange(160)[None, :]
    visible = (key <= query) & (query - key < life)
    loss = torch.nn.functional.cross_entropy(dense_logits(example.MODEL, ids, visible)[:-1], ids[0, 1:])
    assert losses[str(own)] == pytest.approx(loss.item(), abs=1e-4)
    assert int(visible.sum(1).max()) == own.pressure(160) == 20
    assert losses["Exact()"] < losses[str(own)]

    model = AutoModelForCausalLM.from_pretrained(example.MODEL, dtype=torch.float32).eval()
    fast = rewriter.optimize(model, own, backend="eager")
    cache = fast.new_cache()
    text = fast.generate(ids[:, :100], past_key_values=cache, max_new_tokens=4, do_sample=False)
    logits = dense_logits(example.MODEL, text, visible[: text.size(1), : text.size(1)])
    assert text[0, 100:].tolist() == logits[99:-1].argmax(-1).tolist()
    assert cache.capacities == [20]
