"""Training on several processes, each with a part of the batch, or of the weights too: as in one process."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from processes import in_processes
from torch import Tensor
from torch import nn

import rewriter
from rewriter import Exact
from rewriter import Policy
from rewriter import SeparatorMask
from rewriter import SlidingWindow

POLICIES: list[Policy] = [Exact(), SlidingWindow(4, sinks=1), SeparatorMask((3, 7), window=6)]


def llama() -> nn.Module:
    from transformers import LlamaConfig
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes))


def batch(rank: int) -> dict[str, Tensor]:
    """Two rows of this process, the first one padded on the left."""
    ids = torch.randint(8, 64, (2, 20), generator=torch.Generator().manual_seed(rank))
    mask = (torch.arange(20) >= torch.tensor([[5], [0]])).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def packed(rank: int) -> dict[str, Tensor]:
    """One row of two documents."""
    ids = torch.randint(8, 64, (1, 20), generator=torch.Generator().manual_seed(rank))
    positions = torch.cat((torch.arange(8), torch.arange(12)))[None]
    return {"input_ids": ids, "position_ids": positions, "labels": ids}


def gradients(model: Any) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        grad = parameter.grad
        found[name.removeprefix("module.")] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


def difference(model: Any, alone: Any) -> float:
    """The most that a gradient differs from the mean of those of one process after the other."""
    expected = gradients(alone)
    return max(float((own - expected[name]).abs().max()) for name, own in gradients(model).items())


def train(rank: int, way: str, backend: str) -> list[float]:
    """For each policy and kind of batch, how far gradients are from those of a process that has the whole batch."""
    from torch.distributed.fsdp import fully_shard

    found = []
    for policy in POLICIES:
        for make in (batch, packed):
            fast: Any = rewriter.optimize(llama(), policy, strict=True, backend=backend)
            alone = rewriter.optimize(llama(), policy, strict=True, backend="eager")
            model = nn.parallel.DistributedDataParallel(fast) if way == "ddp" else fully_shard(fast)
            with warnings.catch_warnings():
                warnings.simplefilter("error", rewriter.PolicyWarning)
                warnings.simplefilter("ignore", rewriter.SpeedWarning)
                model(**make(rank), use_cache=False).loss.backward()
                sum(alone(**make(r), use_cache=False).loss / 2 for r in range(2)).backward()
            found.append(difference(model, alone))
            del model
    return found


@pytest.mark.parametrize("way", ["ddp", "fully_shard"])
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.soak)])
def test_gradients_are_those_of_one_process(way: str, backend: str) -> None:
    for of_rank in in_processes(train, way, backend):
        assert len(of_rank) == 2 * len(POLICIES) and max(of_rank) <= 1e-6


def train_compiled(rank: int) -> tuple[float, int]:
    from torch.distributed.fsdp import fully_shard

    fast: Any = fully_shard(rewriter.optimize(llama(), SlidingWindow(4), strict=True))
    alone = rewriter.optimize(llama(), SlidingWindow(4), strict=True, backend="eager")
    fast(**batch(rank), use_cache=False).loss.backward()
    sum(alone(**batch(r), use_cache=False).loss / 2 for r in range(2)).backward()
    return difference(fast, alone), len(fast.report.graphs)


def test_sharded_weights_under_inductor_make_one_graph() -> None:
    for found, graphs in in_processes(train_compiled):
        assert found <= 1e-6 and graphs == 1


def use_in_pieces(rank: int) -> dict[str, Any]:
    """What is said of weights in pieces, and tokens that are generated once they are whole."""
    from torch.distributed.fsdp import fully_shard

    model = llama().eval()
    expected = rewriter.optimize(copy.deepcopy(model), SlidingWindow(4), backend="eager")
    prompt = {"input_ids": batch(0)["input_ids"][1:]}
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    fast: Any = fully_shard(rewriter.optimize(model, SlidingWindow(4), backend="eager"))
    found = {}
    with pytest.raises(rewriter.CacheError) as in_pieces:
        fast.generate(**prompt, **options)
    found["in pieces"] = str(in_pieces.value)
    fast.unshard()
    found["equal"] = torch.equal(fast.generate(**prompt, **options), expected.generate(**prompt, **options))
    fast.reshard()
    with pytest.raises(rewriter.CacheError) as again:
        fast.generate(**prompt, **options)
    found["again"] = str(again.value)
    for way in ("layers", "model"):
        model = llama().eval()
        for part in model.model.layers if way == "layers" else (model,):
            fully_shard(part)
        with pytest.raises(rewriter.RewriteError) as refused:
            rewriter.optimize(model, SlidingWindow(4), backend="eager")(**prompt)
        found[way] = str(refused.value)
    return found


def test_what_is_said_of_weights_in_pieces() -> None:
    for found in in_processes(use_in_pieces):
        assert found["equal"]
        assert "call fast.unshard() before" in found["in pieces"] and found["again"] == found["in pieces"]
        assert "on 4 parts of the model (model.layers.0, ...)" in found["layers"]
        assert "on 1 parts of the model (the model itself, ...)" in found["model"]
        assert all("fully_shard(fast)" in found[way] for way in ("layers", "model"))
