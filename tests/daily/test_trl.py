"""TRL's trainers, which put a forward of their own in the place of the model's, and call its parts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer
from transformers import MistralConfig
from transformers import MistralForCausalLM

import rewriter
from rewriter import Exact
from rewriter import SlidingWindow
from rewriter.demo.models import MODEL

TEXTS = ["def f(x):\n    return x\n" * 3, "import os\n" * 7, "class A:\n    pass\n" * 2, "x = 1\n" * 9] * 3


def mistral(window: int | None) -> MistralForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=2048, num_key_value_heads=2, sliding_window=window, **sizes)
    return MistralForCausalLM(config)


def losses(model: Any, folder: Path, **options: Any) -> list[float]:
    """Of three steps of supervised fine-tuning."""
    from datasets import Dataset
    from trl import SFTConfig
    from trl import SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.pad_token = tokenizer.eos_token
    peft_config = options.pop("peft_config", None)
    given = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "max_length": 48,
        "logging_steps": 1,
        "learning_rate": 1e-2,
    }
    where = {
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "report_to": [],
        "output_dir": str(folder),
        "seed": 1,
    }
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**given, **where, **options),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("packing", [False, True])
def test_supervised_fine_tuning_is_that_of_the_original(packing: bool, tmp_path: Path) -> None:
    model = mistral(None)
    expected = losses(copy.deepcopy(model), tmp_path, packing=packing, gradient_checkpointing=False)
    fast = rewriter.optimize(model, Exact(), backend="eager", strict=True)
    assert losses(fast, tmp_path, packing=packing, gradient_checkpointing=False) == pytest.approx(expected, rel=1e-5)
    assert fast.report.summary() == "2 of 2 attention sites rewritten"
    assert ("documents" in fast.report.sites[0].mask) == packing


def test_supervised_fine_tuning_is_under_the_policy(tmp_path: Path) -> None:
    """With TRL's default of gradient checkpointing; Mistral has the window by itself."""
    expected = losses(mistral(8), tmp_path)
    fast = rewriter.optimize(mistral(None), SlidingWindow(8), backend="eager", strict=True)
    assert losses(fast, tmp_path) == pytest.approx(expected, rel=1e-5)
    assert losses(mistral(None), tmp_path) != pytest.approx(expected, rel=1e-4)


def test_supervised_fine_tuning_of_adapters_is_under_the_policy(tmp_path: Path) -> None:
    from peft import LoraConfig

    adapters = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")}
    expected = losses(mistral(8), tmp_path, **adapters)
    fast = rewriter.optimize(mistral(None), SlidingWindow(8), backend="eager", strict=True)
    assert losses(fast, tmp_path, **adapters) == pytest.approx(expected, rel=1e-5)


def test_the_model_without_its_head_is_optimized_alike() -> None:
    ids = torch.randint(2048, (2, 20))
    fast = rewriter.optimize(mistral(None), SlidingWindow(8), backend="eager", strict=True)
    expected = mistral(8).model(ids).last_hidden_state
    for hidden in (fast.base_model(ids).last_hidden_state, fast.get_decoder()(ids).last_hidden_state):
        torch.testing.assert_close(hidden, expected)
    assert fast.base_model.base_model is fast.base_model  # of a model without a head it is the model
    assert len(fast.report.graphs) == 1 and fast.report.summary() == "2 of 2 attention sites rewritten"
    names = [name for name, _ in fast.named_parameters()]
    assert len(names) == len(set(names)) == len(list(mistral(None).parameters()))


def test_the_model_without_its_head_has_the_policys_parameters() -> None:
    ids = torch.randint(2048, (2, 20))
    fast = rewriter.optimize(mistral(None), rewriter.DynamicMask(4), backend="eager", strict=True)
    fast.base_model(ids).last_hidden_state.sum().backward()
    assert list(fast.policy_parameters) == ["0", "1"]
    assert all(parameter.grad is not None for parameter in fast.policy_parameters.parameters())


@pytest.mark.parametrize("policy", [SlidingWindow(8), Exact()])
def test_a_forward_that_goes_around_the_policy_is_an_error(policy: rewriter.Policy) -> None:
    fast = rewriter.optimize(mistral(None), policy, backend="eager", strict=True)
    ids = torch.randint(2048, (2, 20))
    original, run = fast.model, fast.forward

    def around(input_ids: Tensor) -> Tensor:
        return original.lm_head(original.model(input_ids).last_hidden_state)

    def through(input_ids: Tensor) -> Tensor:
        return run(input_ids=input_ids).logits

    fast.forward = through
    through_policy = fast(ids)
    fast.forward = around
    if policy.is_lossless:  # nothing is lost
        torch.testing.assert_close(fast(ids), through_policy)
        return
    with pytest.raises(rewriter.RewriteError, match=r"replaced by .*around, which calls parts of the model itself"):
        fast(ids)
