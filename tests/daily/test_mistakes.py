"""Mistakes of the first hour: each message says what was given, what is expected, what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from everyday_models import llama
from transformers import AutoTokenizer
from typer.testing import CliRunner

import rewriter
from rewriter import Policy
from rewriter import PolicyError
from rewriter import PolicyWarning
from rewriter import RewriteError
from rewriter import SeparatorMask
from rewriter import SlidingWindow
from rewriter.cli import app

TOKENIZER = Path(rewriter.__file__).parent / "demo" / "model"


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: rewriter.optimize("tiny"), "expected a torch.nn.Module, got str; load it first"),  # type: ignore[arg-type]
        (lambda: SeparatorMask([".", ","]), r"got '\.'; SeparatorMask\.from_tokenizer"),  # type: ignore[arg-type, list-item]
        (lambda: SeparatorMask(".,"), r"got '\.,'; SeparatorMask\.from_tokenizer"),  # type: ignore[arg-type]
        (lambda: SeparatorMask.from_tokenizer("tiny"), "expected a tokenizer of transformers, got 'tiny'; load it first"),
        (lambda: Policy.from_dict({"policy": "SlidingWindw", "window": 3}), "did you mean SlidingWindow?"),
        (lambda: Policy.from_dict({"policy": "SlidingWindow", "windw": 3}), "no field 'windw'; it has window, sinks"),
        (lambda: Policy.from_dict({"policy": "SlidingWindow"}), "SlidingWindow needs 'window'"),
    ],
)  # fmt: skip
def test_messages(mistake: Callable[[], Any], message: str) -> None:
    with pytest.raises((PolicyError, RewriteError), match=message):
        mistake()


def test_weights_of_attention_are_asked_of_a_fused_one() -> None:
    fast = rewriter.optimize(llama(), SlidingWindow(4), backend="eager")
    with pytest.raises(RewriteError, match="load the model with attn_implementation='eager'"):
        fast(torch.randint(3, 64, (1, 9)), output_attentions=True)


def test_a_policy_that_is_not_applied_is_a_warning() -> None:
    fast = rewriter.optimize(llama(attn_implementation="eager"), SlidingWindow(4), backend="eager")
    with pytest.warns(PolicyWarning, match="2 of 2 attention sites keep all their keys.*strict=True"):
        output = fast(torch.randint(3, 64, (1, 9)), output_attentions=True, use_cache=False)
    assert len(output.attentions) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "SlidingWindow"], "Expecting value"),
        (["--policy", "[1]"], "must be a JSON object"),
        (["--policy", '{"policy": "ChunkedEvicton"}'], "did you mean ChunkedEviction?"),
        (["--policy", '{"policy": "SlidingWindow", "windw": 4}'], "did you mean window"),
        (["--text", "no such file"], "there is no such file"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["explain", str(TOKENIZER), *arguments], env={"COLUMNS": "400"})
    assert result.exit_code == 2 and message in result.output, result.output


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    llama().config.save_pretrained(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("Once.")
    result = CliRunner().invoke(app, ["explain", str(tmp_path), "--text", str(text)], env={"COLUMNS": "400"})
    assert result.exit_code == 2 and "--text needs a tokenizer" in result.output, result.output
    arguments = [
        "export",
        "--model",
        str(tmp_path),
        "--to",
        "onnx",
        "--out",
        str(tmp_path / "m.onnx"),
        "--dtype",
        "fp32",
    ]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "400"})
    assert result.exit_code == 2 and "--dtype must be float32, bfloat16 or float16, got fp32" in result.output


def test_separators_from_the_tokenizer(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x\n" * 20)
    policy = (
        '{"policy": "PerLayer", "layers": {"default": {"policy": "SeparatorMask", "separators": "from tokenizer"}}}'
    )
    arguments = ["explain", str(TOKENIZER), "--text", str(text), "--length", "64", "--policy", policy]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "400"})
    expected = len(SeparatorMask.from_tokenizer(AutoTokenizer.from_pretrained(TOKENIZER)).separators)
    assert result.exit_code == 0 and f"{expected} separators" in result.output, result.output


def test_notebooks_show_the_report() -> None:
    fast = rewriter.optimize(llama(), SlidingWindow(4), backend="eager")
    fast(torch.randint(3, 64, (1, 9)))
    assert "2 of 2 attention sites rewritten" in fast._repr_html_() and "<pre" in fast.report._repr_html_()
