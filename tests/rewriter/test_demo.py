"""The demo on a shorter text: the same code, the first layers of the same model, a table whose figures are consistent."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from rewriter.cli import app
from rewriter.demo import corpus
from rewriter.demo import run as demo
from rewriter.demo.models import MODEL
from rewriter.demo.models import load_bundled


def test_the_bundled_model_has_learned() -> None:
    """Below the 2.0 bits per byte that was asked of it, and below gzip -9, on text it has never seen."""
    model, tokenizer = load_bundled()
    text = corpus.held_out_text(12_000, "tarfile.py")
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]])
    with torch.no_grad():
        bits = demo._bits_per_byte(demo._logits(model, ids), ids, text)
    training = json.loads((MODEL / "training.json").read_text())
    assert bits < 2.0
    assert training["held_out_bits_per_byte"] < min(2.0, training["gzip_9_bits_per_byte"])
    assert sum(f.stat().st_size for f in MODEL.iterdir()) < 8e6


def test_held_out_modules_are_not_trained_on() -> None:
    held_out, training = set(corpus.held_out_files()), set(corpus.training_files())
    assert len(held_out) >= 8
    assert not held_out & training
    assert len(training) > 100
    with pytest.raises(ValueError, match=r"'os\.py' is not a held-out module"):
        corpus.held_out_text(10, "os.py")
    with pytest.raises(ValueError, match="were asked for"):
        corpus.held_out_text(10**9, "heapq.py")


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.soak)])
def test_demo(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "optimize", functools.partial(demo.optimize, backend=backend))
    monkeypatch.setattr(demo, "NUM_BYTES", 3000)
    monkeypatch.setattr(demo, "LENGTHS", (256, 512))
    model, tokenizer = load_bundled()
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    monkeypatch.setitem(demo.MODELS, "bundled", lambda: (model, tokenizer))
    original, compiled, exact, window, separators, mixed = demo.run(tmp_path, Console(quiet=True))
    assert compiled.bits_per_byte == original.bits_per_byte
    assert exact.bits_per_byte == pytest.approx(original.bits_per_byte, rel=1e-5)
    assert exact.kept == 1.0
    for row in (exact, window, separators, mixed):
        assert row.sites == "2 of 2"
        assert row.largest_difference is not None
        assert row.largest_difference < 1e-3
        assert row.work_ratio is not None
        assert 1.0 <= row.work_ratio < 2.0
    assert separators.kept < mixed.kept < exact.kept
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"demo.json", "masks.png", "time-against-length.png", "report.html"}


def test_command_line(tmp_path: Path) -> None:
    runner = CliRunner()
    assert "demo" in runner.invoke(app, ["--help"]).output
    for command in ("demo", "explain"):
        assert runner.invoke(app, [command, "--help"]).exit_code == 0
    result = runner.invoke(app, ["explain", str(MODEL), "--html", str(tmp_path / "r.html")])
    assert result.exit_code == 0, result.output
    assert "4 of 4 attention sites rewritten" in result.output
    assert (tmp_path / "r.html").is_file()
    missing = runner.invoke(app, ["explain", str(tmp_path)])
    assert missing.exit_code == 2


def test_explain_from_the_command_line(tmp_path: Path) -> None:
    """Weights are not needed, the page and the JSON are written, and what cannot be done says why."""
    import transformers

    runner = CliRunner()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    for name, config in (
        ("bert", transformers.BertConfig(vocab_size=64, **sizes)),
        ("vit", transformers.ViTConfig(**sizes)),
    ):
        config.save_pretrained(tmp_path / name)
    torch._dynamo.reset()
    out = tmp_path / "r.json"
    result = runner.invoke(app, ["explain", str(tmp_path / "bert"), "--length", "100", "--json", str(out)])
    assert result.exit_code == 0, result.output
    sites = json.loads(out.read_text())["graphs"][-1]["sites"]
    assert [(s["mask"], s["prediction"]["num_keys"]) for s in sites] == [("padding", 100)] * 2
    several = ["--policy", '{"policy": "Exact"}', "--policy", '{"policy": "SlidingWindow", "window": 8}']
    page = tmp_path / "several.html"
    result = runner.invoke(
        app, ["explain", str(MODEL), *several, "--length", "64", "--json", str(out), "--html", str(page)]
    )
    assert result.exit_code == 0, result.output
    assert [report["subject"]["policy"] for report in json.loads(out.read_text())] == [
        "Exact()",
        "SlidingWindow(window=8, sinks=0)",
    ]
    assert "Policies side by side" in page.read_text()
    tokens = tmp_path / "tokens.txt"
    tokens.write_text("def f(x):\n    return x\n" * 40)
    separators = ["--policy", '{"policy": "SeparatorMask", "separators": [5, 6, 7], "window": 8}']
    result = runner.invoke(app, ["explain", str(MODEL), *separators, "--length", "64", "--text", str(tokens)])
    assert result.exit_code == 0 and "64" in result.output, result.output
    for message, arguments in (
        ("reads no text", [str(tmp_path / "vit")]),
        ("give --text FILE", [str(MODEL), *separators]),
        ("SlidingWindow", [str(MODEL), "--policy", '{"policy": "SlidingWindow", "window": 0}']),
        ("Expecting value", [str(MODEL), "--policy", "x"]),
    ):
        result = runner.invoke(app, ["explain", *arguments])
        assert result.exit_code == 2 and message in " ".join(result.output.replace("│", " ").split()), result.output
