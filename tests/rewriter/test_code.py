"""Code for a rewritten graph: one layer for all that are alike, none of it with gradients, and kept where it is asked to be."""

from __future__ import annotations

import copy
import gc
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rewriter.passes.graph.repeated_calls import tracing_state
from torch import Tensor
from torch import nn
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.experimental.symbolic_shapes import sym_or
from torch.utils._sympy.value_ranges import ValueRanges

import rewriter
from rewriter import Exact
from rewriter import Policy
from rewriter import SeparatorMask
from rewriter import SlidingWindow
from rewriter.code import CodeOfSizes
from rewriter.code import all_guards
from rewriter.code import generate_code
from rewriter.code import kept_in
from rewriter.code_of_graphs import _OfAnySize
from rewriter.code_of_graphs import _Symbols

IDS = torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(1))


def graphs_compiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The nodes of each graph that Inductor lowers from here on."""
    found: list[int] = []
    own = GraphLowering.run

    def run(self: GraphLowering, *args: Any) -> Any:
        found.append(len(self.module.graph.nodes))
        return own(self, *args)

    monkeypatch.setattr(GraphLowering, "run", run)
    return found


@torch.no_grad()
def test_the_compiler_sees_one_layer(tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts, not times: more layers make the graph longer by their calls alone. And the results are those of each layer."""
    nodes = []
    for layers in (4, 8):
        torch._dynamo.reset()
        model = tiny_model("gpt2", "sdpa", layers=layers).double().eval()
        fast, slow = (rewriter.optimize(model, SlidingWindow(4), backend=b) for b in ("inductor", "eager"))
        with monkeypatch.context() as patch, torch._inductor.utils.fresh_inductor_cache():
            compiled = graphs_compiled(patch)
            outputs = [fast(input_ids=IDS, use_cache=False).logits]
        nodes.append(compiled)
        outputs.append(slow(input_ids=IDS, use_cache=False).logits)
        torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(
            *(m(input_ids=IDS[:, :9], use_cache=False).logits for m in (fast, slow)), rtol=1e-9, atol=1e-11
        )
    (few_whole, few_layer), (many_whole, many_layer) = nodes
    weights, parts = 12, 4  # of a block of GPT-2; its call, its subgraph, and what comes out
    assert many_layer == few_layer and many_whole - few_whole <= 4 * (weights + parts)


def test_with_gradients_each_layer_has_code_of_its_own(
    tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch 2.13 computes wrong gradients of GPT-2's layers where they are subgraphs."""
    model = tiny_model("gpt2", "sdpa", layers=4).double().eval()
    plain = copy.deepcopy(model)
    monkeypatch.setattr("rewriter.code.share_layers", lambda module: pytest.fail("layers must not be shared"))
    for each, backend in ((model, "inductor"), (plain, "eager")):
        rewriter.optimize(each, SlidingWindow(4), backend=backend)(
            input_ids=IDS, labels=IDS, use_cache=False
        ).loss.backward()
    for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-9, atol=1e-11)


@torch.no_grad()
def test_what_cannot_be_shared_is_compiled_as_it_is(
    tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(module: GraphModule) -> int:
        raise AssertionError("a graph that nobody thought of")

    monkeypatch.setattr("rewriter.code.share_layers", fails)
    model = tiny_model("gpt2", "sdpa", layers=2).double().eval()
    fast = rewriter.optimize(model, strict=True)
    torch.testing.assert_close(fast(input_ids=IDS, use_cache=False).logits, model(input_ids=IDS).logits)


def test_code_is_kept_in_a_folder_and_found_there(
    tiny_model: Callable[..., nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts: the second time no graph is lowered."""
    lowered = graphs_compiled(monkeypatch)
    ids = torch.randint(0, 64, (2, 12))
    folder, before = tmp_path / "code", os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    counts, outputs = [], []
    for _ in range(2):
        torch._dynamo.reset()
        torch.manual_seed(0)
        fast = rewriter.optimize(tiny_model("llama", "sdpa").eval(), rewriter.SlidingWindow(4), cache=folder)
        with torch.no_grad():
            outputs.append(fast(input_ids=ids, use_cache=False).logits)
        counts.append(len(lowered))
    assert list(folder.rglob("*.so")) and os.environ.get("TORCHINDUCTOR_CACHE_DIR") == before
    assert counts[0] >= 1 and counts[1] == counts[0]
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("policy", "padded"),
    [(Exact(), True), (SlidingWindow(4), False), (SeparatorMask((3, 7), window=4), True)],
    ids=["exact, padded", "window", "separators, padded"],
)
@torch.no_grad()
def test_one_row_after_several_is_served_by_their_code(
    tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch, policy: Policy, padded: bool
) -> None:
    model = tiny_model("llama", "sdpa").eval()
    fast, slow = (rewriter.optimize(model, policy, backend=b, strict=True) for b in ("inductor", "eager"))
    with torch._inductor.utils.fresh_inductor_cache():
        compiled = graphs_compiled(monkeypatch)
        counts = []
        for rows, length in ((2, 12), (1, 12), (1, 9), (3, 11)):
            ids = IDS.repeat(2, 1)[:rows, :length]
            given = {"input_ids": ids, "use_cache": False}
            if padded:
                given["attention_mask"] = (torch.arange(length) >= torch.tensor([[2], [0], [3]])[:rows]).long()
            torch.testing.assert_close(fast(**given).logits, slow(**given).logits, rtol=1e-4, atol=1e-5)
            counts.append(len(compiled))
        assert counts[0] > 0 and set(counts) == {counts[0]}
        assert len(fast.report.graphs) == 2
        threads = torch.get_num_threads()
        torch.set_num_threads(threads + 1)
        try:
            fast(**{name: value[:1] for name, value in given.items() if isinstance(value, Tensor)}, use_cache=False)
        finally:
            torch.set_num_threads(threads)
        assert len(compiled) > counts[0]  # made anew where torch is in another state


class Around(nn.Module):
    """A model in another one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class Squeezing(Around):
    """Of one row it returns something else than a row of several."""

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits.squeeze() if input_ids.size(0) > 1 else -logits.squeeze()


@torch.no_grad()
def test_a_model_that_treats_one_row_unlike_others_has_code_for_it(
    tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Squeezing(tiny_model("llama", "sdpa")).eval()
    fast = rewriter.optimize(model, SlidingWindow(4), strict=True)
    slow = rewriter.optimize(model, SlidingWindow(4), backend="eager", strict=True)
    with torch._inductor.utils.fresh_inductor_cache():
        compiled = graphs_compiled(monkeypatch)
        fast(IDS)
        before = len(compiled)
        torch.testing.assert_close(fast(IDS[:1]), slow(IDS[:1]), rtol=1e-4, atol=1e-5)
    assert 0 < before < len(compiled)


@pytest.mark.parametrize("assumes", ["nothing", "several rows", "a long text", "few columns"])
def test_code_serves_what_its_assumptions_allow(assumes: str) -> None:
    """Where Inductor has assumed something of a size, it is asked of the other graph's sizes, and becomes its guard."""
    general, env = traced(3)
    symbols = _Symbols.of_inputs(general, env)
    assert symbols is not None
    rows, columns = (value for value in symbols._values if isinstance(value, torch.SymInt))
    if assumes == "several rows":
        assert bool(rows > 1)
    elif assumes == "a long text":
        assert bool(columns > 40)
    elif assumes == "few columns":
        symbols.shape_env.var_to_range[columns.node.expr] = ValueRanges(2, 100)
    code = _OfAnySize(general, symbols, lambda *given: given)
    special, other = traced(1)
    serves = code.for_graph(special, other)
    assert (serves is None) == (assumes in ("several rows", "few columns"))
    if serves is not None:
        assert serves(60, torch.ones(1, 60))[:-1] == (1, 60)
    assert code.became_guards(env)
    for shape_env in (env, other):
        asked = [str(guard.expr) for guard in shape_env.guards]
        assert [text.split(" ")[1:] for text in asked if "> 40" in text] == [[">", "40"]] * (assumes == "a long text")


def traced(rows: int) -> tuple[Graph, ShapeEnv]:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    assert mode.shape_env is not None
    x = mode.from_tensor(torch.randn(rows, 50), static_shapes=False)
    with mode:
        symbols = [size for size in x.shape if isinstance(size, torch.SymInt)]
        return make_fx(lambda *given: given[-1] * 2)(*symbols, x).graph, mode.shape_env


@torch.no_grad()
def test_a_graph_that_has_no_code_for_any_size_has_some_for_several(
    tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: _Symbols, module: GraphModule) -> Any:
        raise AssertionError("an operator that nobody thought of")

    monkeypatch.setattr(_Symbols, "generate_code", fails)
    model = tiny_model("llama", "sdpa", layers=1).eval()
    fast = rewriter.optimize(model, strict=True)
    for rows in (2, 1):
        torch.testing.assert_close(
            fast(input_ids=IDS[:rows], use_cache=False).logits, model(input_ids=IDS[:rows]).logits
        )


class Resized(Around):
    """Its rows are resized, to as many: the places to read have a formula for one row, and one for several."""

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return nn.functional.interpolate(
            logits[None], (logits.size(1), logits.size(2)), mode="bilinear", align_corners=True
        ) + nn.functional.interpolate(
            logits.transpose(0, 1)[None], (logits.size(0), logits.size(2)), mode="bilinear", align_corners=True
        ).transpose(1, 2)


@torch.no_grad()
def test_what_is_computed_by_another_formula_for_one_row_has_code_of_its_own(
    tiny_model: Callable[..., nn.Module],
) -> None:
    """Also where the code of several is found that was made before, with what it assumes."""
    model = Resized(tiny_model("llama", "sdpa")).eval()
    slow = rewriter.optimize(model, SlidingWindow(4), backend="eager", strict=True)
    with torch._inductor.utils.fresh_inductor_cache():
        for _ in range(2):
            torch._dynamo.reset()
            fast = rewriter.optimize(model, SlidingWindow(4), strict=True)
            for rows in (2, 1, 3):
                ids = IDS.repeat(2, 1)[:rows]
                torch.testing.assert_close(fast(ids), slow(ids), rtol=1e-4, atol=1e-5)


def test_code_of_one_kind_is_not_taken_for_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor keeps code by its settings, and the one that makes code for one row, too, is not among them."""
    compiled = graphs_compiled(monkeypatch)
    graph, env = traced(3)
    module = GraphModule({}, graph)
    symbols = _Symbols.of_inputs(graph, env)
    assert symbols is not None
    with torch._inductor.utils.fresh_inductor_cache():
        for number in (1, 2):
            with torch._guards.tracing(torch._guards.TracingContext(symbols._mode)):
                generate_code(module, symbols._values)
            assert len(compiled) == number
            symbols.generate_code(module)
            assert len(compiled) == 2


def test_folders_of_calls_that_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As two threads may: each leaves what the other needs, and the last one what was there before."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    for before in (None, "own"):
        if before is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, before)
        first, second = kept_in(tmp_path / "a"), kept_in(tmp_path / "b")
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert os.environ[name] == str(tmp_path / "b")
        second.__exit__(None, None, None)
        assert os.environ.get(name) == before


def writing_graph() -> GraphModule:
    """`cache += x`, and what is then in the cache times a weight, plus a second weight."""

    def step(x: Tensor, cache: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor]:
        cache.add_(x)
        return (cache * first + second,)

    return torch.fx.symbolic_trace(step)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of inputs that code was made for."""
    numbers: list[int] = []
    inner = CodeOfSizes._compiled

    def compiled(self: CodeOfSizes, tensors: tuple[Tensor, ...], any_size: Any) -> Any:
        numbers.append(len(tensors))
        return inner(self, tensors, any_size)

    monkeypatch.setattr(CodeOfSizes, "_compiled", compiled)
    return numbers


@torch.no_grad()
def test_code_of_a_graph_is_made_for_each_set_of_sizes(made: list[int]) -> None:
    code = CodeOfSizes(writing_graph())
    for size in (3, 3, 5, 3, 5):
        cache, first, second = torch.zeros(size), torch.randn(size), torch.randn(size)
        for step in range(1, 4):
            (result,) = code(torch.ones(size), cache, first, second)
            torch.testing.assert_close(cache, torch.full((size,), float(step)))
            torch.testing.assert_close(result, step * first + second)
    assert len(made) == 2


@torch.no_grad()
def test_inputs_that_become_one_tensor_or_two_are_others(made: list[int]) -> None:
    code = CodeOfSizes(writing_graph())
    x, one, other = (torch.randn(4) for _ in range(3))
    for first, second in ((one, one), (one, other), (other, other), (other, one), (x, x), (one, x)):
        cache = torch.zeros(4)
        torch.testing.assert_close(code(x, cache, first, second)[0], x * first + second)
    assert len(made) == 4  # of them one, two, and those with x among them


@torch.no_grad()
def test_code_of_a_graph_keeps_no_tensor_alive() -> None:
    code = CodeOfSizes(writing_graph())
    cache = torch.zeros(4)
    known = weakref.ref(cache)
    code(torch.ones(4), cache, torch.ones(4), torch.ones(4))
    del cache
    gc.collect()
    assert known() is None


@torch.no_grad()
def test_one_code_for_any_size_of_what_differs_from_call_to_call(made: list[int]) -> None:
    """Sizes of one have code of their own, and so have inputs of one size where the code asks for that."""

    def graph(x: Tensor, cache: Tensor, weight: Tensor) -> tuple[Tensor]:
        cache.add_(x.sum(dim=1, keepdim=True))
        return (cache * weight,)

    def check(rows: int, tokens: int, slots: int, width: int = 3) -> None:
        x, cache, weight = torch.randn(rows, tokens, width), torch.zeros(rows, slots, width), torch.randn(width)
        expected = x.sum(dim=1, keepdim=True).expand(-1, slots, -1)
        torch.testing.assert_close(code(x, cache, weight)[0], expected * weight)
        torch.testing.assert_close(cache, expected)

    code = CodeOfSizes(torch.fx.symbolic_trace(graph), {0: {0, 1}, 1: {0, 1}})
    for sizes in ((2, 4, 8), (3, 4, 8), (2, 5, 9), (7, 2, 30)):
        check(*sizes)
    assert len(made) == 1
    check(1, 4, 8)
    check(1, 6, 7)
    assert len(made) == 2
    check(2, 4, 8, width=5)
    assert len(made) == 3


@torch.no_grad()
def test_the_first_sizes_may_have_code_of_their_own(made: list[int]) -> None:
    code = CodeOfSizes(torch.fx.symbolic_trace(lambda x, y: (x * y,)), {0: {0, 1}}, first_alone=True)
    y = torch.randn(1)
    for (rows, tokens), expected in (((2, 1), 1), ((3, 5), 2), ((2, 1), 2), ((4, 6), 2), ((1, 5), 3), ((7, 5), 3)):
        x = torch.randn(rows, tokens)
        torch.testing.assert_close(code(x, y)[0], x * y)
        assert len(made) == expected


def test_threads_may_call_one_code_with_sizes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread is stopped where it has compared its tensors, until another one has been through, or cannot get in."""
    code = CodeOfSizes(torch.fx.symbolic_trace(lambda x, y: (x * y,)))
    y, is_inside, is_through = torch.randn(3), threading.Event(), threading.Event()
    found: dict[str, Tensor] = {}

    @torch.no_grad()
    def call(name: str, rows: int) -> None:
        found[name] = code(torch.ones(rows, 3), y)[0]

    def stop() -> Any:
        if threading.current_thread().name == "first":
            is_inside.set()
            is_through.wait(1.0)
        return tracing_state()

    for rows in (2, 5):
        call("before", rows)
    monkeypatch.setattr("rewriter.code.tracing_state", stop)
    first = threading.Thread(target=call, args=("first", 2), name="first")
    first.start()
    is_inside.wait()
    second = threading.Thread(target=lambda: (call("second", 5), is_through.set()))
    second.start()
    first.join()
    second.join()
    assert torch.equal(found["first"], y.expand(2, 3)) and torch.equal(found["second"], y.expand(5, 3))


@torch.no_grad()
def test_what_code_assumes_of_sizes_is_asked_where_it_was_kept(made: list[int]) -> None:
    """torch's own text of guards leaves out that the columns of x turned out to be five, and torch keeps less with the code."""
    y = torch.randn(5)
    with torch._inductor.utils.fresh_inductor_cache():
        for number in (1, 2):  # the second time, the code is found
            code = CodeOfSizes(torch.fx.symbolic_trace(lambda x, y: (x * y,)), {0: {0, 1}})
            for rows, columns in ((3, 5), (4, 1), (7, 5)):
                x = torch.randn(rows, columns)
                torch.testing.assert_close(code(x, y)[0], x * y)
            with pytest.raises(RuntimeError, match="must match"):
                code(torch.randn(3, 7), y)
            assert len(made) == 3 * number


@pytest.mark.parametrize("alternative", [True, False])
def test_an_alternative_among_the_guards_lets_go_of_none(alternative: bool) -> None:
    shape_env = ShapeEnv()
    x = FakeTensorMode(shape_env=shape_env).from_tensor(torch.randn(3, 5), static_shapes=False)
    assert bool(x.size(0) < 4)
    assert not alternative or bool(sym_or(x.size(1) == 5, x.size(1) > 40))
    text = all_guards(shape_env, [x])
    assert text is not None
    found = [shape_env.evaluate_guards_expression(text, [torch.empty(n, 5)]) for n in (2, 3, 4)]
    assert found == [True, True, False]


@torch.no_grad()
def test_generating_compiles_one_layer_for_all(
    tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts: what a layer more adds to the graphs over a cache is what stays beside the writes, and results are the same."""
    nodes = []
    for layers in (10, 20):
        torch._dynamo.reset()
        model = tiny_model("llama", "sdpa", layers=layers).eval()
        fast, slow = (rewriter.optimize(model, SlidingWindow(4), backend=b) for b in ("inductor", "eager"))
        options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        with monkeypatch.context() as patch, torch._inductor.utils.fresh_inductor_cache():
            nodes.append(graphs_compiled(patch))
            outputs = [fast.generate(IDS, attention_mask=torch.ones_like(IDS), **options).logits]
        outputs.append(slow.generate(IDS, attention_mask=torch.ones_like(IDS), **options).logits)
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    few, many = nodes
    assert len(few) == len(many) == 4  # prefill, its layer, decoding, its layer
    assert [many[place] for place in (1, 3)] == [few[place] for place in (1, 3)]
    for graph in (0, 2):
        assert 0 < (many[graph] - few[graph]) / 10 < 50  # weights, writes and attention; over 100 with all of it
