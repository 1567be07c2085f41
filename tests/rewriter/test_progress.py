"""What is said while a model is compiled, where there is a terminal, and `warmup`, after which nothing is compiled."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from rich.console import Console
from torch import nn

import rewriter
from rewriter import SlidingWindow
from rewriter import progress


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is written to stderr, which is a terminal here; compilations of any length are mentioned."""
    written = io.StringIO()
    monkeypatch.setattr(progress, "AFTER_SECONDS", 0.0)
    monkeypatch.setattr(progress, "_terminal", lambda: Console(file=written, force_terminal=True, width=250))
    return written


def call(fast: nn.Module, rows: int) -> None:
    with torch.no_grad():
        fast(input_ids=torch.randint(64, (rows, 12)))


def test_what_is_being_compiled_is_said_once_for_each_kind(
    terminal: io.StringIO, tiny_model: Callable[..., nn.Module]
) -> None:
    fast = rewriter.optimize(tiny_model("llama", "sdpa"), SlidingWindow(4), backend="eager")
    call(fast, 2)
    assert "LlamaForCausalLM: first call of this kind (input_ids [2, 12]): capturing the model" in terminal.getvalue()
    told = len(terminal.getvalue())
    call(fast, 3)
    assert len(terminal.getvalue()) == told
    call(fast, 1)
    assert "input_ids [1, 12]" in terminal.getvalue()[told:]
    assert not torch._dynamo.callback.callback_handler.start_callbacks


def test_nothing_is_said_where_it_is_not_wanted_or_there_is_no_terminal(
    terminal: io.StringIO, tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    call(rewriter.optimize(tiny_model("llama", "sdpa"), backend="eager", progress=False), 2)
    monkeypatch.undo()  # stderr is what it is: no terminal
    monkeypatch.setattr(progress, "AFTER_SECONDS", 0.0)
    monkeypatch.setattr("sys.stderr", terminal)
    call(rewriter.optimize(tiny_model("llama", "sdpa"), backend="eager"), 2)
    assert terminal.getvalue() == ""


def test_an_error_while_compiling_leaves_no_line(terminal: io.StringIO, tiny_model: Callable[..., nn.Module]) -> None:
    fast = rewriter.optimize(nn.Linear(3, 3), backend="eager")
    with pytest.raises(rewriter.RewriteError, match="no attention found"):
        fast(torch.zeros(2, 3))
    assert not torch._dynamo.callback.callback_handler.start_callbacks
    assert fast._progress._status is None and fast._progress._timer is None


def test_a_copy_has_its_own(tiny_model: Callable[..., nn.Module]) -> None:
    fast = rewriter.optimize(tiny_model("llama", "sdpa"), backend="eager", progress=False)
    again = copy.deepcopy(fast)
    assert again._progress is not fast._progress and not again._progress.enabled


def test_after_warmup_nothing_is_compiled(tiny_model: Callable[..., nn.Module]) -> None:
    fast = rewriter.optimize(tiny_model("llama", "sdpa").eval(), SlidingWindow(4, sinks=1), backend="eager")
    with torch.no_grad():
        report = fast.warmup(new_tokens=2)
    graphs = len(report.graphs)
    assert graphs >= 2
    ids = torch.randint(1, 64, (1, 9))
    with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):
        for rows in (1, 2, 5):
            given = {"input_ids": ids.expand(rows, -1), "attention_mask": torch.ones(rows, 9, dtype=torch.int64)}
            fast(**given)
            fast.generate(**given, max_new_tokens=3, do_sample=False)
    assert len(fast.report.graphs) == graphs


def test_warmup_needs_a_call_where_a_model_takes_no_text() -> None:
    fast = rewriter.optimize(nn.MultiheadAttention(16, 2, batch_first=True), backend="eager")
    with pytest.raises(rewriter.RewriteError, match="takes no input_ids; give warmup the arguments of a call"):
        fast.warmup()
    x = torch.randn(2, 5, 16)
    fast.warmup({"query": x, "key": x, "value": x, "need_weights": False})
    assert len(fast.report.graphs) == 1
