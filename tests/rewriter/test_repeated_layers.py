"""Layers that are alike are traced once; what differs between them, or comes later, is not lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch import nn
from torch._dynamo.variables import invoke_subgraph

import rewriter
from rewriter.repeated_layers import layers_of

LAYERS = 6


class Layer(nn.Module):
    """Attention over a window, and a scale; a list that is shared by all is read, and one may be written to."""

    def __init__(self, number: int, notes: dict[str, float]) -> None:
        super().__init__()
        self.projection = nn.Linear(8, 24, bias=False)
        self.scale = 1.0
        self.notes = notes
        self.number = number
        self.returns_input = False

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.returns_input:
            return x
        query, key, value = self.projection(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        return x + y.transpose(1, 2).flatten(2) * self.scale * self.notes["factor"]


class Model(nn.Module):
    def __init__(self, counts: bool = False) -> None:
        super().__init__()
        self.notes = {"factor": 1.0}
        self.embedding = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(Layer(number, self.notes) for number in range(LAYERS))
        self.counts = counts

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
            if self.counts:
                self.notes["factor"] = self.notes["factor"] + 0.125
        return x


def optimized(model: nn.Module) -> Any:
    return rewriter.optimize(model, rewriter.Exact(), backend="eager", progress=False, strict=True)


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the bodies that were repeated."""
    names: list[str] = []
    inner = invoke_subgraph.stamp_out_subgraph

    def stamp_out_subgraph(tx: Any, fingerprint: Any, cached: Any) -> Any:
        names.append(cached.body_name)
        return inner(tx, fingerprint, cached)

    monkeypatch.setattr(invoke_subgraph, "stamp_out_subgraph", stamp_out_subgraph)
    return names


@pytest.fixture
def ids() -> Tensor:
    torch.manual_seed(0)
    return torch.randint(0, 16, (2, 9))


@pytest.mark.parametrize("learns", [False, True])
def test_layers_that_are_alike_are_traced_once(repeated: list[str], ids: Tensor, learns: bool) -> None:
    model = Model()
    fast = optimized(model)
    with torch.set_grad_enabled(learns):
        output = fast(ids)
        torch.testing.assert_close(output, model(ids))
    assert len(repeated) == LAYERS - 1
    paths = [site.module for site in fast.report.sites]
    assert paths == [f"layers.{n}" for n in range(LAYERS)]
    if learns:
        output.square().mean().backward()
        own = [layer.projection.weight.grad.clone() for layer in model.layers]
        model.zero_grad()
        model(ids).square().mean().backward()
        for layer, gradient in zip(model.layers, own, strict=True):
            torch.testing.assert_close(gradient, layer.projection.weight.grad)


def test_a_layer_that_is_unlike_the_others_is_traced_by_itself(repeated: list[str], ids: Tensor) -> None:
    model = Model()
    model.layers[2].scale = 3.0
    torch.testing.assert_close(optimized(model)(ids), model(ids))
    assert 0 < len(repeated) < LAYERS - 1


class Divided(nn.Module):
    """Its numbers come as arguments; what is an integer divides without a remainder."""

    def __init__(self, numbers: list[Any]) -> None:
        super().__init__()
        self.numbers = numbers
        self.layers = nn.ModuleList(Dividing() for _ in numbers)

    def forward(self, ids: Tensor) -> Tensor:
        x = F.one_hot(ids, 16).float()
        for layer, number in zip(self.layers, self.numbers, strict=True):
            x = layer(x, number)
        return x


class Dividing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(16, 16)

    def forward(self, x: Tensor, number: Any) -> Tensor:
        y = self.projection(x).unsqueeze(1)
        y = F.scaled_dot_product_attention(y, y, y, is_causal=True).squeeze(1)
        # A tenth keeps x near 1 in all layers: scores that grow with each layer would magnify the rounding of float32.
        return x + 0.1 * y * (7 // number if isinstance(number, int) else 7 / number)


def test_numbers_that_are_equal_and_of_other_types_are_others(ids: Tensor) -> None:
    model = Divided([2, 2.0, 2, 2.0, 2])
    torch.testing.assert_close(optimized(model)(ids), model(ids))


@pytest.mark.parametrize("number", range(LAYERS))
def test_what_changes_in_one_layer_later_is_noticed(repeated: list[str], ids: Tensor, number: int) -> None:
    model = Model()
    fast = optimized(model)
    fast(ids)
    assert repeated
    model.layers[number].scale = 5.0
    torch.testing.assert_close(fast(ids), model(ids))


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("later", [False, True])
def test_a_hook_on_one_layer_is_not_lost(repeated: list[str], ids: Tensor, number: int, later: bool) -> None:
    model = Model()
    fast = optimized(model)
    if later:
        fast(ids)
    model.layers[number].register_forward_hook(lambda module, args, output: output * 2.0)
    torch.testing.assert_close(fast(ids), model(ids))
    assert repeated


def test_a_parameter_that_is_exchanged_later_is_the_one_that_is_used(repeated: list[str], ids: Tensor) -> None:
    model = Model()
    fast = optimized(model)
    fast(ids)
    model.layers[4].projection.weight = nn.Parameter(torch.randn(24, 8))
    torch.testing.assert_close(fast(ids), model(ids))
    model.layers[4].projection = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 24))
    torch.testing.assert_close(fast(ids), model(ids))
    assert repeated


def test_a_dictionary_that_is_written_between_layers_is_read_anew(ids: Tensor) -> None:
    model = Model(counts=True)
    expected = model(ids)
    model.notes["factor"] = 1.0
    torch.testing.assert_close(optimized(model)(ids), expected)


def test_a_layer_whose_input_has_a_size_that_is_found_out_inside(ids: Tensor) -> None:
    """torch cannot repeat that one."""
    layers = nn.Sequential(*Model().layers)
    x = torch.randn(2, 9, 8)
    torch.testing.assert_close(optimized(layers)(x), layers(x))


class Projecting(Dividing):
    """What it returns is of the type that autocast asks for."""

    def forward(self, x: Tensor, number: Any = 7) -> Tensor:
        return self.projection(super().forward(x, number))


class Mixed(nn.Module):
    """The second half of the layers in bf16; what is done with a result is decided by its type."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Projecting() for _ in range(LAYERS))

    def forward(self, ids: Tensor) -> Tensor:
        x = F.one_hot(ids, 16).float()
        for number, layer in enumerate(self.layers):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=number >= LAYERS // 2):
                y = layer(x)
            x = x + (3 * y.float() if y.dtype == torch.bfloat16 else y)
        return x


def test_layers_under_autocast_are_others(ids: Tensor) -> None:
    """Compared with the same graph traced layer by layer: 16 bits round too much for the model itself."""
    model = Mixed()
    one_by_one = optimized(model)
    one_by_one._call.layers = frozenset()
    torch.testing.assert_close(optimized(model)(ids), one_by_one(ids), rtol=0, atol=0)
    torch.testing.assert_close(one_by_one(ids), model(ids), rtol=5e-2, atol=0.2)


@torch.no_grad()
def test_layers_in_which_gradients_are_on_are_others(ids: Tensor) -> None:
    class Frozen(Model):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.embedding(ids)
            for number, layer in enumerate(self.layers):
                with torch.set_grad_enabled(number >= LAYERS // 2):
                    x = layer(x)
            return x

    model = Frozen()
    fast = optimized(model)
    torch.testing.assert_close(fast(ids), model(ids))


def test_layers_that_cannot_be_regions_are_traced_one_by_one(ids: Tensor) -> None:
    model = Model()
    for layer in model.layers[::2]:
        layer.returns_input = True
    torch.testing.assert_close(optimized(model)(ids), model(ids))


def test_one_layer_that_runs_several_times_runs_with_its_own_weights(ids: Tensor) -> None:
    model = Model()
    for number in (1, 3, 4):
        model.layers[number] = model.layers[0]
    fast = optimized(model)
    torch.testing.assert_close(fast(ids), model(ids))
    model.layers[0].scale = 0.5
    torch.testing.assert_close(fast(ids), model(ids))


def test_many_unlike_layers(ids: Tensor) -> None:
    """More kinds than torch keeps."""
    model = Model()
    model.layers.extend(Layer(number, model.notes) for number in range(LAYERS, 12))
    for number, layer in enumerate(model.layers):
        layer.scale = (1 + number) / 16
    torch.testing.assert_close(optimized(model)(ids), model(ids))


def test_the_layers_of_a_model_are_those_of_its_lists() -> None:
    model = nn.Module()
    model.few = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    model.mixed = nn.ModuleList([nn.ReLU(), *(nn.Linear(2, 2) for _ in range(4))])
    inner = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    model.nested = nn.ModuleList([inner, *(nn.Sequential(nn.ReLU()) for _ in range(3))])
    expected = {id(m) for m in (*list(model.mixed)[1:], *model.nested)}
    assert layers_of(model) == expected
