"""What counts the instructions of a kernel reads the machine code as it is printed."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="needs the package triton (pip install triton)")

from model_tools import load_script

SASS = """
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   LOP3.LUT R8, R4, 0xf000f, R9, 0xea, !PT ;
        /*0040*/                   HADD2.BF16_V2 R8, R8, -136, -136 ;
        /*0050*/                   HMMA.16816.F32.BF16 R12, R8, R24, R12 ;
        /*0060*/         @P1       BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
.L_x_2:
        /*0080*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR17+0x18000], R24 ;
        /*0090*/              @!P0 BRA `(.L_x_2) ;
        /*00a0*/                   BRA `(.L_x_0) ;
        /*00b0*/                   NOP;
"""


def test_instructions_are_told_apart_by_the_loop_that_they_are_in() -> None:
    """The longest is the product's; what is behind the end is left out, though it jumps back."""
    counter = load_script("gpu/count_instructions")
    outside, inside = counter.instructions(SASS)
    assert inside == ["LOP3.LUT", "HADD2.BF16_V2", "HMMA.16816.F32.BF16", "BRA"]
    assert outside == ["S2R", "LDG.E.128", "BRA", "EXIT"]
    assert [counter.purpose_of(each) for each in inside] == ["unpack", "arithmetic", "tensor", "other"]
    assert counter.purpose_of("HADD2.F32") == "convert" and counter.purpose_of("UIADD3") == "uniform"
    assert counter.tensor_clocks("HGMMA.64x64x16.F32.BF16") == 8  # 65,536 products, 2,048 a clock, 4 warps
    assert counter.tensor_clocks("QGMMA.64x64x32.F32.E4M3.E4M3") == 8
