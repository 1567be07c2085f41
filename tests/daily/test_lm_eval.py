"""lm-evaluation-harness over optimized models, on tasks made of local files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from transformers import MistralConfig
from transformers import MistralForCausalLM

import rewriter
from rewriter import SlidingWindow
from rewriter.demo.models import MODEL

CHOICE = """\
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.json}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""

PERPLEXITY = """\
task: local_perplexity
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.json}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""

ANSWER = """\
task: local_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.json}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "x"
generation_kwargs: {{max_gen_toks: 6, do_sample: false, until: ["zzz"]}}
metric_list: [{{metric: exact_match}}]
"""

TASKS = {"local_choice": CHOICE, "local_perplexity": PERPLEXITY, "local_answer": ANSWER}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks and their documents."""
    path = tmp_path_factory.mktemp("tasks")
    documents = [
        {"text": f"def f{i}(x):\n    y = x + {i}\n    return", "choices": [" y", " None", " x"], "answer": i % 3}
        for i in range(4)
    ]
    (path / "choice.json").write_text("\n".join(json.dumps(document) for document in documents))
    for name, text in TASKS.items():
        (path / f"{name}.yaml").write_text(text.format(folder=path))
    return path


def mistral(window: int | None) -> MistralForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(
        vocab_size=2048, num_key_value_heads=2, sliding_window=window, initializer_range=0.3, **sizes
    )
    return MistralForCausalLM(config).eval()


def results(model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the harness measures and what the model answers, by task."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(model=model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)
    assert found is not None
    answers = {name: [sample["resps"] for sample in samples] for name, samples in found["samples"].items()}
    return {"results": found["results"], "answers": answers, "config": found["config"]}


def numbers(answers: Any) -> list[float]:
    """All numbers in nested lists, in order; texts are compared apart."""
    if isinstance(answers, (list, tuple)):
        return [number for answer in answers for number in numbers(answer)]
    return [float(answers)] if isinstance(answers, (int, float)) else []


def test_the_harness_measures_the_model_under_its_policy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistral has the window by itself."""
    from lm_eval.models.huggingface import HFLM

    from rewriter.integrations.lm_eval import RewrittenLM

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    options = {"tokenizer": tokenizer, "device": "cpu", "batch_size": 2}
    expected = results(HFLM(pretrained=mistral(4), **options), folder, monkeypatch)
    whole = results(HFLM(pretrained=mistral(None), **options), folder, monkeypatch)
    policy = '{"policy": "SlidingWindow", "window": 4}'
    model = RewrittenLM(pretrained=mistral(None), policy=policy, rewriter_backend="eager", **options)
    actual = results(model, folder, monkeypatch)
    for name in ("local_choice", "local_perplexity"):
        torch.testing.assert_close(
            numbers(actual["answers"][name]), numbers(expected["answers"][name]), atol=1e-4, rtol=1e-4
        )
        assert numbers(actual["answers"][name]) != pytest.approx(numbers(whole["answers"][name]), rel=1e-3)
    assert actual["answers"]["local_answer"] == expected["answers"]["local_answer"] != whole["answers"]["local_answer"]
    assert actual["config"]["policy"] == SlidingWindow(4).to_dict()


def test_a_model_that_is_optimized_already_is_taken(folder: Path) -> None:
    from rewriter.integrations.lm_eval import RewrittenLM

    fast = rewriter.optimize(mistral(None), SlidingWindow(4), backend="eager")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert RewrittenLM(pretrained=fast, tokenizer=tokenizer, device="cpu").model is fast
    with pytest.raises(rewriter.RewriteError, match="optimized already"):
        RewrittenLM(pretrained=fast, policy=SlidingWindow(5), tokenizer=tokenizer, device="cpu")


def test_the_harness_is_named_where_it_is_missing() -> None:
    code = "import sys; sys.modules['lm_eval'] = None; import rewriter.integrations.lm_eval"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'rewriter[eval]'" in done.stderr


def test_the_command_line_of_the_harness_knows_the_model(folder: Path, tmp_path: Path) -> None:
    arguments = {
        "pretrained": str(MODEL),
        "policy": {"policy": "SlidingWindow", "window": 4},
        "rewriter_backend": "eager",
    }
    options = ["--model", "rewriter", "--tasks", "local_choice", "--include_path", str(folder), "--device", "cpu"]
    written = ["--model_args", json.dumps(arguments), "--output_path", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "rewriter.integrations.lm_eval", "run", *options, *written],
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (results_file,) = tmp_path.rglob("results_*.json")
    assert json.loads(results_file.read_text())["config"]["policy"]["window"] == 4
