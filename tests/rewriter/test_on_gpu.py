"""On a GPU an optimized model gives what it gives on the CPU, which the other tests compare with the dense form."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import nn

import rewriter
from rewriter import ChunkedEviction
from rewriter import DynamicMask
from rewriter import Exact
from rewriter import PerLayer
from rewriter import SeparatorMask
from rewriter import SlidingWindow
from rewriter import export

DEVICE = os.environ.get("REWRITER_TEST_DEVICE", "cuda")
"""A rehearsal without a GPU gives "cpu": Triton's interpreter then runs both sides."""

pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU")

SEPARATORS = tuple(range(3, 20))
BY_PLACE = SeparatorMask(SEPARATORS, initial=1, window=3, max_separators=2, capacity=9, positions="cache")
CALLS = [
    ("llama", "sdpa", Exact()),
    ("llama", "eager", SeparatorMask(SEPARATORS, initial=2, window=4)),
    ("qwen3", "sdpa", DynamicMask(5)),
    ("gemma2", "eager", SlidingWindow(5, sinks=1)),
    ("mistral", "sdpa", Exact()),
    ("gpt2", "sdpa", PerLayer({0: Exact(), "default": SlidingWindow(5, sinks=1)})),
    ("bert", "sdpa", Exact()),
]
CACHED = [
    Exact(),
    SlidingWindow(5, sinks=1),
    SeparatorMask(SEPARATORS, initial=1, window=3, max_separators=2),
    BY_PLACE,
    DynamicMask(4, local=2),
]


def on_both(
    model: nn.Module, policy: rewriter.Policy, backend: str = "eager"
) -> tuple[rewriter.OptimizedModel, rewriter.OptimizedModel]:
    """The optimized model on the CPU, run as it is, and on the GPU. Weights large enough that every key matters."""
    torch._dynamo.reset()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(6)
    model.eval()
    there = copy.deepcopy(model).to(DEVICE)
    here = rewriter.optimize(model, policy, backend="eager", strict=True)
    fast = rewriter.optimize(there, policy, backend=backend, strict=True)
    for name, parameters in here.policy_parameters.items():
        nn.init.uniform_(parameters["A"], -1, 1)
        fast.policy_parameters[name].load_state_dict(parameters.state_dict())
    return here, fast


def distance(actual: Tensor, expected: Tensor, largest: float = 0.0) -> float:
    """Relative; to the largest gradient for one that is zero but for rounding (a key's bias cancels in the softmax)."""
    norm = float(expected.norm())
    return float((actual.cpu() - expected).norm()) / (largest if norm < 1e-6 * largest else norm)


def padded(rows: int, length: int) -> dict[str, Tensor]:
    """Distinct tokens in each row, rows padded differently on the left."""
    ids = torch.stack([torch.randperm(64)[:length] for _ in range(rows)])
    return {"input_ids": ids, "attention_mask": (torch.arange(length) >= 4 * torch.arange(rows)[:, None]).long()}


def moved(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


@torch.no_grad()
def test_a_short_text(tiny_model: Callable[..., nn.Module]) -> None:
    """The first thing to try, and all that a rehearsal does."""
    here, fast = on_both(tiny_model("llama", "sdpa", layers=1), SlidingWindow(4, sinks=1))
    inputs = padded(1, 7)
    expected = here(**inputs, use_cache=False).logits
    assert distance(fast(**moved(inputs), use_cache=False).logits, expected) < 1e-5


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize(("name", "attention", "policy"), CALLS, ids=str)
def test_outputs_and_gradients(
    name: str, attention: str, policy: Any, backend: str, tiny_model: Callable[..., nn.Module]
) -> None:
    here, fast = on_both(tiny_model(name, attention), policy, backend)
    for rows, length in ((3, 21), (2, 50)):
        inputs = padded(rows, length)
        weight = torch.randn(rows, length, 64) * inputs["attention_mask"][..., None]
        results = []
        for run, given, grad in ((here, inputs, weight), (fast, moved(inputs), weight.to(DEVICE))):
            run.zero_grad()
            logits = run(**given, **({} if name == "bert" else {"use_cache": False})).logits
            (logits * grad).sum().backward()
            grads = {n: p.grad for n, p in run.named_parameters() if p.grad is not None}
            results.append({"logits": (logits * (grad != 0)).detach(), **grads})
        expected, actual = results
        assert expected.keys() == actual.keys()
        largest = max(float(t.norm()) for t in expected.values())
        for key, value in expected.items():
            assert distance(actual[key], value, largest) < 1e-4, key


@pytest.mark.parametrize("policy", CACHED, ids=str)
@torch.no_grad()
def test_generation(policy: Any, tiny_model: Callable[..., nn.Module]) -> None:
    here, fast = on_both(tiny_model("llama", "sdpa"), policy)
    inputs = padded(3, 14)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = here.generate(**inputs, **options)
    for chunk in (None, 4):
        assert torch.equal(fast.generate(**moved(inputs), **options, prefill_chunk=chunk).cpu(), expected)


@torch.no_grad()
def test_compiled_steps_neither_recompile_nor_grow(tiny_model: Callable[..., nn.Module]) -> None:
    here, fast = on_both(tiny_model("llama", "sdpa"), BY_PLACE, "inductor")
    inputs = padded(2, 60)
    ids, mask = inputs["input_ids"].to(DEVICE), inputs["attention_mask"].to(DEVICE)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = here(**inputs, use_cache=False).logits
    cache, outputs = fast.new_cache(), []
    for begin, end in [(0, 7), (7, 30), *((i, i + 1) for i in range(30, 40)), (40, 60)]:
        if begin == 32:
            torch._dynamo.utils.counters.clear()
            storage = [t.data_ptr() for t in cache.state()]
        given = {"input_ids": ids[:, begin:end], "attention_mask": mask[:, :end], "past_key_values": cache}
        outputs.append(fast(**given, position_ids=positions[:, begin:end]).logits)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    assert [t.data_ptr() for t in cache.state()] == storage
    real = inputs["attention_mask"].bool()
    assert distance(torch.cat(outputs, dim=1).cpu()[real], expected[real]) < 1e-4


@torch.no_grad()
def test_streams(tiny_model: Callable[..., nn.Module]) -> None:
    here, fast = on_both(tiny_model("llama", "sdpa"), BY_PLACE)
    tokens = torch.randint(0, 64, (70,))
    expected, actual = (torch.tensor(list(rewriter.stream(run, None, tokens, block=32))) for run in (here, fast))
    assert distance(actual, expected) < 1e-4


@torch.no_grad()
def test_reading_in_chunks(tiny_model: Callable[..., nn.Module]) -> None:
    here, fast = on_both(tiny_model("llama", "sdpa"), ChunkedEviction(14, keep_chunks=2, capacity=5))
    context, query = torch.randint(3, 64, (50,)), torch.randint(3, 64, (9,))
    logits = []
    for run in (here, fast):
        device = run.decoder.device
        reading = run.read(context, query, max_new_tokens=4)
        logits.append(run(input_ids=query[None].to(device), past_key_values=reading.cache).logits)
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        logits.append(run.generate(context, query_ids=query, **options))
    assert distance(logits[2], logits[0]) < 1e-4
    assert torch.equal(logits[3].cpu(), logits[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_sixteen_bits(dtype: torch.dtype, tiny_model: Callable[..., nn.Module]) -> None:
    """As near to the model in fp32 as the original is in 16 bits."""
    torch._dynamo.reset()
    model = tiny_model("llama", "sdpa").eval()
    inputs = padded(3, 60)
    real = inputs["attention_mask"].bool()
    exact = model(**inputs, use_cache=False).logits[real]
    half = copy.deepcopy(model).to(DEVICE, dtype)
    plain = half(**moved(inputs), use_cache=False).logits.float().cpu()[real]
    fast = rewriter.optimize(half, Exact(), strict=True)
    actual = fast(**moved(inputs), use_cache=False).logits.float().cpu()[real]
    assert distance(actual, exact) <= 1.5 * distance(plain, exact)


@pytest.mark.parametrize("policy", [BY_PLACE, DynamicMask(4, local=2)], ids=str)
@torch.no_grad()
def test_a_package_holds_the_kernels(policy: Any, tiny_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    _, fast = on_both(tiny_model("llama", "sdpa"), policy)
    inputs = moved(padded(2, 9))
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    report = export.aot_inductor(fast, kwargs={**inputs, "use_cache": False}, path=tmp_path / "m.pt2", max_length=48)
    assert report.agrees and report.kernels and report.machine[1] == DEVICE
    assert max(c["relative"] for c in report.compared) < 1e-5
    prompt = torch.randint(3, 64, (2, 11), device=DEVICE)
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    artifact = export.load(tmp_path / "m.pt2")
    assert torch.equal(artifact.generate(prompt, max_new_tokens=9), fast.generate(prompt, **options))
