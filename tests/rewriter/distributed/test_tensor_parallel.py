"""Models whose heads are spread over processes by torch's `parallelize_module`: as in one process, in training and generation."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import rewriter.export
import torch
from processes import in_processes
from torch import Tensor
from torch import nn

import rewriter
from rewriter import ChunkedEviction
from rewriter import DynamicMask
from rewriter import Exact
from rewriter import Policy
from rewriter import SeparatorMask
from rewriter import SlidingWindow

POLICIES: list[Policy] = [Exact(), SlidingWindow(4, sinks=1), SeparatorMask((3, 7), window=6)]


def llama(layers: int = 2) -> nn.Module:
    from transformers import LlamaConfig
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes))


def in_parts(model: Any) -> Any:
    """Heads, MLP and vocabulary, each in two parts."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel
    from torch.distributed.tensor.parallel import RowwiseParallel
    from torch.distributed.tensor.parallel import parallelize_module

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    layer: dict[str, Any] = {name: ColwiseParallel() for name in columns}
    layer.update({name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")})
    for part in model.model.layers:
        parallelize_module(part, mesh, layer)
    whole: dict[str, Any] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    return parallelize_module(model, mesh, whole)


def batch(length: int = 20) -> dict[str, Tensor]:
    ids = torch.randint(8, 64, (2, length), generator=torch.Generator().manual_seed(length))
    mask = (torch.arange(length) >= torch.tensor([[5], [0]])).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def difference(model: Any, alone: Any) -> float:
    """The most that a gradient differs."""
    expected = dict(alone.named_parameters())
    found = []
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        own = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        found.append(float((own - expected[name].grad).abs().max()))
    assert len(found) == len(expected)
    return max(found)


def train(rank: int, backend: str) -> list[tuple[float, int]]:
    """For each policy, how far gradients are from those of one process, over two lengths, and the number of graphs."""
    found = []
    for policy in POLICIES if backend == "eager" else POLICIES[-1:]:
        model: Any = rewriter.optimize(in_parts(llama()), policy, strict=True, backend=backend)
        alone: Any = rewriter.optimize(llama(), policy, strict=True, backend="eager")
        for length in (20, 29):
            with warnings.catch_warnings():
                warnings.simplefilter("error", rewriter.PolicyWarning)
                warnings.simplefilter("ignore", rewriter.SpeedWarning)
                model(**batch(length), use_cache=False).loss.backward()
                alone(**batch(length), use_cache=False).loss.backward()
        found.append((difference(model, alone), len(model.report.graphs)))
    return found


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_gradients_are_those_of_one_process(backend: str) -> None:
    for of_rank in in_processes(train, backend):
        assert len(of_rank) == (len(POLICIES) if backend == "eager" else 1)
        assert max(off for off, _ in of_rank) <= 1e-6
        assert all(graphs == 1 for _, graphs in of_rank), "one graph serves both lengths"


def generate(rank: int, backend: str) -> list[bool]:
    found = []
    for policy in POLICIES:
        given = {name: tensor for name, tensor in batch().items() if name != "labels"}
        options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        fast = rewriter.optimize(in_parts(llama().eval()), policy, backend=backend)
        alone = rewriter.optimize(llama().eval(), policy, backend="eager")
        found.append(torch.equal(fast.generate(**given, **options), alone.generate(**given, **options)))
    return found


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_tokens_are_those_of_one_process(backend: str) -> None:
    for of_rank in in_processes(generate, backend):
        assert of_rank == [True] * len(POLICIES)


def refuse(rank: int, folder: str) -> list[str]:
    """What is said of what tensor parallelism has no form of."""
    model = in_parts(llama(1).eval())
    prompt = {"input_ids": batch()["input_ids"]}
    said = []
    with pytest.raises(rewriter.PolicyError) as refused:
        rewriter.optimize(model, DynamicMask(5), backend="eager")(**batch())
    said.append(str(refused.value))
    chunks = ChunkedEviction(8)
    with pytest.raises(rewriter.CacheError) as cannot:
        rewriter.optimize(model, chunks, backend="eager").decoder  # noqa: B018
    said.append(str(cannot.value))
    fast = rewriter.optimize(model, Exact(), backend="eager")
    with pytest.raises(rewriter.export.ExportError) as whole:
        rewriter.export.onnx(fast, kwargs={**prompt, "use_cache": False}, path=f"{folder}/{rank}.onnx")
    said.append(str(whole.value))
    return said


def test_what_is_of_all_heads_is_refused(tmp_path: Path) -> None:
    for learned, chunks, artifact in in_processes(refuse, str(tmp_path)):
        assert "the parameters of DynamicMask(keep=5) are of all heads of a layer" in learned
        assert "take a policy without parameters, or spread weights by fully_shard(fast)" in learned
        assert "is not for weights that are spread over processes (parallelize_module)" in chunks
        assert "weights of LlamaForCausalLM are in pieces on several processes, and an artifact is of one" in artifact
    assert not list(tmp_path.iterdir())
