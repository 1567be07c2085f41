"""The tokens of a text over several processes: losses, outputs and gradients are those of one process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from processes import in_processes
from torch import Tensor
from torch import nn

import rewriter
from rewriter import DynamicMask
from rewriter import Exact
from rewriter import Policy
from rewriter import SeparatorMask
from rewriter import SlidingWindow

POLICIES: list[Policy] = [Exact(), SlidingWindow(4, sinks=1), SeparatorMask((3, 7), window=6), DynamicMask(6)]
LENGTH = 40


def llama() -> nn.Module:
    from transformers import LlamaConfig
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes))


def padded(seed: int = 0) -> dict[str, Tensor]:
    """Two rows, the first one padded on the left."""
    ids = torch.randint(8, 64, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(LENGTH) >= torch.tensor([[5], [0]])).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def packed(seed: int = 0) -> dict[str, Tensor]:
    """One row of two documents."""
    ids = torch.randint(8, 64, (1, LENGTH), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat((torch.arange(18), torch.arange(LENGTH - 18)))[None]
    return {"input_ids": ids, "position_ids": positions, "labels": ids}


def optimized(policy: Policy, model: nn.Module, backend: str) -> Any:
    batch = padded()
    examples = {name: batch[name] for name in ("input_ids", "attention_mask")}
    options: dict[str, Any] = {"example_inputs": examples} if policy.adds_parameters else {}
    return rewriter.optimize(model, policy, strict=True, backend=backend, **options)


def whole(grad: Any) -> Tensor:
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad


def worst_gradient(model: Any, alone: Any) -> float:
    expected = dict(alone.named_parameters())
    own = {name.removeprefix("module."): parameter for name, parameter in model.named_parameters()}
    assert own.keys() == expected.keys()
    return max(float((whole(own[name].grad) - expected[name].grad).abs().max()) for name in own)


def mesh_of(*sizes: int, names: tuple[str, ...] = ("cp",)) -> Any:
    return torch.distributed.init_device_mesh("cpu", sizes, mesh_dim_names=names)


def train(rank: int, number: int, shard: bool, backend: str) -> list[tuple[float, float, float]]:
    """For each policy and kind of batch: how far loss, logits and gradients are from those of one process."""
    found = []
    mesh = mesh_of(number)
    for policy in POLICIES if shard or number > 2 else POLICIES[:1]:
        for make in (padded, packed) if number > 2 or isinstance(policy, SeparatorMask) else (padded,):
            alone = optimized(policy, llama(), "eager")
            fast = rewriter.distribute(optimized(policy, llama(), backend), mesh, shard=shard)
            model: Any = fast if shard else nn.parallel.DistributedDataParallel(fast)
            batch = make()
            result, expected = model(**batch), alone(**batch)
            result.loss.backward()
            expected.loss.backward()
            counts = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[..., None]
            logits = float(((result.logits - expected.logits) * counts).detach().abs().max())
            found.append(
                (abs(float(result.loss.detach() - expected.loss.detach())), logits, worst_gradient(model, alone))
            )
            assert len(fast.report.graphs) == 1 + policy.adds_parameters  # one of the example
    return found


@pytest.mark.parametrize("number", [2, pytest.param(4, marks=pytest.mark.soak)])
@pytest.mark.parametrize("shard", [True, False])
def test_training_is_that_of_one_process(shard: bool, number: int) -> None:
    for of_rank in in_processes(train, number, shard, "eager", number=number):
        assert len(of_rank) >= (len(POLICIES) + 1 if shard else 1)
        assert all(max(found) <= 1e-6 for found in of_rank)


def train_compiled(rank: int) -> tuple[float, int]:
    alone = optimized(SeparatorMask((3, 7), window=6), llama(), "eager")
    fast = rewriter.distribute(optimized(SeparatorMask((3, 7), window=6), llama(), "inductor"), mesh_of(2))
    for seed in range(2):
        fast(**padded(seed)).loss.backward()
        alone(**padded(seed)).loss.backward()
    return worst_gradient(fast, alone), len(fast.report.graphs)


def test_inductor_compiles_what_stands_between_attentions() -> None:
    for found, graphs in in_processes(train_compiled):
        assert found <= 1e-6 and graphs == 1


def train_with_batches(rank: int) -> float:
    """Two batches, each over two processes."""
    mesh = mesh_of(2, 2, names=("dp", "cp"))
    fast = rewriter.distribute(optimized(SlidingWindow(4), llama(), "eager"), mesh)
    alone = optimized(SlidingWindow(4), llama(), "eager")
    fast(**padded(mesh.get_local_rank("dp"))).loss.backward()
    sum(alone(**padded(seed)).loss / 2 for seed in range(2)).backward()
    return worst_gradient(fast, alone)


def test_batches_and_contexts_are_spread_together() -> None:
    assert max(in_processes(train_with_batches, number=4)) <= 1e-6


def own_outputs(rank: int) -> tuple[Tensor, Tensor]:
    fast = rewriter.distribute(
        optimized(SlidingWindow(4), llama(), "eager"), mesh_of(2), shard=False, gather_outputs=False
    )
    alone = optimized(SlidingWindow(4), llama(), "eager")
    ids = padded()["input_ids"]
    with torch.no_grad():
        return fast(input_ids=ids).logits, alone(input_ids=ids).logits


def test_outputs_may_stay_where_they_are() -> None:
    (first, whole_of_it), (second, _) = in_processes(own_outputs)
    assert first.shape == second.shape == (2, LENGTH // 2, 64)
    found = torch.cat((first, second), dim=1)
    nearest = torch.cdist(whole_of_it.double(), found.double()).amin(dim=2)  # each token is there, in one of the two
    assert nearest.amax() <= 1e-5


class Mixes(nn.Module):
    """A model of one attention, with something before it that is computed of several tokens."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.embed, self.project = nn.Embedding(64, 32), nn.Linear(32, 32)
        self.conv, self.table = nn.Conv1d(32, 32, 3, padding=1), nn.Parameter(torch.randn(64, 8))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        if self.how == "conv":
            x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        if self.how == "cumsum":
            x = x.cumsum(dim=1)
        if self.how == "mean":
            x = x - x.mean(dim=1, keepdim=True)
        if self.how == "shift":
            x = torch.cat((x[:, :1], x[:, :-1]), dim=1)
        if self.how == "reshape":
            x = x.reshape(x.size(0), 32, -1).transpose(1, 2)
        if self.how == "embedding":
            x = torch.nn.functional.embedding(input_ids[0] % 8, x[0])[None]
        if self.how == "noise":
            x = x * (torch.rand(input_ids.shape) > 0.5)[..., None]
        if self.how == "scatter":
            x = x.scatter(2, torch.zeros_like(input_ids[:, :1, None]), 1.0)
        if self.how == "table":
            x = x + self.table[: x.size(1) + 8].gather(1, input_ids[0, :, None] % 8)
        if self.how == "norm":
            x = torch.nn.functional.softmax(x, dim=1)
        heads = self.project(x).unflatten(2, (4, 8)).transpose(1, 2)
        y = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        return y.transpose(1, 2).flatten(2)


HOWS = ("conv", "cumsum", "mean", "shift", "reshape", "norm", "embedding", "scatter", "table")


def mix(rank: int) -> dict[str, str]:
    found = {}
    for how in (*HOWS, "noise"):
        fast = rewriter.distribute(rewriter.optimize(Mixes(how), backend="eager"), mesh_of(2), shard=False)
        with torch.no_grad(), pytest.raises(rewriter.RewriteError) as error:
            fast(padded()["input_ids"])
        found[how] = str(error.value)
    return found


def test_what_is_computed_of_several_tokens_is_an_error() -> None:
    for found in in_processes(mix):
        assert all(
            found[how].startswith("context parallelism spreads tokens over processes, and aten.") for how in HOWS
        )
        assert "makes random numbers of its own" in found["noise"]
        assert "conv1d" in found["conv"] and "cumsum" in found["cumsum"] and "softmax" in found["norm"]


class UsesLength(nn.Module):
    """A model that computes with the length of its text, looks numbers of tokens up, and has a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.table = nn.Embedding(64, 32), nn.Parameter(torch.randn(64, 32))

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        length = input_ids.size(1)
        x = self.embed(input_ids) * (1.0 / length) + self.table[input_ids % 7]
        x = x.clamp(max=length / 20) + 0.01 * torch.full_like(x, length)
        heads = x.unflatten(2, (4, 8)).transpose(1, 2)
        y = (
            torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
            .transpose(1, 2)
            .flatten(2)
        )
        return y, (y.square().mean(dim=2) / length).sum(), y.half().mean()


def use_length(rank: int) -> float:
    torch.manual_seed(0)
    model = UsesLength()
    alone = rewriter.optimize(copy.deepcopy(model), backend="eager")
    fast = rewriter.distribute(rewriter.optimize(model, backend="eager"), mesh_of(2))
    ids = padded()["input_ids"]
    found, expected = fast(ids), alone(ids)
    for results in (found, expected):
        (results[0].sum() + results[1] + results[2].float()).backward()
    differences = [float((f - e).detach().abs().max()) for f, e in zip(found, expected, strict=True)]
    return max(*differences[:2], differences[2] / 10, worst_gradient(fast, alone))


def test_the_length_of_a_text_is_that_of_the_whole() -> None:
    assert max(in_processes(use_length)) <= 1e-4


def misuse(rank: int) -> dict[str, str]:
    mesh = mesh_of(2)
    fast = rewriter.distribute(optimized(SlidingWindow(4), llama(), "eager"), mesh, shard=False)
    batch, tokens = padded(), padded()["input_ids"]
    calls: dict[str, Any] = {
        "length": lambda: fast(input_ids=tokens[:, :38]),
        "differ": lambda: fast(input_ids=tokens + rank),
        "cache": lambda: fast(input_ids=tokens, use_cache=True),
        "generate": lambda: fast.generate(input_ids=tokens, max_new_tokens=2),
        "names": lambda: rewriter.distribute(fast, mesh_of(2, names=("rows",))),
        "model": lambda: rewriter.distribute(llama(), mesh),  # type: ignore[arg-type]
        "one asks": lambda: fast(input_ids=tokens, use_cache=rank == 0),
        "policies": lambda: rewriter.distribute(
            optimized(SlidingWindow(4 + rank), llama(), "eager"), mesh, shard=False
        )(input_ids=tokens),
        "plan": lambda: rewriter.distribute(fast, mesh, tp_plan={}),
    }
    found = {}
    for name, call in calls.items():
        with torch.no_grad(), pytest.raises(rewriter.Error) as error:
            call()
        found[name] = str(error.value)
    inputs = {"inputs_embeds": torch.randn(2, LENGTH, 32, requires_grad=True)}
    for name, given in (("gradients", batch), ("inputs", inputs)):
        with pytest.raises(rewriter.RewriteError) as error:
            fast(**given)
        found[name] = str(error.value)
    return found


def test_misuse_is_an_error_in_each_process() -> None:
    for found in in_processes(misuse):
        assert "38 tokens cannot be cut into 4 equal parts" in found["length"]
        assert "input_ids differ between them" in found["differ"]
        assert "model and policy differ between them" in found["policies"]
        assert "leave use_cache" in found["one asks"]
        assert "leave use_cache" in found["cache"] and "in one process" in found["generate"]
        assert "'dp', 'cp', 'tp'" in found["names"] and "got LlamaForCausalLM" in found["model"]
        assert "inputs_embeds of the call require gradients" in found["inputs"]
        assert "needs both" in found["plan"] and "nothing here brings them together" in found["gradients"]
