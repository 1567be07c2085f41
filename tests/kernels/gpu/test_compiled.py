"""Every kernel at every entry of the launch table, compiled for GPUs that are not there."""

from __future__ import annotations

import re

import pytest
import torch
from rewriter.kernels import LiveRanges
from rewriter.kernels.arguments import AttentionArguments
from rewriter.kernels.dispatch import INTERPRETED
from rewriter.kernels.gpu.backward import backward
from rewriter.kernels.gpu.compiled import compile_launch
from rewriter.kernels.gpu.compiled import launches
from rewriter.kernels.gpu.compiled import standing_in
from rewriter.kernels.gpu.decode import decode
from rewriter.kernels.gpu.forward import forward
from rewriter.kernels.gpu.kernel_inputs import KernelInputs
from rewriter.kernels.gpu.key_scores import key_scores
from rewriter.kernels.gpu.launch import HEAD_DIMS
from rewriter.kernels.gpu.launch import record_launches
from rewriter.kernels.gpu.launch import use_table
from rewriter.kernels.gpu.targets import TARGETS
from triton.runtime.jit import JITFunction

from rewriter.testing.verify import compile_entries

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("architecture", TARGETS)
def test_little_spills_and_all_fits(architecture: str, bits: int, head_dim: int) -> None:
    entries = compile_entries((architecture, bits, head_dim))
    assert {e.failure for e in entries} == {None}
    compiled = {e.compiled.kernel: e.compiled for e in entries if e.compiled is not None}
    assert {
        "_forward",
        "_query_gradient",
        "_list_gradients",
        "_key_gradients",
        "_decode",
        "_merge",
        "_key_scores",
    } <= set(compiled)
    # Outputs are not accumulated by atomics, which would make results depend on the order of programs.
    assert not [kernel for kernel, c in compiled.items() if "atomic" in c.instructions]
    if architecture.startswith("sm") and bits == 16:
        assert all("cp.async" in compiled[kernel].instructions for kernel in ("_forward", "_query_gradient"))
    if bits == 16:
        assert TARGETS[architecture].matrix_unit in compiled["_forward"].instructions


@pytest.mark.parametrize("kernel", ["forward", "backward_query"])
def test_listed_keys_are_loaded_while_others_are_computed(kernel: str) -> None:
    """On sm_90, whose entries have three stages: a block is waited for while the loads of later ones are on their way."""
    launch = launches("sm90", (kernel,), torch.bfloat16, 128)[0]
    with standing_in("sm90"):
        text = launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.constants).asm["ttgir"]
    # Of each loop of whole blocks, of the run and of the list, the loads that may still be on their way.
    loops = [part for part in text.split("scf.for")[1:] if "warp_group_dot" in part]
    ahead = [max(map(int, re.findall(r"async_wait [^\n]*num = (\d+)", part)), default=0) for part in loops]
    assert len(ahead) == 3 and min(ahead[:2]) >= 2, ahead


def test_a_tile_that_is_too_large_spills() -> None:
    """The check can fail: twice the largest tile of the candidates."""
    with use_table({"sm90": {"forward": {"16": {"128": [128, 128, 4, 2]}}}}):
        (launch,) = launches("sm90", ("forward",), torch.bfloat16, 128)
        assert compile_launch(launch, "sm90").spilled > 0


@pytest.mark.parametrize("wide", [False, True], ids=["triton", "inductor"])
@pytest.mark.parametrize("architecture", ["sm90", "gfx942"])
def test_every_option_compiles(architecture: str, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Softcap, ALiBi, sinks, indices in any order, head dims that are no powers of two, a group larger than a tile.

    Inductor passes floats in fp64, and sizes that are not known in int64.
    """
    if wide:
        do_compile = JITFunction._do_compile
        wider = {"fp32": "fp64", "i32": "i64"}

        def widened(self: JITFunction, key: str, signature: dict[str, str], *rest: object) -> object:
            given = {name: wider.get(kind, kind) for name, kind in signature.items()}
            return do_compile(self, key + "wide", given, *rest)

        monkeypatch.setattr(JITFunction, "_do_compile", widened)
    query, key, value = (
        torch.empty(2, heads, 70, dim, dtype=torch.float16, device="meta")
        for heads, dim in ((130, 40), (1, 40), (1, 24))
    )
    live = LiveRanges.causal(70, device="meta")
    index, slopes = torch.arange(70, device="meta")[None].expand(2, -1), torch.empty(130, device="meta")
    options = (live.start, live.end, index, index, None, slopes, slopes, None, 30.0)
    arguments = KernelInputs.make(AttentionArguments(query, key, value, *options), sort=True)
    lse = torch.empty(2, 130, 70, device="meta")
    with record_launches(architecture) as recorded:
        forward(arguments)
        backward(arguments, arguments.empty_output(), lse, arguments.empty_output(), lse)
        decode(
            KernelInputs.make(
                AttentionArguments(query[:, :, :2], key, value, *options[:2], index[:, :2], *options[3:]), sort=False
            )
        )
        for group in ("max", "per_query_head"):
            key_scores(KernelInputs.make(AttentionArguments(query, key, key, *options), sort=False), lse, group)
    for launch in recorded:
        launch.kernel.device_caches.clear()  # or what the other variant compiled would be taken
    kernels = [compile_launch(launch, architecture).kernel for launch in recorded]
    assert kernels.count("_key_scores") == 2
    assert {"_forward", "_query_gradient", "_list_gradients", "_key_gradients", "_decode", "_merge"} <= set(kernels)
