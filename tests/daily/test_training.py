"""Training: Trainer, LoRA, checkpointing, packed rows; see README.md beside this."""

from __future__ import annotations

import gc
import itertools
import random
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from everyday_models import llama
from peft import LoraConfig
from peft import PeftModel
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers import Trainer
from transformers import TrainingArguments

import rewriter
from rewriter import DynamicMask
from rewriter import Exact
from rewriter import PerLayer
from rewriter import Policy
from rewriter import SeparatorMask
from rewriter import SlidingWindow


def rows(number: int = 8, length: int = 16) -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for row in torch.randint(3, 64, (number, length))]


def trainer(model: Any, folder: Path, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        folder,
        max_steps=2,
        save_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows(2))


def test_a_trainer_trains_evaluates_and_saves_what_it_saves_of_the_original(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = llama(tie_word_embeddings=True)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    results = []
    for name, wrap in (("plain", lambda m: m), ("fast", lambda m: rewriter.optimize(m, Exact(), backend="eager"))):
        model.load_state_dict(weights)
        torch.manual_seed(2)
        own = trainer(wrap(model), tmp_path / name)
        own.train()
        results.append((own.evaluate()["eval_loss"], {n: p.detach().clone() for n, p in model.named_parameters()}))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    for name, parameter in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], parameter, rtol=1e-3, atol=1e-5)
    plain, fast = ({p.name for p in (tmp_path / kind / "checkpoint-2").iterdir()} for kind in ("plain", "fast"))
    assert fast == plain | {"rewriter.json"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "fast" / "checkpoint-2")
    torch.testing.assert_close(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_accelerate_trains_what_it_trains_of_the_original(mixed_precision: str) -> None:
    """A loop by hand: prepare, accumulate, backward, clip; `accelerate` puts a forward with autocast in the model's place."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    results = []
    for wrap in (lambda m: m, lambda m: rewriter.optimize(m, Exact(), backend="eager")):
        torch.manual_seed(2)
        AcceleratorState._reset_state(reset_partial_state=True)  # of other tests of this process
        accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision, gradient_accumulation_steps=2)
        model = wrap(llama().train())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = torch.utils.data.DataLoader(rows(), batch_size=2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        losses = []
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        results.append((losses, accelerator.get_state_dict(model)))
        assert accelerator.unwrap_model(model) is not None
    tolerance = 1e-4 if mixed_precision == "no" else 2e-2
    assert len(results[0][0]) == 4 and results[1][0] == pytest.approx(results[0][0], rel=tolerance)
    assert results[0][1].keys() == results[1][1].keys()
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_trainer_resumes_with_the_policys_parameters(tmp_path: Path) -> None:
    fast = rewriter.optimize(llama(), DynamicMask(keep=6), backend="eager")
    trainer(fast, tmp_path, gradient_checkpointing=True).train()
    trained = {name: parameter.detach().clone() for name, parameter in fast.policy_parameters.named_parameters()}
    other = rewriter.optimize(llama(), DynamicMask(keep=6, seed=5), backend="eager")
    own = trainer(other, tmp_path)
    own.args.max_steps = 3
    own.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert own.state.global_step == 3
    for name, parameter in other.policy_parameters.named_parameters():
        assert (parameter - trained[name]).abs().max() < 1e-3  # one step of a small rate away


@pytest.mark.parametrize(
    "policy",
    [
        SlidingWindow(4, sinks=1),
        DynamicMask(keep=6),
        PerLayer({0: Exact(), "default": SeparatorMask([5, 6], window=3)}),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_what_is_saved_comes_back(policy: Policy, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    fast = rewriter.optimize(model, policy, backend="eager")
    with torch.no_grad():
        for parameter in fast.policy_parameters.parameters():
            parameter.add_(torch.rand_like(parameter))
    fast.save_pretrained(tmp_path)
    again = rewriter.from_pretrained(tmp_path)
    ids = torch.randint(3, 64, (2, 20))
    assert again.policy == policy and again.backend == "eager"
    torch.testing.assert_close(again(ids).logits, fast(ids).logits)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(plain(ids).logits, model(ids).logits)


def test_a_folder_that_was_not_saved_so_is_an_error(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    with pytest.raises(rewriter.RewriteError, match=r"has no rewriter\.json"):
        rewriter.from_pretrained(tmp_path)


def test_state_dicts_are_the_models_own() -> None:
    model = llama()
    fast = rewriter.optimize(model, SlidingWindow(4), backend="eager")
    other = llama()
    assert list(fast.state_dict()) == list(model.state_dict())
    assert str(fast.load_state_dict(other.state_dict())) == "<All keys matched successfully>"
    torch.testing.assert_close(model.state_dict(), other.state_dict())
    lacking = {name: tensor for name, tensor in other.state_dict().items() if name != "lm_head.weight"}
    result = fast.load_state_dict({**lacking, "more": torch.zeros(1)}, strict=False)
    assert result.missing_keys == ["lm_head.weight"] and result.unexpected_keys == ["more"]


def test_a_state_dict_keeps_entries_whose_names_are_those_of_others() -> None:
    model = torch.nn.ModuleDict(
        {"model": torch.nn.ModuleDict({"x": torch.nn.Linear(2, 3)}), "x": torch.nn.Linear(2, 3)}
    )
    fast = rewriter.optimize(model, Exact(), backend="eager")
    torch.testing.assert_close(fast.state_dict(), model.state_dict())
    other = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    fast.load_state_dict(other)
    torch.testing.assert_close(dict(model.state_dict()), other)


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_adapters_give_what_the_model_gives(task: str | None) -> None:
    model = get_peft_model(llama(), lora(task_type=task)).eval()
    model.add_adapter("other", lora(task_type=task))
    fast = rewriter.optimize(model, Exact(), backend="eager")
    ids = torch.randint(3, 64, (2, 12))

    def check() -> None:
        model.eval()
        with torch.no_grad():
            expected = model(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(fast(input_ids=ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
        options = {"input_ids": ids, "max_new_tokens": 4, "do_sample": False}
        assert torch.equal(fast.generate(**options), model.generate(**options))

    check()
    model.set_adapter("other")
    check()
    with model.disable_adapter():
        check()
    model.set_adapter("default")
    model.merge_adapter()
    check()
    model.unmerge_adapter()
    check()


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_adapters_are_put_into_an_optimized_model(task: str | None, tmp_path: Path) -> None:
    model = llama()
    fast = rewriter.optimize(model, Exact(), backend="eager")
    ids = torch.randint(3, 64, (2, 12))
    before = fast(input_ids=ids).logits
    adapted = get_peft_model(fast, lora(task_type=task)).eval()
    assert not torch.allclose(adapted(input_ids=ids).logits, before)
    adapted.generate(input_ids=ids, max_new_tokens=2, do_sample=False)
    adapted.train()
    adapted(input_ids=ids, labels=ids).loss.backward()
    trained = [p for name, p in adapted.named_parameters() if "lora_" in name]
    assert len(trained) == 8 and all(p.grad is not None for p in trained)
    adapted.save_pretrained(tmp_path)
    other = llama()
    other.load_state_dict(
        {name.replace("base_layer.", ""): t for name, t in model.state_dict().items() if "lora_" not in name}
    )
    again = PeftModel.from_pretrained(rewriter.optimize(other, Exact(), backend="eager"), tmp_path).eval()
    torch.testing.assert_close(again(input_ids=ids).logits, adapted.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_usual_recipe_of_lora_has_the_gradients_of_the_original(reentrant: bool) -> None:
    model = llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    adapted = get_peft_model(model, lora(task_type="CAUSAL_LM")).train()
    fast = rewriter.optimize(adapted, Exact(), backend="eager")
    ids = torch.randint(3, 64, (2, 12))
    gradients = []
    for module in (adapted, fast):
        module(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in adapted.named_parameters() if p.grad is not None})
        adapted.zero_grad()
    assert len(gradients[0]) == 8
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_checkpointing_with_the_default_cache_trains() -> None:
    model = llama().train()
    model.gradient_checkpointing_enable()
    ids = torch.randint(3, 64, (2, 12))
    rewriter.optimize(model, Exact(), backend="eager")(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_adapters_and_frozen_layers_are_switched_more_than_eight_times() -> None:
    served = 9
    model = get_peft_model(llama(), lora(task_type="CAUSAL_LM"), adapter_name="0").eval()
    for number in range(1, served):
        model.add_adapter(str(number), lora(task_type="CAUSAL_LM"))
    fast = rewriter.optimize(model, Exact(), backend="eager")
    ids = torch.randint(3, 64, (1, 9))
    for number in range(served):
        model.set_adapter(str(number))
        torch.testing.assert_close(fast(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    parameters = list(model.base_model.model.parameters())
    for number in range(served):
        for place, parameter in enumerate(parameters):
            parameter.requires_grad_(place >= number)
        fast(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert parameters[-1].grad is not None


PACKED = [
    SlidingWindow(4),
    SlidingWindow(4, sinks=2),
    SeparatorMask([5, 6, 7, 8, 9], 3, 4),
    SeparatorMask([5, 6, 7, 8, 9, 10, 11, 12], 2, 3, max_separators=2),
    SeparatorMask(list(range(3, 30)), 1, 2, max_separators=2, capacity=7),
    DynamicMask(keep=4),
    PerLayer({0: SlidingWindow(3, sinks=1), "default": Exact()}),
]


@pytest.mark.parametrize("policy", PACKED, ids=str)
def test_packing_changes_nothing(policy: Policy) -> None:
    model = llama()
    fast = rewriter.optimize(model, policy, backend="eager")
    choose = random.Random(0)
    for _ in range(4):
        lengths = [choose.randint(1, 20) for _ in range(choose.randint(2, 5))]
        ids = torch.randint(3, 64, (2, sum(lengths)))
        places = torch.cat([torch.arange(length) for length in lengths]).expand(2, -1)
        packed = fast(input_ids=ids, position_ids=places, use_cache=False).logits
        alone = torch.cat([fast(input_ids=part, use_cache=False).logits for part in ids.split(lengths, 1)], 1)
        torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
        weights = torch.randn_like(packed)
        own, expected = (
            torch.autograd.grad((logits * weights).sum(), list(model.parameters())) for logits in (packed, alone)
        )
        torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-4)


def test_packed_documents_do_not_go_into_a_cache() -> None:
    fast = rewriter.optimize(llama(), SlidingWindow(4), backend="eager")
    ids, places = torch.randint(3, 64, (1, 10)), torch.cat((torch.arange(4), torch.arange(6)))[None]
    with pytest.raises(rewriter.CacheError, match="start again"), torch.no_grad():
        fast(input_ids=ids, position_ids=places, use_cache=True)
    output = fast(input_ids=ids, position_ids=places)  # trains and evaluates; only its cache cannot be used
    with pytest.raises(rewriter.CacheError, match="start again"):
        fast(input_ids=ids[:, :1], past_key_values=output.past_key_values)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_model_that_nothing_holds_is_freed(backend: str) -> None:
    def used() -> weakref.ref[Any]:
        model = llama()
        fast = rewriter.optimize(model, SlidingWindow(4), backend=backend)
        ids = torch.randint(3, 64, (1, 12))
        fast(input_ids=ids, labels=ids).loss.backward()
        if backend == "eager":
            fast.generate(ids, max_new_tokens=2, do_sample=False)
        return weakref.ref(model.lm_head.weight)

    weight = used()
    gc.collect()
    gc.collect()
    assert weight() is None


def test_hidden_states_are_collected_at_the_first_call() -> None:
    model = llama()
    fast = rewriter.optimize(model, Exact(), backend="eager")
    ids = torch.randint(3, 64, (1, 12))
    own = fast(input_ids=ids, output_hidden_states=True).hidden_states
    expected = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(own) == len(expected) == 3
    for left, right in itertools.zip_longest(own, expected):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_the_signature_is_the_models() -> None:
    import inspect

    model = llama()
    fast = rewriter.optimize(model, Exact(), backend="eager")
    assert inspect.signature(fast.forward) == inspect.signature(model.forward)
    assert isinstance(fast, transformers.LlamaForCausalLM) and isinstance(fast, rewriter.OptimizedModel)
    fast.config.use_cache = False
    fast.generation_config = transformers.GenerationConfig(max_new_tokens=3)
    assert model.config.use_cache is False and model.generation_config.max_new_tokens == 3
