"""Whether a kernel computes what the dense reference does: output, log-sum-exp and every gradient.

The allowance for each result comes from the data, by the rule of `assert_within_budget`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels import reference
from rewriter.testing.budgets import assert_within_budget
from rewriter.testing.cases import Case

Kernel = Callable[..., Any]
"""`kernel(query, key, value, live, **options)`, with the names and meanings of `rewriter.kernels.live_range_attention`."""


@dataclass(frozen=True)
class Features:
    """Which optional arguments a kernel takes, and whether it has gradients."""

    bias: bool = True
    sinks: bool = True
    alibi_slopes: bool = True
    scale: bool = True
    softcap: bool = True
    query_index: bool = True
    key_index: bool = True
    return_lse: bool = True
    gradients: bool = True

    @classmethod
    def of(cls, kernel: Kernel, *, gradients: bool = True) -> Features:
        """What the kernel's signature names; everything, where it takes `**kwargs`."""
        parameters = inspect.signature(kernel).parameters
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            return cls(gradients=gradients)
        return cls(**{f.name: f.name in parameters for f in fields(cls) if f.name != "gradients"}, gradients=gradients)


def assert_equivalent(
    kernel: Kernel, case: Case, *, device: torch.device | str = "cpu", features: Features | None = None
) -> None:
    """Asserts that a kernel's results on a case are as near to the exact ones as its precision allows.

    Compares with the dense form in fp64 on the CPU: the output, the log-sum-exp (where the kernel has `return_lse`), and the
    gradients of query, key, value, bias and sinks for random gradients of output and log-sum-exp.

    Args:
        kernel: takes `(query, key, value, live, **options)` with the options that the case has.
        case: the inputs; draw them with `attention_cases(features=Features.of(kernel))` if the kernel lacks some options.
        device: where the kernel runs.
        features: what the kernel supports; read from its signature when left out.

    Raises:
        AssertionError: a result is too far off, not finite, or has the wrong shape, or the kernel raised an error; the
            message ends with the line of Python that repeats this case.
    """
    features = features or Features.of(kernel)
    asked = Features(return_lse=features.return_lse, gradients=features.gradients)
    exact = _evaluate(reference.live_range_attention, case, torch.float64, "cpu", asked)
    dense = _evaluate(_dense, case, case.torch_dtype, "cpu", asked)
    sums, squares = _magnitudes(case, asked)
    try:
        actual = _evaluate(kernel, case, case.torch_dtype, device, features)
        for name in actual:
            assert_within_budget(
                actual[name], dense[name], exact[name], name, magnitude=sums.get(name), spread=squares.get(name)
            )
    except Exception as error:
        what = str(error) if isinstance(error, AssertionError) else f"the kernel raised {type(error).__name__}: {error}"
        name = getattr(kernel, "__name__", "kernel")
        arguments = "" if str(device) == "cpu" else f", device={str(device)!r}"
        cause = None if isinstance(error, AssertionError) else error
        raise AssertionError(f"{what}\nrepeat it with: assert_equivalent({name}, {case!r}{arguments})") from cause


def _dense(query: Tensor, key: Tensor, value: Tensor, live: Any, **options: Any) -> Any:
    operands = query.dtype if query.dtype in (torch.float16, torch.bfloat16) else None
    return reference.live_range_attention(query, key, value, live, operands=operands, **options)


def _evaluate(
    kernel: Kernel, case: Case, dtype: torch.dtype, device: torch.device | str, features: Features
) -> dict[str, Tensor]:
    """Results on the CPU by name: output, lse, and dquery, dkey, ... for the differentiable inputs."""
    leaves = {name: t.to(device, dtype).requires_grad_(features.gradients) for name, t in case.tensors().items()}
    live = case.live()
    live = type(live)(live.start.to(device), live.end.to(device))
    options = {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype)
        if isinstance(value, Tensor)
        else value
        for name, value in case.options().items()
    }
    options.update({name: t for name, t in leaves.items() if name in ("bias", "sinks")})
    if features.return_lse:
        output, lse = kernel(leaves["query"], leaves["key"], leaves["value"], live, **options, return_lse=True)
    else:
        output, lse = kernel(leaves["query"], leaves["key"], leaves["value"], live, **options), None
    results = {"output": output.detach()}
    grad_output, grad_lse = _gradients(case, features)
    loss = (output * grad_output.to(device, output.dtype)).sum()
    if lse is not None:
        # A row without keys has a log-sum-exp of -inf, which has no distance and no gradient.
        empty = lse.detach() == -torch.inf
        loss = loss + torch.where(empty, 0, lse * grad_lse.to(device, lse.dtype)).sum()
        results["rows without keys"] = empty.to(lse.dtype)
        results["lse"] = torch.where(empty, 0, lse.detach())
    if features.gradients:
        for name, grad in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            results[f"d{name}"] = grad
    return {name: result.detach().cpu() for name, result in results.items()}


def _gradients(case: Case, features: Features) -> tuple[Tensor, Tensor]:
    """Random gradients of the output, exact in the case's dtype, and of the log-sum-exp (0 without one); fp64."""
    random = torch.Generator().manual_seed(case.seed)
    rows = (case.batch, case.kv_heads * case.group, case.queries)
    grad = torch.randn(*rows, case.value_dim, generator=random).to(case.torch_dtype).double()
    return grad, torch.randn(rows, generator=random).double() * features.return_lse


def _magnitudes(case: Case, features: Features) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """For each result, in fp64: the sum behind it with its terms in absolute value, with which the errors of fp32 sums
    scale; and the root of the sum of their squares, with which those of rounding its operands to 16 bits do."""
    tensors, options = case.tensors(), case.options()
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    group, scale = case.group, case.scale or case.head_dim**-0.5
    identity = torch.eye(case.keys, dtype=torch.float64).expand(*key.shape[:3], -1)
    rest: dict[str, Any] = {name: t for name, t in tensors.items() if name in ("bias", "sinks")}
    exact, lse = reference.live_range_attention(query, key, identity, case.live(), **rest, **options, return_lse=True)
    wide_key, wide_value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    signed_grad, signed_grad_lse = _gradients(case, features)
    grad, grad_lse = signed_grad.abs(), signed_grad_lse.abs()
    # A weight is exp(logit - lse): the rounding of the two is a relative error of the weight.
    lse_size = lse.abs().nan_to_num(posinf=0)[..., None]
    weights = exact * (1 + 2 * lse_size - exact.clamp(min=1e-300).log())
    from_values = grad @ wide_value.abs().transpose(2, 3)
    delta = (weights * from_values).sum(dim=-1) + grad_lse
    scores = weights * (from_values + delta[..., None])

    def per_kv_head(t: Tensor) -> Tensor:
        return t.unflatten(1, (-1, group)).sum(dim=2)

    # lse changes by each logit's error times the weight; a logit is a sum of products, the bias and the slope's distance.
    logit_sizes = scale * (query.abs() * (exact @ wide_key.abs())).sum(dim=-1)
    if "bias" in rest:
        logit_sizes += (exact * reference.per_query_head(rest["bias"].abs(), group)[:, :, None]).sum(dim=-1)
    if "alibi_slopes" in options:
        rows = options.get("query_index", torch.arange(case.keys - case.queries, case.keys))
        columns = options.get("key_index", torch.arange(case.keys))
        distance = rows.view(-1, 1, case.queries, 1) - columns.view(-1, 1, 1, case.keys)
        logit_sizes += options["alibi_slopes"][:, None] * (exact * distance.abs()).sum(dim=-1)
    if "sinks" in rest:
        logit_sizes += torch.exp(rest["sinks"][:, None] - lse) * rest["sinks"].abs()[:, None]
    sums = {
        "output": weights @ wide_value.abs(),
        "lse": logit_sizes,
        "dquery": scale * scores @ wide_key.abs(),
        "dkey": per_kv_head(scale * scores.transpose(2, 3) @ query.abs()),
        "dvalue": per_kv_head(weights.transpose(2, 3) @ grad),
    }
    # What is rounded: the weights, the gradients of the logits, and the output, from which delta is computed.
    output = exact @ wide_value
    signed_delta = (signed_grad * output).sum(dim=-1) - signed_grad_lse
    logit_grads = exact * (signed_grad @ wide_value.transpose(2, 3) - signed_delta[..., None])
    delta_error = (grad * output).norm(dim=-1)
    shared = exact * delta_error[..., None]
    squares = {
        "output": (exact.square() @ wide_value.square()).sqrt(),
        "dquery": scale
        * (logit_grads.square() @ wide_key.square() + (exact @ wide_key * delta_error[..., None]).square()).sqrt(),
        "dkey": scale * per_kv_head((logit_grads.square() + shared.square()).transpose(2, 3) @ query.square()).sqrt(),
        "dvalue": per_kv_head(exact.square().transpose(2, 3) @ signed_grad.square()).sqrt(),
    }
    if "bias" in rest:
        shape = rest["bias"].shape
        sums["dbias"] = per_kv_head(scores.sum(dim=2)).sum_to_size(shape)
        squares["dbias"] = per_kv_head(shared.square().sum(dim=2)).sum_to_size(shape).sqrt()
    if "sinks" in rest:
        sink_weights = torch.exp(rest["sinks"][:, None] - lse)
        sums["dsinks"] = (sink_weights * delta).nan_to_num(posinf=0).sum(dim=(0, 2))
        squares["dsinks"] = (sink_weights * delta_error).square().sum(dim=(0, 2)).sqrt()
    return sums, squares
