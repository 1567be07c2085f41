"""Loops of compiled kernels: how they are found in machine code, and that one that grows is a failure where there is no GPU."""

from __future__ import annotations

import copy

import pytest
import triton
from rewriter.kernels.dispatch import INTERPRETED
from rewriter.kernels.gpu import loops
from rewriter.kernels.gpu.launch import HEAD_DIMS
from rewriter.kernels.gpu.targets import TARGETS

from rewriter.testing.verify import compile_entries

SASS = """
.text._kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E R2, [R4] ;
        /*0020*/                   MUFU.EX2 R2, R2 ;
.L_x_2:
        /*0030*/                   LDGSTS.E [R1], [R2] ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, R4 ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0070*/              @!P1 BRA `(.L_x_2) ;
        /*0080*/               @P1 BRA `(.L_x_1) ;
.L_x_3:
        /*0090*/                   IADD3 R2, R2, 0x1, RZ ;
        /*00a0*/               @P1 BRA `(.L_x_3) ;
        /*00b0*/               @P2 BRA `(.L_x_4) ;
        /*00c0*/                   MUFU.EX2 R2, R2 ;
.L_x_4:
        /*00d0*/                   EXIT ;
"""

AMDGCN = """
_kernel:                                ; @_kernel
	s_load_dwordx2 s[0:1], s[4:5], 0x0
.LBB0_1:                                ; =>This Inner Loop Header
	global_load_dwordx4 v[0:3], v[4:5], off
	s_waitcnt vmcnt(0)
	v_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], v[0:3]
	s_barrier
	v_exp_f32_e32 v1, v2
	s_cbranch_scc1 .LBB0_1
	s_endpgm
"""


def test_the_innermost_loops_are_counted() -> None:
    """One loop within another counts alone; a jump ahead is no loop, and a loop without mathematics is left out."""
    (inner,) = loops.loops_of(SASS, loops.NVIDIA)
    assert inner["instructions"] == 5
    assert {kind: n for kind, n in inner.items() if n and kind != "instructions"} == {
        "matrix products": 1,
        "waits": 1,
        "barriers": 1,
        "asynchronous copies": 1,
    }
    (amd,) = loops.loops_of(AMDGCN, loops.AMD)
    assert amd["instructions"] == 6
    assert [amd[kind] for kind in ("matrix products", "waits", "barriers", "loads", "exponentials")] == [1] * 5


def test_what_is_exceeded_is_named() -> None:
    (own,) = loops.loops_of(SASS, loops.NVIDIA)
    assert loops.exceeded([own], [own]) is None
    assert loops.exceeded([own, own], [own]) == "2 loops, and the bound is of 1"
    for kind in loops.MORE_IS_WORSE:
        less = {**own, kind: own[kind] - 1}
        assert loops.exceeded([own], [less]) == f"loop 0 has {own[kind]} {kind}, the bound is {own[kind] - 1}"
    more = {**own, "asynchronous copies": 2}
    assert loops.exceeded([own], [more]) == "loop 0 has 1 asynchronous copies, the bound is 2"
    assert loops.exceeded([own], [{**own, "comparisons": 0}]) is None
    assert loops.exceeded([{**own, "instructions": 101}], [{**own, "instructions": 100}]) is None


def test_there_are_bounds_for_every_entry() -> None:
    stored = loops.bounds()
    if not stored:
        pytest.skip(f"the bounds are of another release of Triton than {triton.__version__}")
    for architecture in TARGETS:
        for bits in (16, 32):
            for head_dim in HEAD_DIMS:
                for kernel in (
                    "_forward",
                    "_query_gradient",
                    "_key_gradients",
                    "_list_gradients",
                    "_decode",
                    "_key_scores",
                ):
                    found = stored[loops.key(architecture, kernel, bits, head_dim)]
                    assert found and all(loop["instructions"] > 0 for loop in found)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
def test_a_loop_that_grows_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    if not loops.bounds():
        pytest.skip(f"the bounds are of another release of Triton than {triton.__version__}")
    assert {entry.failure for entry in compile_entries(("sm90", 16, 64))} == {None}
    lower = copy.deepcopy(loops.bounds())
    lower[loops.key("sm90", "_forward", 16, 64)][0]["barriers"] -= 1
    monkeypatch.setattr(loops, "bounds", lambda: lower)
    failures = {entry.failure for entry in compile_entries(("sm90", 16, 64))} - {None}
    assert len(failures) == 1 and "loop 0 has" in next(iter(failures)) and "bench/loops.py" in next(iter(failures))
