"""Small graphs with one attention each: what the matchers find, and that they leave the graph as it was."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rewriter.passes.attention.find import find_attention
from rewriter.passes.attention.normalize import commit
from rewriter.passes.attention.site import AttentionSite
from rewriter.passes.graph.canonicalize import canonicalize
from rewriter.passes.pipeline import graph_text
from torch import Tensor
from torch.fx import GraphModule
from torch.fx import Interpreter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import dropout
from torch.nn.functional import scaled_dot_product_attention

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

BATCH, HEADS, LENGTH, WIDTH = 2, 4, 6, 8
ROOT = 1 / math.sqrt(WIDTH)
MIN = torch.finfo(torch.float32).min


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key and value, and truth values `[B, 1, S, S]`, one at least in each row."""
    random = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, BATCH, HEADS, LENGTH, WIDTH, generator=random).unbind()
    keep = (torch.rand(BATCH, 1, LENGTH, LENGTH, generator=random) < 0.5) | torch.eye(LENGTH, dtype=torch.bool)
    return query, key, value, keep


def trace(attention: Attention) -> GraphModule:
    module = make_fx(attention, pre_dispatch=True, tracing_mode="fake")(*inputs())
    canonicalize(module)
    return module


def text_without_dead_code(module: GraphModule) -> str:
    module.graph.eliminate_dead_code()
    return graph_text(module.graph)


def find(attention: Attention) -> tuple[AttentionSite, GraphModule]:
    module = trace(attention)
    (site,) = find_attention(module)
    return site, module


def computed(site: AttentionSite, module: GraphModule) -> tuple[Tensor, Tensor]:
    """The attention that a site's fields describe, and what its node computes."""
    module.graph.lint()
    interpreter = Interpreter(module, garbage_collect_values=False)
    interpreter.run(*inputs())
    env: dict[Any, Any] = interpreter.env
    query, key, value = (env[node] for node in (site.query, site.key, site.value))
    if query.dim() == 4:
        key, value = (t.repeat_interleave(query.size(1) // t.size(1), dim=1) for t in (key, value))
    scores = query @ key.mT * (1 / math.sqrt(query.size(-1)) if site.scale is None else site.scale)
    if site.softcap is not None:
        scores = site.softcap * torch.tanh(scores / site.softcap)
    for term in reversed(site.masks):
        mask = env[term.node]
        scores = (
            scores + mask if term.kind == "add" else scores.masked_fill(mask if term.kind == "drop" else ~mask, MIN)
        )
    if site.is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    if site.sinks is not None:
        column = env[site.sinks][None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, column), dim=-1)
    weights = scores.softmax(-1)[..., : key.size(-2)]
    return weights @ value, env[site.node]


def number(keep: Tensor) -> Tensor:
    return torch.where(keep, 0.0, MIN)


def flat(tensor: Tensor) -> Tensor:
    return tensor.flatten(0, 1)


def split(tensor: Tensor) -> Tensor:
    return tensor.view(BATCH, HEADS, *tensor.shape[1:])


def repeated(tensor: Tensor, heads: int = 2) -> Tensor:
    """`repeat_kv` of the first heads."""
    few = tensor[:, :heads]
    return few[:, :, None].expand(BATCH, heads, HEADS // heads, LENGTH, WIDTH).reshape(BATCH, HEADS, LENGTH, WIDTH)


def column(query: Tensor) -> Tensor:
    """A sink for each head, `[B, H, S, 1]`."""
    return query[:1, :, :1, :1].expand(BATCH, HEADS, LENGTH, 1)


def with_sinks(query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> Tensor:
    scores = (query @ key.mT * ROOT).masked_fill(~keep, -math.inf)
    return torch.cat((scores, column(query)), dim=-1).softmax(-1)[..., :-1] @ value


def softcapped(query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> Tensor:
    scores = 3.0 * torch.tanh(query @ key.mT * ROOT / 3.0)
    return (scores + number(keep)).softmax(-1) @ value


def minus_maximum(query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> Tensor:
    scores = query @ key.mT + number(keep)
    return (scores - scores.max(-1, keepdim=True).values).softmax(-1) @ value


def through_casts(query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> Tensor:
    scores = (query @ key.mT).double() / 2
    return torch.softmax(scores.masked_fill(~keep, -1e9), dim=-1).float().clone() @ value


def masked_before_the_scale(query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> Tensor:
    return ((query @ key.mT + number(keep) / 4) * ROOT).softmax(-1) @ value


def baddbmm(query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> Tensor:
    bias = number(keep).expand(BATCH, HEADS, LENGTH, LENGTH).flatten(0, 1)
    return torch.bmm(torch.baddbmm(bias, flat(query), flat(key).mT, alpha=ROOT).softmax(-1), flat(value))


def folded(query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> Tensor:
    """Products over `[B * H, S, D]`, the mask over `[B, H, S, S]`."""
    scores = split(torch.bmm(flat(query), flat(key).transpose(1, 2))) + number(keep)
    return split(torch.bmm(scores.softmax(-1).view(-1, LENGTH, LENGTH), flat(value)))


def folded_softmax(query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> Tensor:
    """The softmax over `[B * H, S, S]`, as OPT once was."""
    scores = (split(torch.bmm(flat(query), flat(key).transpose(1, 2))) + number(keep)).view(-1, LENGTH, LENGTH)
    return torch.bmm(scores.softmax(-1), flat(value)) * 2


FOUND: dict[str, tuple[Attention, dict[str, Any], tuple[str, ...]]] = {
    "sdpa": (lambda q, k, v, keep: scaled_dot_product_attention(q, k, v), {"form": "sdpa", "scale": None}, ()),
    "sdpa, causal": (
        lambda q, k, v, keep: scaled_dot_product_attention(q, k, v, is_causal=True),
        {"is_causal": True},
        (),
    ),
    "sdpa, its scale": (
        lambda q, k, v, keep: scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=0.3),
        {"scale": 0.3},
        ("keep",),
    ),
    "sdpa, added mask": (lambda q, k, v, keep: scaled_dot_product_attention(q, k, v, number(keep)), {}, ("add",)),
    "sdpa, repeated heads": (
        lambda q, k, v, keep: scaled_dot_product_attention(q, repeated(k), repeated(v), is_causal=True),
        {},
        (),
    ),
    "softmax": (lambda q, k, v, keep: (q @ k.mT).softmax(-1) @ v, {"form": "eager", "scale": 1.0}, ()),
    "softmax of a transposed key": (
        lambda q, k, v, keep: torch.softmax(q @ k.transpose(2, 3) * ROOT, dim=3) @ v,
        {"scale": ROOT},
        (),
    ),
    "two scales": (lambda q, k, v, keep: (q @ k.mT * 3 / 4).softmax(-1) @ v, {"scale": 0.75}, ()),
    "scale on the left": (lambda q, k, v, keep: (0.5 * (q @ k.mT)).softmax(-1) @ v, {"scale": 0.5}, ()),
    "a tensor's scale": (
        lambda q, k, v, keep: (q @ k.mT / torch.full((), 4.0).sqrt()).softmax(-1) @ v,
        {"scale": 0.5},
        (),
    ),
    "added": (lambda q, k, v, keep: (q @ k.mT * ROOT + number(keep)).softmax(-1) @ v, {"scale": ROOT}, ("add",)),
    "added on the left": (lambda q, k, v, keep: (number(keep) + q @ k.mT).softmax(-1) @ v, {}, ("add",)),
    "subtracted": (lambda q, k, v, keep: (q @ k.mT - 1e9 * ~keep).softmax(-1) @ v, {}, ("add",)),
    "filled": (lambda q, k, v, keep: (q @ k.mT).masked_fill(~keep, -math.inf).softmax(-1) @ v, {}, ("drop",)),
    "where": (lambda q, k, v, keep: torch.where(keep, q @ k.mT, MIN).softmax(-1) @ v, {}, ("keep",)),
    "where not": (lambda q, k, v, keep: torch.where(~keep, MIN, q @ k.mT).softmax(-1) @ v, {}, ("drop",)),
    "two masks": (
        lambda q, k, v, keep: ((q @ k.mT).masked_fill(~keep, MIN) + number(keep.tril())).softmax(-1) @ v,
        {},
        ("add", "drop"),
    ),
    "mask before the scale": (masked_before_the_scale, {"scale": ROOT}, ("add",)),
    "softcap": (softcapped, {"softcap": 3.0, "scale": ROOT}, ("add",)),
    "sinks": (with_sinks, {"scale": ROOT}, ("drop",)),
    "maximum taken away": (minus_maximum, {}, ("add",)),
    "casts": (through_casts, {"scale": 0.5}, ("drop",)),
    "inactive dropout": (
        lambda q, k, v, keep: dropout((q @ k.mT).softmax(-1), 0.0, training=False).contiguous() @ v,
        {},
        (),
    ),
    "einsum": (
        lambda q, k, v, keep: torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1), v),
        {"scale": 1.0},
        (),
    ),
    "einsum, tokens first": (
        lambda q, k, v, keep: torch.einsum("bqhd,bkhd->bhqk", q.transpose(1, 2), k.transpose(1, 2)).softmax(-1) @ v,
        {},
        (),
    ),
    "baddbmm": (baddbmm, {"scale": ROOT}, ("add",)),
    "folded": (folded, {}, ("add",)),
    "folded softmax": (folded_softmax, {}, ("add",)),
    "repeated heads": (
        lambda q, k, v, keep: (q @ repeated(k).transpose(-2, -1) + number(keep)).softmax(-1) @ repeated(v),
        {},
        ("add",),
    ),
    "repeated by repeat_interleave": (
        lambda q, k, v, keep: (
            (q @ k[:, :2].repeat_interleave(2, dim=1).transpose(2, 3)).softmax(-1) @ v[:, :2].repeat_interleave(2, 1)
        ),
        {},
        (),
    ),
    "one KV head": (lambda q, k, v, keep: (q @ repeated(k, 1).transpose(-2, -1)).softmax(-1) @ repeated(v, 1), {}, ()),
}


@pytest.mark.parametrize("name", FOUND)
def test_a_site_says_what_its_node_computes(name: str) -> None:
    attention, fields, kinds = FOUND[name]
    site, module = find(attention)
    assert site.reason is None
    assert {field: getattr(site, field) for field in fields} == fields
    assert tuple(term.kind for term in site.masks) == kinds
    actual, expected = computed(site, module)
    torch.testing.assert_close(actual, expected, check_dtype=False)


@pytest.mark.parametrize("name", FOUND)
def test_finding_a_site_changes_nothing(name: str) -> None:
    """New nodes have no users, and no others are touched."""
    module = trace(FOUND[name][0])
    before = graph_text(module.graph)
    assert len(find_attention(module)) == 1
    assert text_without_dead_code(module) == before


@pytest.mark.parametrize(
    ("name", "heads"),
    [("sdpa, repeated heads", 2), ("repeated heads", 2), ("repeated by repeat_interleave", 2), ("one KV head", 1)],
)
def test_repeated_heads_are_those_before_the_repetition(name: str, heads: int) -> None:
    site, _ = find(FOUND[name][0])
    assert [tuple(node.meta["val"].shape[1:]) for node in (site.query, site.key, site.value)] == [
        (HEADS, LENGTH, WIDTH),
        (heads, LENGTH, WIDTH),
        (heads, LENGTH, WIDTH),
    ]


def test_sinks_are_one_number_for_each_head() -> None:
    site, module = find(with_sinks)
    assert site.sinks is not None and tuple(site.sinks.meta["val"].shape) == (HEADS,)
    interpreter = Interpreter(module, garbage_collect_values=False)
    interpreter.run(*inputs())
    assert torch.equal(interpreter.env[site.sinks], inputs()[0][0, :, 0, 0])


@pytest.mark.parametrize("fill", [-math.inf, MIN, -1e9, -1e4])
def test_what_hidden_logits_are_set_to(fill: float) -> None:
    """All that nothing is lower than counts as -inf."""
    site, _ = find(lambda q, k, v, keep: (q @ k.mT).masked_fill(~keep, fill).softmax(-1) @ v)
    (term,) = site.masks
    assert term.fill == (-math.inf if fill <= MIN else fill)


@pytest.mark.parametrize("attention", [folded, folded_softmax])
def test_folded_heads_become_dimensions(attention: Attention) -> None:
    site, module = find(attention)
    sizes = (BATCH, HEADS, LENGTH, WIDTH)
    for node in (site.node, site.query, site.key, site.value):
        assert node is not None and tuple(node.meta["val"].shape) == sizes
    assert site.joined is not None
    expected = attention(*inputs())
    commit(site)
    product, view = site.joined
    module.graph.lint()
    module.recompile()
    assert set(product.users) == {site.node} and view.users, "what read the product reads the view of the site's node"
    torch.testing.assert_close(module(*inputs()), expected)


def test_rank_3_stays_without_a_view_of_heads() -> None:
    site, _ = find(baddbmm)
    assert site.joined is None
    assert tuple(site.node.meta["val"].shape) == (BATCH * HEADS, LENGTH, WIDTH)


def test_all_sites_are_found_in_order() -> None:
    def several(query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> Tensor:
        first = scaled_dot_product_attention(query, key, value, is_causal=True)
        second = (first @ key.mT).softmax(-1) @ value
        return dropout((second @ key.mT).softmax(-1), 0.5) @ value

    sites = find_attention(trace(several))
    assert [site.form for site in sites] == ["sdpa", "eager", "eager"]
    assert [site.reason is None for site in sites] == [True, True, False]


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v, keep: (q * k).softmax(-1) * v,
        lambda q, k, v, keep: (q @ torch.ones(WIDTH, LENGTH)).softmax(-1) @ v,
        lambda q, k, v, keep: q @ k.mT @ v,
        lambda q, k, v, keep: (q @ k.mT).sum((2, 3)).softmax(-1),
    ],
    ids=["no product", "a product with a matrix", "no softmax", "weights of rows"],
)
def test_what_is_no_attention_is_not_found(function: Attention) -> None:
    assert find_attention(trace(function)) == []


def returns_weights(query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> Any:
    weights = (query @ key.mT).softmax(-1)
    return weights @ value, weights


def sinks_of_each_row(query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> Tensor:
    return torch.cat((query @ key.mT, query[..., :1]), dim=-1).softmax(-1)[..., :-1] @ value


def sinks_with_a_value(query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> Tensor:
    return torch.cat((query @ key.mT, column(query)), dim=-1).softmax(-1) @ torch.cat((value, value[:, :, :1]), dim=2)


def sinks_before_the_mask(query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> Tensor:
    scores = torch.cat((query @ key.mT, column(query)), dim=-1) * ROOT
    return scores.softmax(-1)[..., :-1] @ value


def wrong_softcap(query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> Tensor:
    return (3.0 * torch.tanh(query @ key.mT / 5.0)).softmax(-1) @ value


def added_with_a_factor(query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> Tensor:
    return torch.add(query @ key.mT, number(keep), alpha=2).softmax(-1) @ value


def folded_in_another_order(query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> Tensor:
    scores = torch.bmm(flat(query), flat(key).mT).view(BATCH, HEADS, LENGTH, LENGTH)
    again = scores.flatten(0, 1).view(HEADS, BATCH, LENGTH, LENGTH) + number(keep)[:1]
    return torch.bmm(again.softmax(-1).view(-1, LENGTH, LENGTH), flat(value))


def mask_of_all_rows(query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> Tensor:
    scores = split(torch.bmm(flat(query), flat(key).mT))
    return (scores.softmax(-1) @ value[:1]).flatten(0, 1)


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "sdpa with dropout": (
        lambda q, k, v, keep: scaled_dot_product_attention(q, k, v, dropout_p=0.1),
        r"dropout 0.1 is active; call .eval\(\)",
    ),
    "dropout": (lambda q, k, v, keep: dropout((q @ k.mT).softmax(-1), 0.25) @ v, "dropout 0.25 is active"),
    "rows": (lambda q, k, v, keep: (q @ k.mT).softmax(-2) @ v, "softmax over dimension -2, expected the last"),
    "weights returned": (returns_weights, "the attention weights are returned or used elsewhere"),
    "weights changed": (
        lambda q, k, v, keep: (q @ k.mT).softmax(-1).square() @ v,
        "the attention weights go to aten.square",
    ),
    "weights on the right": (lambda q, k, v, keep: v.mT @ (q @ k.mT).softmax(-1), "right factor of a product"),
    "fill that shows": (
        lambda q, k, v, keep: (q @ k.mT).masked_fill(~keep, -100.0).softmax(-1) @ v,
        "hidden logits are set to -100.0",
    ),
    "fill that is data": (
        lambda q, k, v, keep: torch.where(keep, q @ k.mT, q[..., :1]).softmax(-1) @ v,
        "hidden logits are set to None",
    ),
    "a number added": (lambda q, k, v, keep: (q @ k.mT + 1.0).softmax(-1) @ v, "a number is added to the logits"),
    "logits subtracted": (lambda q, k, v, keep: (number(keep) - q @ k.mT).softmax(-1) @ v, "taken from something"),
    "a factor of the mask": (added_with_a_factor, "a mask is added with a factor"),
    "logits twice": (lambda q, k, v, keep: ((s := q @ k.mT) + s).softmax(-1) @ v, "uses the logits more than once"),
    "scaled by a tensor": (
        lambda q, k, v, keep: (q @ k.mT * q[..., :1]).softmax(-1) @ v,
        "scaled by a tensor, which is not a number",
    ),
    "divided by the logits": (lambda q, k, v, keep: (2.0 / (q @ k.mT)).softmax(-1) @ v, "not understood|not a number"),
    "filled before the scale": (
        lambda q, k, v, keep: ((q @ k.mT).masked_fill(~keep, -math.inf) * 2).softmax(-1) @ v,
        "a mask is applied before the scale or softcap",
    ),
    "two numbers for a softcap": (wrong_softcap, r"softcap \* tanh\(logits / softcap\)"),
    "softcap and scale": (
        lambda q, k, v, keep: (2.0 * (3.0 * torch.tanh(q @ k.mT / 3.0))).softmax(-1) @ v,
        "a softcap is followed by another scale",
    ),
    "sinks of each row": (sinks_of_each_row, "not one number for each head"),
    "sinks with a value": (sinks_with_a_value, "the weights of the joined column are used"),
    "sinks before the scale": (sinks_before_the_mask, "joined to the scores before a mask, scale or softcap"),
    "baddbmm with beta": (
        lambda q, k, v, keep: torch.bmm(
            torch.baddbmm(flat(q)[..., :LENGTH], flat(q), flat(k).mT, beta=2).softmax(-1), flat(v)
        ),
        "baddbmm with a factor",
    ),
    "einsum out of order": (
        lambda q, k, v, keep: torch.einsum("bhid,bhjd->bhji", q, k).softmax(-1) @ v,
        "not a batched matrix product with the result in order",
    ),
    "einsum with an ellipsis": (
        lambda q, k, v, keep: torch.einsum("...id,...jd->...ij", q, k).softmax(-1) @ v,
        "not a batched matrix product with the result in order",
    ),
    "split in two ways": (folded_in_another_order, "between the product and the softmax|in two ways"),
    "value of all rows": (mask_of_all_rows, "rows of a batch|is repeated for all rows"),
    "heads that do not match": (
        lambda q, k, v, keep: (q @ repeated(k).transpose(-2, -1)).softmax(-1) @ v[:, :1],
        "key has 2 heads and value 1",
    ),
    "a clamp": (
        lambda q, k, v, keep: (q @ k.mT).clamp(-3, 3).softmax(-1) @ v,
        "aten.clamp.default between the product and the softmax is not understood",
    ),
    "exp": (lambda q, k, v, keep: (q @ k.mT).exp() @ v, "made of the logits by aten.exp.default, expected a softmax"),
    "sigmoid": (lambda q, k, v, keep: (q @ k.mT).sigmoid() @ v, "by aten.sigmoid.default, expected a softmax"),
    "wide heads": (
        lambda q, k, v, keep: (q.repeat(1, 1, 1, 40) @ k.repeat(1, 1, 1, 40).mT).softmax(-1) @ v,
        "query has head_dim 320, expected at most 256",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_site_leaves_the_graph_as_it_was(name: str) -> None:
    attention, reason = REFUSED[name]
    module = trace(attention)
    before = graph_text(module.graph)
    (site,) = find_attention(module)
    assert site.reason is not None
    assert re.search(reason, site.reason)
    assert text_without_dead_code(module) == before


def test_what_is_modified_in_place_is_refused() -> None:
    module = trace(lambda q, k, v, keep: ((k * 1) @ q.mT).softmax(-1) @ v)
    (site,) = find_attention(module)
    assert site.reason is None and site.query is not None
    (site,) = find_attention(module, frozenset({site.query}))
    assert site.reason == "mul is modified in place, through a view or where others see it"
