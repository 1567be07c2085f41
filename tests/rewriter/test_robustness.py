"""What users do to a model before and after it is optimized."""

from __future__ import annotations

import copy
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch import nn

import rewriter
from rewriter import Exact
from rewriter import SlidingWindow

Build = Callable[..., nn.Module]
backends = pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.soak)])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def trained(model: nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    output = run()
    output.float().square().mean().backward()
    return {"output": output.detach(), **gradients(model)}


def check(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    largest = max(t.abs().max() for t in expected.values())
    for name, reference in expected.items():
        torch.testing.assert_close(actual[name], reference, atol=float(largest) * 1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models(law: SimpleNamespace, tiny_model: Build, dtype: torch.dtype) -> None:
    """As far from the fp32 model as the original in 16 bits is, and no further."""
    whole = tiny_model("llama", "sdpa").eval()
    model = copy.deepcopy(whole).to(dtype)
    fast = rewriter.optimize(model, Exact(), backend="eager", strict=True)
    ids, mask = law.batch(3, 20, left=True)
    with torch.no_grad():
        exact, plain, actual = (law.call(m, ids, mask)[mask.bool()].double() for m in (whole, model, fast))
    assert (actual - exact).norm() <= 2 * (plain - exact).norm()


def test_tied_and_shared_weights(law: SimpleNamespace, tiny_model: Build) -> None:
    model = tiny_model("llama", "sdpa").eval()
    model.lm_head.weight = model.model.embed_tokens.weight
    model.model.layers[1].self_attn = model.model.layers[0].self_attn  # ALBERT shares layers so
    model.model.layers[1].mlp = model.model.layers[0].mlp
    fast = rewriter.optimize(model, Exact(), backend="eager", strict=True)
    assert len(list(fast.parameters())) == len(list(model.parameters()))
    ids, mask = law.batch(3, 20, left=False)
    real = mask.bool()
    check(
        trained(model, lambda: law.call(fast, ids, mask)[real]),
        trained(model, lambda: law.call(model, ids, mask)[real]),
    )
    assert len(fast.report.sites) == 2 and not fast.report.refused


def test_a_compiled_model_is_an_error_that_says_so(tiny_model: Build) -> None:
    model = tiny_model("llama", "sdpa").eval()
    with pytest.raises(rewriter.RewriteError, match=r"torch\.compile has been applied to it.*_orig_mod"):
        rewriter.optimize(torch.compile(model))
    part = copy.deepcopy(model)
    part.model.layers[1] = torch.compile(part.model.layers[1])
    with pytest.raises(rewriter.RewriteError, match=r"torch\.compile has been applied to its part 'model\.layers\.1'"):
        rewriter.optimize(part)
    in_place = copy.deepcopy(model)
    in_place.compile()
    with pytest.raises(rewriter.RewriteError, match=r"torch\.compile has been applied to it"):
        rewriter.explain(in_place, input_ids=torch.ones(2, 9, dtype=torch.long))


@pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_2"])
def test_attention_that_no_pass_can_look_into_is_an_error_that_says_so(attention: str, tiny_model: Build) -> None:
    model = tiny_model("llama", "sdpa").eval()
    model.config._attn_implementation = attention  # type: ignore[union-attr]
    with pytest.raises(rewriter.RewriteError, match=rf"it attends by {attention}.*attn_implementation='sdpa'"):
        rewriter.optimize(model, SlidingWindow(5))


def test_explain_on_the_meta_device(law: SimpleNamespace, tiny_model: Build) -> None:
    ids, mask = law.batch(3, 12, left=True)
    policy = rewriter.SeparatorMask(tuple(range(3, 20)), window=4)
    call = {"input_ids": ids, "attention_mask": mask, "use_cache": False, "policy": policy, "length": 200}
    here = rewriter.explain(tiny_model("gemma2", "eager").eval(), **call)
    torch._dynamo.reset()
    with torch.device("meta"):
        model = tiny_model("gemma2", "eager").eval()
    there = rewriter.explain(model, **call)
    assert [s.mask for s in there.sites] == [s.mask for s in here.sites]
    assert [s.prediction for s in there.sites] == [s.prediction for s in here.sites]
    assert not there.refused and all(p.is_meta for p in model.parameters())


@backends
def test_gradient_checkpointing(law: SimpleNamespace, tiny_model: Build, backend: str) -> None:
    model = tiny_model("llama", "sdpa", layers=1).train()
    ids, mask = law.batch(3, 20, left=False)
    expected = trained(model, lambda: law.call(model, ids, mask)[mask.bool()])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    fast = rewriter.optimize(model, Exact(), backend=backend, strict=True)
    check(trained(model, lambda: law.call(fast, ids, mask)[mask.bool()]), expected)


def test_a_backward_inside_autocast() -> None:
    """The kernel computes as it does outside: autocast would round its products to 16 bits, or break it."""

    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    torch._dynamo.reset()
    fast = rewriter.optimize(Attention(), backend="eager", strict=True)
    x = torch.randn(2, 4, 33, 8).bfloat16().requires_grad_()
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            output = fast(x)
            results.append((output, *torch.autograd.grad(output.float().square().sum(), x)))
    assert all(torch.equal(*both) for both in zip(*results, strict=True))


def test_autocast(law: SimpleNamespace, tiny_model: Build) -> None:
    model = tiny_model("llama", "sdpa").eval()
    fast = rewriter.optimize(model, Exact(), backend="eager", strict=True)
    ids, mask = law.batch(3, 20, left=False)
    with torch.no_grad():
        exact = law.call(model, ids, mask)[mask.bool()]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            plain, actual = (law.call(m, ids, mask)[mask.bool()] for m in (model, fast))
    assert actual.dtype == plain.dtype
    assert (actual - exact).norm() <= 2 * (plain - exact).norm()


@backends
def test_inference_mode(law: SimpleNamespace, tiny_model: Build, backend: str) -> None:
    model = tiny_model("llama", "sdpa", layers=1).eval()
    fast = rewriter.optimize(model, Exact(), backend=backend, strict=True)
    ids, mask = law.batch(3, 20, left=False)
    with torch.inference_mode():
        torch.testing.assert_close(law.call(fast, ids, mask)[mask.bool()], law.call(model, ids, mask)[mask.bool()])
    check(  # and training after it
        trained(model, lambda: law.call(fast, ids, mask)[mask.bool()]),
        trained(model, lambda: law.call(model, ids, mask)[mask.bool()]),
    )


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_data_parallel(law: SimpleNamespace, tiny_model: Build) -> None:
    """One graph, whatever buckets DDP has: Dynamo would cut the graph at them, and sites be numbered anew in each piece."""
    from torch.nn.parallel import DistributedDataParallel

    torch._dynamo.reset()
    model = tiny_model("llama", "sdpa").eval()
    ids, mask = law.batch(3, 20, left=False)
    expected = trained(model, lambda: law.call(model, ids, mask)[mask.bool()])
    fast = rewriter.optimize(model, Exact(), backend="eager", strict=True)
    wrapped = DistributedDataParallel(fast, bucket_cap_mb=0.001)
    call = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    check(trained(model, lambda: wrapped(**call).logits[mask.bool()]), expected)
    assert [len(graph.sites) for graph in fast.report.graphs] == [2]
    with pytest.raises(rewriter.RewriteError, match=r"DistributedDataParallel\(rewriter\.optimize\(model"):
        rewriter.optimize(DistributedDataParallel(model))


def test_inputs_that_are_not_contiguous(law: SimpleNamespace, nano: type[nn.Module]) -> None:
    model = nano(attention="sdpa").eval()
    fast = rewriter.optimize(model, SlidingWindow(5), strict=True)
    wide = torch.randint(0, 64, (20, 6))
    ids, mask = wide.t()[::2], torch.ones(40, 3, dtype=torch.long).t()[:, ::2]
    assert not ids.is_contiguous() and not mask.is_contiguous()
    torch.testing.assert_close(law.call(fast, ids, mask), law.call(fast, ids.contiguous(), mask.contiguous()))


def test_a_row_cut_out_of_a_longer_one_takes_the_same_graph(law: SimpleNamespace, tiny_model: Build) -> None:
    model = tiny_model("llama", "sdpa").eval()
    fast = rewriter.optimize(model, SlidingWindow(5), backend="eager", strict=True)
    ids = torch.randint(0, 64, (1, 40))
    mask = torch.ones_like(ids)
    for length in (40, 17):
        part = ids[:, :length]
        assert part.is_contiguous() and part.stride() == (40, 1)
        whole = law.call(fast, part.clone(), mask[:, :length].clone())
        assert torch.equal(law.call(fast, part, mask[:, :length]), whole)
    assert len(fast.report.graphs) == 1


def test_one_token(law: SimpleNamespace, tiny_model: Build) -> None:
    model = tiny_model("llama", "sdpa").eval()
    fast = rewriter.optimize(model, Exact(), backend="eager", strict=True)
    one = torch.randint(0, 64, (3, 1))
    torch.testing.assert_close(law.call(fast, one, torch.ones_like(one)), law.call(model, one, torch.ones_like(one)))


def test_no_rows() -> None:
    """Models of transformers cannot take an empty batch, whose sizes `view(..., -1)` leaves open; others can."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).split(8, dim=-1))
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    for backend in ("eager", "inductor"):
        torch._dynamo.reset()
        model = Model()
        fast = rewriter.optimize(model, SlidingWindow(3), backend=backend, strict=True)
        for rows in (3, 0, 2):
            x = torch.randn(rows, 9, 8)
            assert fast(x).shape == model(x).shape == (rows, 9, 8)
        x = torch.randn(0, 9, 8, requires_grad=True)
        fast(x).sum().backward()
        assert x.grad is not None and x.grad.shape == (0, 9, 8)
