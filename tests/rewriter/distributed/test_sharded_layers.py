"""Parameters in pieces, gathered layer by layer: losses and gradients are those of one process, and few are whole at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from processes import in_processes
from torch import Tensor
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import rewriter
from rewriter import DynamicMask
from rewriter import Exact
from rewriter import Policy
from rewriter import SeparatorMask
from rewriter import SlidingWindow

POLICIES: list[Policy] = [Exact(), SlidingWindow(4, sinks=1), SeparatorMask((3, 7), window=6), DynamicMask(6)]
LENGTH = 20


def llama(**options: Any) -> nn.Module:
    """Its 67 words are no multiple of the processes."""
    from transformers import LlamaConfig
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=67, num_key_value_heads=2, **sizes, **options))


def padded(seed: int) -> dict[str, Tensor]:
    """Two rows, the first one padded on the left."""
    ids = torch.randint(8, 64, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(LENGTH) >= torch.tensor([[5], [0]])).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def packed(seed: int) -> dict[str, Tensor]:
    """One row of two documents."""
    ids = torch.randint(8, 64, (1, LENGTH), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat((torch.arange(8), torch.arange(LENGTH - 8)))[None]
    return {"input_ids": ids, "position_ids": positions, "labels": ids}


def optimized(policy: Policy, model: nn.Module, backend: str) -> Any:
    batch = padded(0)
    examples = {name: batch[name] for name in ("input_ids", "attention_mask")}
    options: dict[str, Any] = {"example_inputs": examples} if policy.adds_parameters else {}
    return rewriter.optimize(model, policy, strict=True, backend=backend, **options)


def mesh_of(*sizes: int, names: tuple[str, ...] = ("dp",)) -> Any:
    return torch.distributed.init_device_mesh("cpu", sizes, mesh_dim_names=names)


def spread(policy: Policy, model: nn.Module, backend: str, mesh: Any = None) -> Any:
    mesh = mesh_of(torch.distributed.get_world_size()) if mesh is None else mesh
    return rewriter.distribute(optimized(policy, model, backend), mesh, shard="layers")


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def worst_gradient(model: Any, alone: Any) -> float:
    expected = dict(alone.named_parameters())
    own = dict(model.named_parameters())
    assert own.keys() == expected.keys()
    assert all((own[name].grad is None) == (expected[name].grad is None) for name in own)
    learned = [name for name in own if own[name].grad is not None]
    assert learned
    return max(float((whole(own[name].grad) - expected[name].grad).abs().max()) for name in learned)


def mean_loss(alone: Any, make: Any, number: int) -> Tensor:
    return sum(alone(**make(seed), use_cache=False).loss / number for seed in range(number))


def train(rank: int, backend: str, policies: list[Policy]) -> list[float]:
    """For each policy and kind of batch, how far gradients are from those of a process that has the whole batch."""
    found = []
    number = torch.distributed.get_world_size()
    for policy in policies:
        for make in (padded, packed) if isinstance(policy, SeparatorMask) and backend == "eager" else (padded,):
            fast, alone = spread(policy, llama(), backend), optimized(policy, llama(), "eager")
            fast(**make(rank), use_cache=False).loss.backward()
            mean_loss(alone, make, number).backward()
            found.append(worst_gradient(fast, alone))
            assert len(fast.report.graphs) == 1 + policy.adds_parameters  # one of the example
    return found


@pytest.mark.parametrize(
    ("backend", "policies", "number"),
    [
        ("eager", POLICIES[2:], 2),
        ("inductor", POLICIES[2:3], 2),
        pytest.param("eager", POLICIES, 3, marks=pytest.mark.soak),
        pytest.param("inductor", POLICIES, 3, marks=pytest.mark.soak),
    ],
)
def test_gradients_are_those_of_one_process(backend: str, policies: list[Policy], number: int) -> None:
    for of_rank in in_processes(train, backend, policies, number=number):
        assert len(of_rank) == len(policies) + (backend == "eager") and max(of_rank) <= 1e-6


def peak_bytes(run: Any) -> int:
    """The most that is allocated beyond what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes))


def large() -> nn.Module:
    """Nearly all of its memory is parameters: 12 layers of 200 thousand numbers, and 4 thousand beside them."""
    from transformers import LlamaConfig
    from transformers import LlamaForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 12, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, num_key_value_heads=4, **sizes))


@pytest.fixture
def imagined_processes() -> Iterator[None]:
    """This process is one of two, and the other one is not there: what it would send is any numbers."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("backend", "shard", "least", "most"),
    [("eager", "layers", 0.5, 0.5 + 5 / 12), ("inductor", "layers", 0.5, 0.5 + 5 / 12), ("eager", True, 2.0, 3.0)],
)
def test_few_parameters_are_whole_at_a_time(
    imagined_processes: None, backend: str, shard: Any, least: float, most: float
) -> None:
    """What a step needs at most, of all parameters' bytes: the gradients of a process are half of these, a layer is a twelfth. As
    one unit all are whole, and so are their gradients."""
    model = large()
    everything = sum(p.numel() * p.element_size() for p in model.parameters())
    fast = rewriter.distribute(optimized(SlidingWindow(4), model, backend), mesh_of(2), shard=shard)

    def step() -> None:
        fast(input_ids=torch.randint(16, (1, 8)), use_cache=False).logits.square().mean().backward()

    for _ in range(2):
        step()
    assert least <= peak_bytes(step) / everything <= most


def use(rank: int) -> dict[str, Any]:
    """Optimizers, frozen and shared parameters, checkpoints in time and on disk, generation."""
    found: dict[str, Any] = {}
    number = torch.distributed.get_world_size()

    # Two steps with clipped gradients, each over two batches.
    fast, alone = spread(SlidingWindow(4), llama(), "eager"), optimized(SlidingWindow(4), llama(), "eager")
    for model in (fast, alone):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for step in range(2):
            for part in range(2):
                make = lambda seed, part=part, step=step: padded(10 * step + 5 * part + seed)  # noqa: E731
                loss = mean_loss(alone, make, number) if model is alone else fast(**make(rank), use_cache=False).loss
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    expected = dict(alone.named_parameters())
    found["steps"] = max(float((whole(p) - expected[n]).detach().abs().max()) for n, p in fast.named_parameters())

    # Some parameters are frozen, one has two places, and layers are computed again in the backward.
    models = []
    for _ in range(2):
        model = llama(tie_word_embeddings=True)
        model.model.layers[0].requires_grad_(False)
        model.gradient_checkpointing_enable()
        models.append(model.train())
    fast, alone = spread(Exact(), models[0], "eager"), optimized(Exact(), models[1], "eager")
    assert fast.model.lm_head._parameters["weight"] is fast.model.model.embed_tokens._parameters["weight"]
    fast(**padded(rank), use_cache=False).loss.backward()
    mean_loss(alone, padded, number).backward()
    found["frozen"] = worst_gradient(fast, alone)

    # Tokens and files are made of whole parameters.
    fast, alone = (
        spread(SlidingWindow(4), llama().eval(), "eager"),
        optimized(SlidingWindow(4), llama().eval(), "eager"),
    )
    prompt = {"input_ids": padded(0)["input_ids"][1:]}
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    with pytest.raises(rewriter.CacheError) as in_pieces:
        fast.generate(**prompt, **options)
    found["in pieces"] = str(in_pieces.value)
    with pytest.raises(rewriter.RewriteError, match="with rewriter"):
        fast.save_pretrained("nowhere")
    with pytest.raises(rewriter.RewriteError, match="in pieces already"):
        rewriter.distribute(fast, mesh_of(number), shard="layers")
    with rewriter.whole_parameters(fast):
        found["tokens"] = torch.equal(fast.generate(**prompt, **options), alone.generate(**prompt, **options))
        found["names"] = fast.state_dict().keys() == alone.state_dict().keys()
        assert all(torch.equal(tensor, fast.state_dict()[name]) for name, tensor in alone.state_dict().items())
    with torch.no_grad():
        found["after"] = float((fast(**prompt).logits - alone(**prompt).logits).abs().max())
    return found


def test_training_generation_and_files() -> None:
    for found in in_processes(use):
        assert found["steps"] <= 1e-6 and found["frozen"] <= 1e-6 and found["after"] <= 1e-6
        assert found["tokens"] and found["names"] and "rewriter.whole_parameters(fast)" in found["in pieces"]


def misuse(rank: int) -> dict[str, str]:
    found = {}

    class OneNumber(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = llama()
            self.factor = nn.Parameter(torch.tensor(2.0))

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.inner(input_ids, use_cache=False).logits * self.factor

    model = OneNumber()
    with pytest.raises(rewriter.RewriteError) as refused:
        spread(Exact(), model, "eager")
    found["factor is a single number"] = str(refused.value)
    assert all(type(p) is nn.Parameter for p in model.parameters())  # nothing is half changed
    plan = {"lm_head": torch.distributed.tensor.parallel.ColwiseParallel()}
    for name, options in {
        "'tp' out": {"mesh": mesh_of(2, names=("tp",)), "tp_plan": plan, "shard": "layers"},
        "'layers', got 'layer'": {"mesh": mesh_of(2), "shard": "layer"},
    }.items():
        with pytest.raises(rewriter.RewriteError) as refused:
            rewriter.distribute(optimized(Exact(), llama(), "eager"), **options)
        found[name] = str(refused.value)
    return found


def test_misuse_is_an_error() -> None:
    for found in in_processes(misuse):
        assert len(found) == 3
        for text, message in found.items():
            assert text in message


def train_contexts(rank: int) -> float:
    """Texts over two processes, their layers in pieces on both."""
    fast = spread(SeparatorMask((3, 7), window=6), llama(), "eager", mesh_of(2, names=("cp",)))
    alone = optimized(SeparatorMask((3, 7), window=6), llama(), "eager")
    fast(**padded(0)).loss.backward()
    alone(**padded(0), use_cache=False).loss.backward()
    return worst_gradient(fast, alone)


def test_contexts_and_layers_are_spread_together() -> None:
    assert max(in_processes(train_contexts)) <= 1e-6
