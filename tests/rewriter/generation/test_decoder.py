"""The law: decoding over the evicting cache equals the masked full forward. Same ranges, two executions."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from crossed import crossed
from torch import Tensor
from torch import nn

import rewriter
from rewriter import DynamicMask
from rewriter import Exact
from rewriter import PerLayer
from rewriter import SeparatorMask
from rewriter import SlidingWindow
from rewriter.code import CodeOfSizes
from rewriter.errors import CacheError
from rewriter.testing import assert_within_budget

SEPARATORS = tuple(range(3, 20))
MODELS = [
    ("llama", "sdpa"),
    ("llama", "eager"),
    ("qwen3", "sdpa"),
    ("mistral", "sdpa"),
    ("gemma2", "eager"),
    ("gpt2", "eager"),
    ("gpt2", "sdpa"),
]
POLICIES = [
    Exact(),
    SlidingWindow(5, sinks=1),
    SeparatorMask(SEPARATORS, initial=2, window=4),
    SeparatorMask(SEPARATORS, initial=1, window=3, max_separators=2),
    SeparatorMask(SEPARATORS, initial=1, window=3, max_separators=2, capacity=9),
    SeparatorMask(SEPARATORS, initial=1, window=3, max_separators=2, capacity=9, positions="cache"),
    DynamicMask(5),
    DynamicMask(4, local=2),
    PerLayer({0: Exact(), "default": SlidingWindow(5, sinks=1)}),
]
PIECES = [(26,), (7, 1, 1, 5, 2, 1, 9), (1,) * 26, (12, 1, 1, 12)]


def ready(model: nn.Module, policy: rewriter.Policy, name: str = "llama") -> rewriter.OptimizedModel:
    """Weights large enough that every key matters; dynamic masks whose scores differ."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(6)
    if isinstance(policy, DynamicMask) and name in ("mistral", "gemma2"):
        policy = dataclasses.replace(policy, on_window="intersect")
    fast = rewriter.optimize(model.eval(), policy, backend="eager", strict=True)
    for parameters in fast.policy_parameters.values():
        nn.init.uniform_(parameters["A"], -1, 1)
    return fast


def padded(rows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, a padding mask whose rows are padded differently on the left, and the positions of the tokens.

    The tokens of a row are distinct: scores of equal ones tie, and rounding, which depends on the pieces, would decide.
    """
    ids = torch.stack([torch.randperm(64)[:length] for _ in range(rows)])
    mask = (torch.arange(length) >= 4 * torch.arange(rows)[:, None]).long()
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def in_pieces(
    fast: rewriter.OptimizedModel, ids: Tensor, mask: Tensor, positions: Tensor, pieces: tuple[int, ...]
) -> Tensor:
    cache, outputs, begin = fast.new_cache(64), [], 0
    for size in pieces:
        part = slice(begin, begin + size)
        inputs = {"input_ids": ids[:, part], "attention_mask": mask[:, : part.stop], "position_ids": positions[:, part]}
        outputs.append(fast(**inputs, past_key_values=cache).logits)
        begin += size
    assert cache.length == begin
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize(("name", "attention", "policy"), crossed(MODELS, POLICIES))
@torch.no_grad()
def test_pieces_equal_the_masked_full_forward(
    name: str, attention: str, policy: Any, tiny_model: Callable[..., nn.Module]
) -> None:
    by_place = getattr(policy, "positions", "text") == "cache"
    if by_place and name in ("mistral", "gemma2", "gpt2"):
        fast = ready(tiny_model(name, attention), policy, name)
        reason = "not a rotation" if name == "gpt2" else "distances of the model's own mask"
        with pytest.raises(rewriter.RewriteError, match=reason):
            fast(input_ids=torch.zeros(2, 9, dtype=torch.long), use_cache=False)
        return
    fast = ready(tiny_model(name, attention), policy, name)
    ids, mask, positions = padded(3, 26)
    given = {} if by_place else {"position_ids": positions}
    full = fast(input_ids=ids, attention_mask=mask, use_cache=False, **given).logits[mask.bool()]
    precise = copy.deepcopy(fast).double()
    exact = precise(input_ids=ids, attention_mask=mask, use_cache=False, **given).logits[mask.bool()]
    actual = [in_pieces(fast, ids, mask, positions, pieces)[mask.bool()] for pieces in PIECES]
    pooled = [t.repeat(len(PIECES), 1) for t in (full, exact)]
    assert_within_budget(torch.cat(actual), *pooled, "logits")


def streamed(model: Any, ids: Tensor, visible: list[list[int]]) -> Tensor:
    """A Llama whose query t sees the keys `visible[t]`, numbered by their places: SepLLM's streaming, query by query."""
    inner, config = model.model, model.config
    x = inner.embed_tokens(ids)[None]
    group = config.num_attention_heads // config.num_key_value_heads
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    for layer in inner.layers:
        h = layer.input_layernorm(x)
        attention = layer.self_attn
        q, k, v = (
            project(h).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        rows = []
        for t, keys in enumerate(visible):
            cos, sin = inner.rotary_emb(h, torch.arange(len(keys))[None])
            _, turned = apply_rotary_pos_emb(k[:, :, keys], k[:, :, keys], cos, sin)
            query, _ = apply_rotary_pos_emb(q[:, :, t : t + 1], q[:, :, t : t + 1], cos[:, -1:], sin[:, -1:])
            turned, values = (z.repeat_interleave(group, dim=1) for z in (turned, v[:, :, keys]))
            weights = (query @ turned.transpose(2, 3) * attention.scaling).softmax(-1)
            rows.append(weights @ values)
        y = torch.cat(rows, dim=2).transpose(1, 2).flatten(2)
        x = x + attention.o_proj(y)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(inner.norm(x))[0]


@pytest.mark.parametrize(
    "policy",
    [
        SeparatorMask(SEPARATORS, initial=1, window=3, max_separators=2, capacity=9, positions="cache"),
        SeparatorMask(SEPARATORS, initial=2, window=6, max_separators=0, capacity=8, positions="cache"),
        SeparatorMask(SEPARATORS, initial=0, window=1, max_separators=4, capacity=12, positions="cache"),
    ],
    ids=str,
)
@torch.no_grad()
def test_places_in_the_cache_equal_streaming_query_by_query(
    policy: SeparatorMask, tiny_model: Callable[..., nn.Module], cache_itself: Callable[..., Any]
) -> None:
    """Separators, and with none of them StreamingLLM; one row padded on the left, in one forward and in pieces."""
    fast = ready(tiny_model("llama", "sdpa"), policy)
    ids = torch.randint(0, 64, (2, 40))
    mask = (torch.arange(40) >= torch.tensor([[0], [6]])).long()
    separator = torch.isin(ids, torch.tensor(policy.separators))
    outputs = []
    for model in (fast.model, copy.deepcopy(fast.model).double()):
        rows = [
            streamed(model, ids[b, pad:], cache_itself(separator[b, pad:].tolist(), policy._sizes)[0])
            for b, pad in enumerate((0, 6))
        ]
        outputs.append(torch.cat(rows))
    full = fast(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    assert_within_budget(full, *outputs, "one forward")
    pieces = in_pieces(fast, ids, mask, (mask.cumsum(1) - 1).clamp(min=0), (9, 1, 1, 1, 17, 1, 10))[mask.bool()]
    assert_within_budget(pieces, *outputs, "in pieces")


class Whole(nn.Module):
    """One attention whose values are whole numbers of at least 1, and so the scores before softplus, which passes what is
    above 20 as it is: scores of equal tokens tie exactly, whatever the order of sums and the width of vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 16)
        self.query_key = nn.Linear(16, 64)
        self.value = nn.Linear(16, 32)
        self.head = nn.Linear(32, 64)
        for weight in (self.embedding.weight, self.value.weight):
            weight.data.normal_().round_().abs_()
        self.value.bias.data.fill_(1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        q, k, v = (
            t.unflatten(-1, (4, 8)).transpose(1, 2) for t in (*self.query_key(x).chunk(2, dim=-1), self.value(x))
        )
        mask = torch.ones(input_ids.size(1), input_ids.size(1), dtype=torch.bool).tril()
        mask = mask & attention_mask.bool()[:, None, None, :]
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.head(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("local", [0, 2])
@torch.no_grad()
def test_scores_that_tie_and_scores_that_are_nan(local: int) -> None:
    """The older of equals stays, in pieces too; a NaN score hides its key."""
    ids, mask, positions = padded(3, 26)
    ids = ids % 5
    example = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    fast = rewriter.optimize(
        Whole().eval(), DynamicMask(3, local=local), backend="eager", strict=True, example_inputs=example
    )
    own = fast.policy_parameters["0"]
    own["W"].data.uniform_(1, 4).round_()
    own["A"].data.fill_(0.001)
    for poisoned in (False, True):
        if poisoned:
            own["A"].data[0] = float("nan")
        full = fast(**example)[mask.bool()]
        for pieces in PIECES:
            actual = in_pieces(fast, ids, mask, positions, pieces)[mask.bool()]
            torch.testing.assert_close(actual, full, rtol=1e-5, atol=1e-5)


def oracle(fast: rewriter.OptimizedModel) -> Any:
    """The model without a cache: each step is a masked full forward, and transformers generates with that."""
    view = copy.copy(fast.model)

    @functools.wraps(fast.model.forward)
    def forward(input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions = {} if fast.policy.positions == "cache" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        return fast(input_ids=input_ids, attention_mask=mask, use_cache=False, **positions)

    view.forward = forward
    return view


MODES = {
    "greedy": {"max_new_tokens": 12},
    "sampling": {"max_new_tokens": 12, "do_sample": True, "top_k": 8},
    "beams": {"max_new_tokens": 10, "num_beams": 3},
    "several": {"max_new_tokens": 10, "do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("policy", [POLICIES[0], POLICIES[1], *POLICIES[3:7]], ids=str)
@torch.no_grad()
def test_generate(policy: Any, tiny_model: Callable[..., nn.Module]) -> None:
    fast = ready(tiny_model("llama", "sdpa", layers=1), policy)
    ids, mask, _ = padded(3, 14)
    slow = oracle(fast)
    for name, mode in MODES.items():
        prompt = {"input_ids": ids, "attention_mask": mask, "pad_token_id": 0, "eos_token_id": 1}
        torch.manual_seed(3)
        expected = slow.generate(**prompt, **mode, use_cache=False)
        for chunk in (None, 4):
            torch.manual_seed(3)
            actual = fast.generate(**prompt, **mode, prefill_chunk=chunk)
            assert torch.equal(actual, expected), name
    if isinstance(policy, Exact):
        original = fast.model.generate(**prompt, max_new_tokens=12)
        assert torch.equal(fast.generate(**prompt, max_new_tokens=12), original)
    assert "forward" not in vars(fast.model), "the model is not patched"


@torch.no_grad()
def test_several_turns_on_one_cache(tiny_model: Callable[..., nn.Module]) -> None:
    """The whole text again, as transformers has it, or what follows; the cache takes only what is new."""
    for policy in (Exact(), SlidingWindow(5, sinks=1), POLICIES[5]):
        fast = ready(tiny_model("llama", "sdpa", layers=1), policy)
        ids, mask, _ = padded(2, 9)
        cache = fast.new_cache(200)
        options = {"pad_token_id": 0, "eos_token_id": 63, "max_new_tokens": 6, "do_sample": False}
        text, slow = ids, oracle(fast)
        for turn in range(3):
            asked = torch.randint(2, 62, (2, 4)) if turn else text[:, :0]
            text = torch.cat((text, asked), dim=1)
            mask = torch.cat((mask, torch.ones(2, text.size(1) - mask.size(1), dtype=torch.long)), dim=1)
            answer = fast.generate(text, attention_mask=mask, past_key_values=cache, **options)
            expected = slow.generate(text, attention_mask=mask, use_cache=False, **options)
            assert torch.equal(answer, expected)
            assert cache.length == answer.size(1) - 1
            text = answer


@torch.no_grad()
def test_a_streamer_gets_each_token(tiny_model: Callable[..., nn.Module]) -> None:
    fast = ready(tiny_model("llama", "sdpa"), SlidingWindow(5))

    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens.extend(value.flatten().tolist())

        def end(self) -> None:
            self.tokens.append(-1)

    streamer = Streamer()
    ids = torch.randint(2, 64, (1, 7))
    output = fast.generate(ids, max_new_tokens=5, streamer=streamer, pad_token_id=0, eos_token_id=1)
    assert streamer.tokens == [*output[0].tolist(), -1]


@torch.no_grad()
def test_compiled_steps_neither_recompile_nor_grow(tiny_model: Callable[..., nn.Module]) -> None:
    """Through Inductor: one graph for a single token, one for several, whatever the length; no tensor is made anew."""
    policy = POLICIES[5]
    assert isinstance(policy, SeparatorMask)
    model = ready(tiny_model("llama", "sdpa", layers=1), policy).model
    fast = rewriter.optimize(model, policy, strict=True)
    ids, mask, positions = padded(2, 60)
    full = fast(input_ids=ids, attention_mask=mask, use_cache=False).logits
    cache, outputs = fast.new_cache(), []
    pieces = [(0, 7), (7, 16), *((i, i + 1) for i in range(16, 40)), (40, 60)]
    for begin, end in pieces:
        if begin == 18:
            torch._dynamo.utils.counters.clear()
            storage = [t.data_ptr() for t in cache.state()]
        inputs = {"input_ids": ids[:, begin:end], "attention_mask": mask[:, :end], "past_key_values": cache}
        outputs.append(fast(**inputs, position_ids=positions[:, begin:end]).logits)
        if begin == 39:
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    torch.testing.assert_close(torch.cat(outputs, dim=1)[mask.bool()], full[mask.bool()], rtol=1e-4, atol=1e-4)
    assert [t.data_ptr() for t in cache.state()] == storage
    assert int(cache.living_keys().max()) <= 10


@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_each_token_and_each_prompt_takes_the_same_code(
    tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """One row, too: its last column is contiguous as it is, in other memory at each token."""
    compiled: list[int] = []
    inner = CodeOfSizes._compiled

    def count(self: CodeOfSizes, tensors: Sequence[Tensor], any_size: Any) -> Any:
        compiled.append(1)
        return inner(self, tensors, any_size)

    monkeypatch.setattr(CodeOfSizes, "_compiled", count)
    model = tiny_model("llama", "sdpa", layers=1).eval()
    fast = rewriter.optimize(model, Exact(), strict=True)
    for length, new in ((7, 6), (12, 3), (4, 9)):
        ids = torch.randint(2, 64, (rows, length))
        options: dict[str, Any] = {"max_new_tokens": new, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
        assert torch.equal(fast.generate(ids, **options), model.generate(ids, **options))  # type: ignore[operator]
        cache, mask = fast.new_cache(64), torch.ones(rows, length, dtype=torch.int64)
        for begin, end in ((0, length - 2), (length - 2, length - 1), (length - 1, length)):
            fast(input_ids=ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache)
    assert len(compiled) == 4  # prefill and one token, over the cache of a generation and over one of 64


@torch.no_grad()
def test_parameters_and_modes_are_the_models_present_ones(tiny_model: Callable[..., nn.Module]) -> None:
    class WithGetattr(nn.Linear):
        """Dynamo has another name for its parameters."""

        def __getattr__(self, name: str) -> Any:
            return super().__getattr__(name)

    torch._dynamo.reset()
    model = tiny_model("llama", "sdpa")
    model.model.layers[1].mlp.up_proj = WithGetattr(32, 48, bias=False)  # type: ignore[union-attr, index]
    fast = ready(model, SlidingWindow(5))
    ids, mask, positions = padded(2, 26)
    for layer in fast.model.model.layers:
        before = in_pieces(fast, ids, mask, positions, PIECES[1])
        layer.mlp.up_proj.weight = nn.Parameter(torch.randn(48, 32))
        after = in_pieces(fast, ids, mask, positions, PIECES[1])
        assert not torch.equal(before, after)
        full = fast(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(after[mask.bool()], full[mask.bool()], rtol=1e-4, atol=1e-4)
    cache = fast.new_cache()
    fast.to(torch.bfloat16)
    assert fast(input_ids=ids, past_key_values=fast.new_cache()).logits.dtype == torch.bfloat16
    with pytest.raises(CacheError, match="made by another optimized model, policy or dtype"):
        fast(input_ids=ids, past_key_values=cache)


@pytest.mark.parametrize("change", ["a number", "a flag", "a tensor", "a hook", "a forward"])
@torch.no_grad()
def test_what_a_module_holds_is_read_as_it_is_now(change: str, tiny_model: Callable[..., nn.Module]) -> None:
    """Attributes that are no parameters and no buffers, and code that a user hangs in."""

    class Scaled(nn.Linear):
        factor, negative = 1.0, False

        def __init__(self) -> None:
            super().__init__(32, 48, bias=False)
            self.each = torch.ones(48)

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x) * self.each * self.factor
            return -y if self.negative else y

    torch._dynamo.reset()
    model = tiny_model("llama", "sdpa", layers=1)
    model.model.layers[0].mlp.up_proj = scaled = Scaled()  # type: ignore[union-attr, index]
    fast = ready(model, Exact())
    ids, mask, positions = padded(2, 26)
    changes: dict[str, Callable[[], object]] = {
        "a number": lambda: setattr(scaled, "factor", 2.5),
        "a flag": lambda: setattr(scaled, "negative", True),
        "a tensor": lambda: setattr(scaled, "each", torch.full((48,), 3.0)),
        "a hook": lambda: scaled.register_forward_hook(lambda module, inputs, output: output * 3),
        "a forward": lambda: setattr(scaled, "forward", lambda x: x.repeat(1, 1, 2)[..., :48]),
    }
    given = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
    logits = []
    for do in (lambda: None, changes[change]):
        do()
        expected = fast.model(input_ids=ids, **given).logits[mask.bool()]
        logits.append(in_pieces(fast, ids, mask, positions, PIECES[1])[mask.bool()])
        torch.testing.assert_close(logits[-1], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fast(input_ids=ids, **given).logits[mask.bool()], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(*logits, atol=0.1)


@torch.no_grad()
def test_bad_input_leaves_the_cache_as_it_was(tiny_model: Callable[..., nn.Module]) -> None:
    from transformers import DynamicCache

    torch._dynamo.reset()
    model = tiny_model("llama", "sdpa")
    fast = ready(model, Exact())
    ids = torch.randint(0, 64, (2, 9))
    with pytest.raises(CacheError, match="so the cache needs a max_length"):
        fast.new_cache()
    with pytest.raises(CacheError, match="max_length must be at least 1"):
        fast.new_cache(0)
    cache = fast.new_cache(12)
    fast(input_ids=ids, past_key_values=cache)
    kept = [t.clone() for t in cache.state()]
    other = rewriter.optimize(model, SlidingWindow(4), backend="eager")
    for call, message in (
        (lambda: fast(input_ids=ids, past_key_values=cache), "has 9 of at most 12 tokens, and 9 more do not fit"),
        (lambda: fast(input_ids=ids[:1], past_key_values=cache), "holds 2 rows and the call has 1"),
        (lambda: fast(input_ids=ids[:, :0], past_key_values=cache), "input_ids is empty"),
        (lambda: fast(input_ids=ids[0], past_key_values=cache), r"input_ids must be integer \[B, n\]"),
        (
            lambda: other(input_ids=ids[:, :1], past_key_values=cache),
            "made by another optimized model, policy or dtype",
        ),
        (lambda: fast(inputs_embeds=torch.zeros(2, 1, 32), past_key_values=cache), "inputs_embeds is given"),
        (
            lambda: fast(input_ids=ids[:, :2], output_attentions=True, past_key_values=cache),
            "output_attentions is given",
        ),
        (
            lambda: fast(input_ids=ids[:, :2], attention_mask=torch.ones(2, 5), past_key_values=cache),
            r"attention_mask must be \[2, 2\], or \[2, 11\] for the whole text",
        ),
        (
            lambda: fast(input_ids=ids[:, :2], position_ids=torch.zeros(2, 3), past_key_values=cache),
            r"position_ids must be \[2, 2\]",
        ),
        (lambda: other.generate(ids, past_key_values=DynamicCache()), "past_key_values is a DynamicCache"),
        (lambda: fast.generate(torch.cat((ids, ids, ids), dim=1), past_key_values=cache), "do not fit"),
        (lambda: fast.generate(ids[:, :0]), "needs input_ids"),
        (lambda: fast.generate(ids, prefill_chunk=0), "prefill_chunk must be at least 1"),
        (lambda: fast.generate(ids, use_cache=False), "leave use_cache out"),
        (lambda: model(input_ids=ids, past_key_values=cache), "filled by the optimized model that made it"),
    ):
        with pytest.raises(CacheError, match=message):
            call()
        assert cache.length == 9
        assert all(torch.equal(now, before) for now, before in zip(cache.state(), kept, strict=True)), message


def test_models_that_cannot_go_on_are_refused(tiny_model: Callable[..., nn.Module], nano: type[nn.Module]) -> None:
    with pytest.raises(CacheError, match=r"NanoAttention\.forward takes no position_ids"):
        rewriter.optimize(nano().eval(), backend="eager").new_cache(9)
    with pytest.raises(rewriter.RewriteError, match="NanoAttention has no generate"):
        rewriter.optimize(nano().eval(), backend="eager").generate(torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(CacheError, match="a key must be seen from its own query on, and its mask is: padding"):
        rewriter.optimize(tiny_model("bert", "sdpa").eval(), backend="eager").new_cache(9)

    class Own(rewriter.Policy):
        def live_ranges(self, site: rewriter.SiteTensors) -> None:
            return None

    with pytest.raises(rewriter.PolicyError, match="Own does not say how its ranges go on from a cache"):
        rewriter.optimize(tiny_model("llama", "sdpa").eval(), Own(), backend="eager").new_cache(9)


def test_a_model_that_mixes_tokens_outside_attention_is_refused() -> None:
    """A causal convolution: in pieces it would begin anew with each. The check by evaluation finds it."""

    class Convolving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(64, 32)
            self.convolution = nn.Conv1d(32, 96, 3, padding=2)

        def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
            x = self.embedding(input_ids)
            y = self.convolution(x.transpose(1, 2))[:, :, : input_ids.size(1)].transpose(1, 2)
            q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in y.chunk(3, dim=-1))
            mask = torch.ones(input_ids.size(1), input_ids.size(1), dtype=torch.bool).tril()
            mask = mask & attention_mask.bool()[:, None, None, :]
            return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    with pytest.raises(CacheError, match="something besides attention mixes tokens"):
        rewriter.optimize(Convolving().eval(), backend="eager").new_cache(9)


@torch.no_grad()
def test_a_policy_of_ones_own_goes_on_and_a_wrong_pressure_is_found(tiny_model: Callable[..., nn.Module]) -> None:

    @dataclasses.dataclass(frozen=True)
    class Alternating(rewriter.Policy):
        """Every second key is forgotten after three queries."""

        slots: int = 64
        per_key_ranges = True

        def live_ranges(self, site: rewriter.SiteTensors) -> rewriter.kernels.LiveRanges:
            end = torch.where(site.index % 2 == 0, site.index + 3, rewriter.kernels.FOREVER)
            return rewriter.kernels.LiveRanges(site.index, end)

        def pressure(self, max_length: int) -> int:
            return min(self.slots, max_length)

    fast = ready(tiny_model("llama", "sdpa"), Alternating())
    ids, mask, positions = padded(2, 26)
    full = fast(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[mask.bool()]
    for pieces in PIECES:
        actual = in_pieces(fast, ids, mask, positions, pieces)[mask.bool()]
        torch.testing.assert_close(actual, full, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match=r"more keys live at once than the policy's pressure\(\) allows"):
        in_pieces(rewriter.optimize(fast.model, Alternating(7), backend="eager"), ids, mask, positions, PIECES[1])


class Plain(nn.Module):
    """A hand-written causal model that can be told to do what a cached call must not repeat."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.fault = fault
        self.embedding = nn.Embedding(64, 32)
        self.qkv = nn.Linear(32, 96)
        self.head = nn.Linear(32, 64)
        self.register_buffer("seen", torch.ones(64, 64, dtype=torch.bool).tril())

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        length = input_ids.size(1)
        x = self.embedding(input_ids)
        if self.fault == "branches" and length > 12:
            x = x.tanh() * 3
        alone = {"row alone": input_ids.size(0) == 1, "token alone": length == 1}
        if alone.get(self.fault):
            x = x.tanh() * 3
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        if self.fault == "numbers":
            q = q * torch.where(torch.arange(length) > 20, 2.0, 1.0)[:, None]
        mask = self.seen[:length, :length][None, None]
        if attention_mask is not None:
            mask = mask & attention_mask.bool()[:, None, None, :]
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.head(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("branches", "different things for different numbers of tokens"),
        ("numbers", "numbers the tokens of a call"),
        ("row alone", "gives a row alone other logits than among others"),
        ("token alone", "gives a token alone other logits than among others"),
    ],
)
def test_what_nine_tokens_cannot_show_is_refused(fault: str, reason: str) -> None:
    """Branches on sizes, or positions from an arange of the model's own, as Llama 4's attention scale has them."""
    with pytest.raises(CacheError, match=reason):
        rewriter.optimize(Plain(fault).eval(), backend="eager").new_cache(30)


@torch.no_grad()
def test_a_changed_model_is_captured_anew(tiny_model: Callable[..., nn.Module]) -> None:
    """Another submodule, parameters that were one and are two, and a mask that was changed in place."""
    ids = torch.randint(0, 64, (2, 9))
    fast = ready(tiny_model("gpt2", "eager", layers=1), SlidingWindow(5))
    before = fast(input_ids=ids, past_key_values=fast.new_cache()).logits
    fast.model.lm_head.weight = nn.Parameter(torch.randn(64, 32))
    after = fast(input_ids=ids, past_key_values=fast.new_cache()).logits
    torch.testing.assert_close(after, fast(input_ids=ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after, before)
    fast.model.lm_head = nn.Linear(32, 64)
    replaced = fast(input_ids=ids, past_key_values=fast.new_cache()).logits
    torch.testing.assert_close(replaced, fast(input_ids=ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    plain = rewriter.optimize(Plain().eval(), backend="eager")
    causal = plain(input_ids=ids, past_key_values=plain.new_cache(20)).logits
    plain.model.seen.triu_(-2)
    windowed = plain(input_ids=ids, past_key_values=plain.new_cache(20)).logits
    with pytest.raises(CacheError, match="Plain takes at most 63 tokens at once, got 65"):
        plain(input_ids=torch.zeros(2, 65, dtype=torch.long), past_key_values=plain.new_cache(99))
    assert not torch.allclose(causal, windowed)
    torch.testing.assert_close(windowed, plain.model(ids), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_interrupted_call_is_noticed(tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    fast = ready(tiny_model("llama", "sdpa"), SlidingWindow(5))
    ids = torch.randint(0, 64, (2, 9))
    cache = fast.new_cache()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fast.decoder, "call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fast(input_ids=ids, past_key_values=cache)
    monkeypatch.undo()
    expected = fast(input_ids=ids[:1], past_key_values=cache).logits
    assert cache.batch_size == 1, "an empty cache has no rows yet"
    monkeypatch.setattr(fast.decoder, "call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fast(input_ids=ids[:1], past_key_values=cache)
    monkeypatch.undo()
    for call in (
        lambda: fast(input_ids=ids[:1], past_key_values=cache),
        lambda: cache.crop(-1),
        lambda: cache.reorder_cache(torch.tensor([0])),
    ):
        with pytest.raises(CacheError, match="a call was interrupted while it changed the cache"):
            call()
    cache.reset()
    torch.testing.assert_close(fast(input_ids=ids[:1], past_key_values=cache).logits, expected)


@torch.no_grad()
def test_what_a_prompt_must_say_of_a_cache_that_holds_a_text(tiny_model: Callable[..., nn.Module]) -> None:
    fast = ready(tiny_model("llama", "sdpa"), SlidingWindow(5))
    ids = torch.randint(2, 64, (1, 30))
    options = {"max_new_tokens": 3, "pad_token_id": 0, "eos_token_id": 1, "do_sample": False}
    expected = fast.generate(ids, **options)[:, 30:]
    cache = fast.new_cache()
    fast(input_ids=ids[:, :20], past_key_values=cache)
    kept = copy.deepcopy(cache)
    for prompt, mask, message in (
        (ids[:, :20], None, "the cache holds 20 tokens, input_ids are 20 and attention_mask 20"),
        (ids[:, 20:], None, "the cache holds 20 tokens, input_ids are 10 and attention_mask 10"),
        (ids.roll(1), None, "token 19 of input_ids is not the last one that the cache holds"),
        (ids[:, 20:], torch.ones(1, 29), "input_ids are 10 and attention_mask 29"),
    ):
        with pytest.raises(CacheError, match=message):
            fast.generate(prompt, attention_mask=mask, past_key_values=cache, **options)
        assert cache.length == 20
    follows = fast.generate(ids[:, 20:], attention_mask=torch.ones(1, 30).long(), past_key_values=cache, **options)
    assert torch.equal(follows[:, 10:], expected)
    fast.model.generation_config.use_cache = False  # as training with checkpoints leaves it
    assert torch.equal(fast.generate(ids, past_key_values=kept, **options)[:, 30:], expected), "a copy goes on, too"


@torch.no_grad()
def test_rows_of_logits_come_as_they_are_asked_for(tiny_model: Callable[..., nn.Module]) -> None:
    from rewriter.generation.generate import cached_forward

    torch._dynamo.reset()
    fast = ready(tiny_model("llama", "sdpa"), SlidingWindow(5))
    ids = torch.randint(0, 64, (2, 20))
    full = fast(input_ids=ids, past_key_values=fast.new_cache()).logits
    rows = torch.tensor([17, 2, 2, 9])
    for chunk in (None, 4, 7):
        output = cached_forward(fast.decoder, fast.new_cache(), ids, logits_to_keep=rows, chunk=chunk)
        torch.testing.assert_close(output.logits, full[:, rows], rtol=1e-4, atol=1e-4)
    with pytest.raises(CacheError, match="input_ids must be from 0 to 63, got 64"):
        cached_forward(fast.decoder, fast.new_cache(), torch.full((2, 9), 64), chunk=4)


@torch.no_grad()
def test_models_that_number_tokens_in_their_own_way_need_position_ids() -> None:
    """RoBERTa begins at its padding index + 1, whatever is padded."""
    from transformers import RobertaConfig
    from transformers import RobertaForCausalLM

    torch._dynamo.reset()
    config = RobertaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, is_decoder=True
    )
    fast = rewriter.optimize(RobertaForCausalLM(config).eval(), SlidingWindow(5), backend="eager", strict=True)
    ids = torch.randint(3, 64, (2, 9))
    with pytest.raises(CacheError, match="does not number tokens by their place in the text"):
        fast(input_ids=ids, past_key_values=fast.new_cache())
    positions = torch.arange(2, 11).expand(2, -1)
    actual = fast(input_ids=ids, position_ids=positions, past_key_values=fast.new_cache()).logits
    torch.testing.assert_close(actual, fast(input_ids=ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_hooks_that_let_gradients_pass_may_come_between_tokens(tiny_model: Callable[..., nn.Module]) -> None:
    """The decoder looks for them only once it has met some; other hooks are never ignored."""
    model = tiny_model("llama", "sdpa")
    fast = ready(model, SlidingWindow(5, sinks=1))
    ids = torch.randint(0, 60, (2, 12))
    expected = fast(input_ids=ids, use_cache=False).logits
    cache = fast.new_cache()

    def step(place: int) -> Tensor:
        return fast(input_ids=ids[:, place : place + 1], past_key_values=cache).logits[:, 0]

    torch.testing.assert_close(step(0), expected[:, 0], rtol=1e-4, atol=1e-4)
    decoder = fast.decoder
    model.enable_input_require_grads()
    for place in (1, 2, 3):
        torch.testing.assert_close(step(place), expected[:, place], rtol=1e-4, atol=1e-4)
    assert fast.decoder is decoder
    model.disable_input_require_grads()
    torch.testing.assert_close(step(4), expected[:, 4], rtol=1e-4, atol=1e-4)
    assert fast.decoder is decoder
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(CacheError, match="before the model was changed"):
        step(5)
