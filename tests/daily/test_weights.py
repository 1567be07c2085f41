"""Weights that are not plain tensors on one device: quantized, offloaded; see README.md beside this."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate import dispatch_model
from everyday_models import llama
from torchao.quantization import Int8WeightOnlyConfig
from torchao.quantization import IntxWeightOnlyConfig
from torchao.quantization import quantize_
from torchao.quantization.granularity import PerGroup

import rewriter
from rewriter import Exact
from rewriter import RewriteError
from rewriter import SlidingWindow

CONFIGURATIONS = {
    "int8": Int8WeightOnlyConfig,
    "int4": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
}


@pytest.mark.parametrize("kind", CONFIGURATIONS)
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_model_with_quantized_weights_is_what_it_is(kind: str, backend: str) -> None:
    model = llama(hidden_size=64, intermediate_size=96)
    quantize_(model, CONFIGURATIONS[kind]())
    assert type(model.model.layers[0].self_attn.q_proj.weight) is not torch.nn.Parameter
    fast = rewriter.optimize(model, Exact(), backend=backend)
    ids = torch.randint(3, 64, (2, 12))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(fast(input_ids=ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
        if backend == "eager":
            options = {"max_new_tokens": 4, "do_sample": False}
            assert torch.equal(fast.generate(ids, **options), model.generate(ids, **options))
    assert not fast.report.refused


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: cpu_offload(model, execution_device="cpu"), "accelerate's AlignDevicesHook on it moves weights"),
        (lambda model: dispatch_model(model, {"": "cpu"}, force_hooks=True), "remove_hook_from_module"),
        (
            lambda model: torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, inplace=True),
            "quantize_dynamic, which packs weights",
        ),
    ],
    ids=["offloaded", "dispatched", "packed"],
)
def test_weights_that_no_graph_holds_are_an_error(spoil: Any, message: str) -> None:
    model = llama()
    spoil(model)
    with pytest.raises(RewriteError, match=message):
        rewriter.optimize(model, SlidingWindow(4))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotations_that_depend_on_the_call_are_an_error(kind: str) -> None:
    model = llama()
    model.config.rope_parameters = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(RewriteError, match=f"rope_type '{kind}'"):
        rewriter.optimize(model, SlidingWindow(4))
