"""What people report of wrapped, compiled and patched models; the list is in README.md beside this."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from everyday_models import llama
from everyday_models import qwen2_vl
from peft import LoraConfig
from peft import PromptTuningConfig
from peft import get_peft_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer
from transformers import Trainer
from transformers import TrainingArguments

import rewriter
from rewriter import Exact
from rewriter import PolicyWarning
from rewriter import SlidingWindow
from rewriter.demo.models import MODEL

WINDOW = SlidingWindow(4, sinks=1)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 64, (2, 12))


def masked(model: Any, ids: Tensor) -> Tensor:
    """The logits of the model under the dense mask of `WINDOW`."""
    i, j = torch.arange(ids.size(1))[:, None], torch.arange(ids.size(1))[None]
    mask = (j <= i) & ((i - j < 4) | (j < 1))
    return model(ids, attention_mask=mask.expand(ids.size(0), 1, -1, -1)).logits


@torch.no_grad()
@pytest.mark.parametrize("stance", ["force_eager", "eager_on_recompile"])
def test_a_compiler_that_is_switched_off_is_an_error(stance: str, ids: Tensor) -> None:
    model = llama()
    fast = rewriter.optimize(model, WINDOW, backend="eager")
    with torch.compiler.set_stance(stance), pytest.raises(rewriter.RewriteError, match="is it switched off"):
        fast(ids)
    with torch.compiler.set_stance(stance), pytest.raises(rewriter.RewriteError, match="is it switched off"):
        fast.generate(ids, max_new_tokens=2)
    torch.testing.assert_close(fast(ids).logits, masked(model, ids))


@torch.no_grad()
def test_a_call_under_a_dispatch_mode_is_an_error_and_breaks_nothing(ids: Tensor) -> None:
    model = llama()
    fast = rewriter.optimize(model, WINDOW, backend="eager")
    expected = masked(model, ids)
    for _ in range(2):
        with FlopCounterMode(display=False), pytest.raises(rewriter.RewriteError, match="counts FLOPs"):
            fast(ids)
        torch.testing.assert_close(fast(ids).logits, expected)


@torch.no_grad()
def test_exporting_goes_through_rewriter_export(ids: Tensor) -> None:
    fast = rewriter.optimize(llama(), WINDOW, backend="eager")
    with pytest.raises(rewriter.RewriteError, match=r"rewriter\.export\.aot_inductor"):
        torch.export.export(fast, (), {"input_ids": ids, "use_cache": False}, strict=False)


@torch.no_grad()
def test_methods_that_compute_the_original_are_an_error(ids: Tensor) -> None:
    fast = rewriter.optimize(llama(), WINDOW, backend="eager")
    with pytest.raises(rewriter.RewriteError, match="would compute it without SlidingWindow"):
        fast.generate_batch([[3, 4, 5]])
    assert not hasattr(fast, "get_text_features")
    assert callable(rewriter.optimize(llama(), Exact(), backend="eager").generate_batch)


def test_labels_are_smoothed_as_of_the_original(tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 64, (4, 12))]
    model = llama()
    losses = []
    for each in (model, rewriter.optimize(model, Exact(), backend="eager")):
        arguments = TrainingArguments(
            tmp_path, label_smoothing_factor=0.1, report_to=[], use_cpu=True, disable_tqdm=True
        )
        losses.append(Trainer(each, arguments, eval_dataset=rows).evaluate()["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@torch.no_grad()
def test_hooks_see_the_steps_of_generate(ids: Tensor) -> None:
    calls = {}
    for kind, fast in (("original", llama()), ("fast", rewriter.optimize(llama(), Exact(), backend="eager"))):
        seen: list[str] = []
        fast.register_forward_pre_hook(lambda module, args, kwargs, seen=seen: seen.append("before"), with_kwargs=True)
        fast.register_forward_hook(lambda module, args, output, seen=seen: seen.append("after"))
        fast.generate(ids, max_new_tokens=3, min_new_tokens=3)
        calls[kind] = seen
    assert calls["fast"] == calls["original"] == ["before", "after"] * 3


def test_accelerate_takes_its_forward_off_again(ids: Tensor) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    fast = rewriter.optimize(llama(), WINDOW, backend="eager")
    expected = fast(ids).logits
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(fast)
    assert (prepared(ids).logits - expected).abs().max() > 0
    again = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert again is fast
    torch.testing.assert_close(fast(ids).logits, expected)


def test_forward_is_one_method_with_the_models_signature() -> None:
    model = llama()
    fast = rewriter.optimize(model, backend="eager")
    assert fast.forward == fast.forward
    assert inspect.signature(fast.forward) == inspect.signature(model.forward)
    assert fast.forward.__doc__ == model.forward.__doc__
    assert repr(fast).startswith("OptimizedModel(") and fast._get_name() == "LlamaForCausalLM"


@torch.no_grad()
def test_stop_strings(ids: Tensor) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = llama(vocab_size=2048)
    given = {"max_new_tokens": 6, "do_sample": False, "stop_strings": ["zzzz"], "tokenizer": tokenizer}
    fast = rewriter.optimize(model, Exact(), backend="eager")
    assert torch.equal(fast.generate(ids, **given), model.generate(ids, **given))


@torch.no_grad()
def test_positions_on_several_axes_and_a_part_that_depends_on_data(ids: Tensor) -> None:
    model, ids = qwen2_vl(), ids % 57 + 3
    fast = rewriter.optimize(model, Exact(), backend="eager")
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(fast.generate(ids, **given), model.generate(ids, **given))
    grid = torch.tensor([[1, 4, 4]])
    image = torch.cat((torch.full((1, 4), model.config.image_token_id), ids[:1]), dim=1)
    call = {"input_ids": image, "pixel_values": torch.randn(16, 3 * 2 * 4 * 4), "image_grid_thw": grid}
    call["mm_token_type_ids"] = (image == model.config.image_token_id).long()
    assert model(**call).logits.isfinite().all()
    with pytest.raises(rewriter.RewriteError, match="optimize a part of it that can be"):
        fast(**call)


@torch.no_grad()
@pytest.mark.parametrize("before", [True, False])
def test_hidden_states_by_configuration(before: bool, ids: Tensor) -> None:
    model = llama()
    if before:
        model.config.output_hidden_states = True
    fast = rewriter.optimize(model, Exact(), backend="eager")
    fast.config.output_hidden_states = True
    torch.testing.assert_close(fast(ids).hidden_states, model(ids).hidden_states)


@torch.no_grad()
def test_a_warning_in_a_forward_is_left_out(ids: Tensor) -> None:
    """Prompt tuning warns of position_ids, which are given when a model is captured for a cache."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(llama(), config).eval()
    fast = rewriter.optimize(model, Exact(), backend="eager")
    torch.testing.assert_close(fast(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("use_cache", [True, None])
def test_outputs_as_a_tuple(grad: bool, use_cache: bool | None, ids: Tensor) -> None:
    model = llama()
    fast = rewriter.optimize(model, WINDOW, backend="eager")
    with torch.set_grad_enabled(grad):
        logits, cache = fast(ids, return_dict=False, use_cache=use_cache)
        torch.testing.assert_close(logits, masked(model, ids))
        with torch.no_grad():
            more = fast(ids[:, :1], past_key_values=cache, return_dict=False)
    assert isinstance(more, tuple) and more[0].shape == (2, 1, 64)


def test_the_models_own_error_comes_out(ids: Tensor) -> None:
    fast = rewriter.optimize(llama(), WINDOW, backend="eager")
    with pytest.raises(ValueError, match="You must specify exactly one of input_ids or inputs_embeds"):
        fast()
    with pytest.raises(RuntimeError, match=r"Expected tensor for argument #1 'indices'.*FloatTensor"):
        fast(ids.float())


@torch.no_grad()
def test_a_mask_of_four_dimensions_says_what_becomes_of_it(ids: Tensor) -> None:
    fast = rewriter.optimize(llama(), WINDOW, backend="eager")
    mask = torch.ones(12, 12, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    with pytest.warns(PolicyWarning, match="keep all their keys"):
        fast(ids, attention_mask=mask, use_cache=True)


@torch.no_grad()
def test_the_cache_of_a_call_goes_into_generate(ids: Tensor) -> None:
    model = llama()
    fast = rewriter.optimize(model, Exact(), backend="eager")
    text = torch.cat((ids, torch.randint(3, 64, (2, 3))), dim=1)
    given = {"max_new_tokens": 3, "do_sample": False}
    cache = fast(ids, use_cache=True).past_key_values
    assert torch.equal(fast.generate(text, past_key_values=cache, **given), model.generate(text, **given))


@torch.no_grad()
@pytest.mark.parametrize("policy", [WINDOW, rewriter.DynamicMask(4)])
def test_what_is_left_without_adapters_keeps_the_policy(policy: rewriter.Policy, ids: Tensor) -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    fast = rewriter.optimize(model, policy, backend="eager")
    expected = fast(input_ids=ids).logits
    merged = fast.merge_and_unload()
    assert isinstance(merged, rewriter.OptimizedModel) and merged.policy == policy
    torch.testing.assert_close(merged(input_ids=ids).logits, expected)


def test_dora(ids: Tensor) -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_dora=True))
    fast = rewriter.optimize(model, Exact(), backend="eager")
    gradients = []
    for each in (model, fast):
        each(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)
