"""What is read from machine code: the common path, the main loops and the width of accesses."""

from __future__ import annotations

import re

from mmfuse.kernels._runtime import sass


def assembled(code: str) -> str:
    """As cuobjdump prints it: 16 bytes an instruction, a label is an address."""
    lines = [line.strip() for line in code.strip().splitlines()]
    labels, instructions = {}, []
    for line in lines:
        if line.endswith(":"):
            labels[line[:-1]] = f"0x{16 * len(instructions):x}"
        else:
            instructions.append(line)
    text = "\tFunction : kernel\n"
    for n, line in enumerate(instructions):
        line = re.sub(r"\b[a-z]+$", lambda m: labels[m[0]], line) if "BRA" in line else line
        text += f"        /*{16 * n:04x}*/                   {line} ;   /* 0x00000a00ff017b82 */\n"
        text += "                                            /* 0x000fe20000000f00 */\n"
    return text


def test_a_slow_path_is_not_common():
    reading = sass.read(
        assembled("""
            S2R R0, SR_TID.X
            @P0 EXIT
            ISETP.GE.AND P1, PT, R0, UR4, PT
            @P1 BRA slow
            LDG.E.128.CONSTANT R4, desc[UR4][R2.64]
            STG.E.128 desc[UR4][R2.64], R4
            again:
            EXIT
            slow:
            LDG.E.U16 R4, desc[UR4][R2.64]
            MUFU.EX2 R4, R4
            STG.E.U16 desc[UR4][R2.64], R4
            BRA again
            trap:
            BRA trap
            NOP
        """)
    )
    assert (reading.instructions, reading.outside, reading.loops) == (12, 7, ())
    assert reading.accesses == {"LDG 16": 1, "STG 16": 1}
    assert reading.narrow == 0


def test_where_both_ways_are_narrow_the_shorter_counts():
    reading = sass.read(
        assembled("""
            @!P1 BRA !UP0, full
            STG.E.U16 desc[UR4][R2.64], R4
            STG.E.U16 desc[UR4][R2.64+0x2], R5
            EXIT
            full:
            STG.E.U8 desc[UR4][R2.64], R4
            EXIT
        """)
    )
    assert reading.outside == 3
    assert (reading.accesses, reading.narrow) == ({"STG 1": 1}, 1)


def test_loops_of_products():
    reading = sass.read(
        assembled("""
            MOV R1, c[0x0][0x28]
            @!P0 BRA end
            tile:
            UIADD3 UR4, UR4, 0x1, URZ
            MOV R2, RZ
            product:
            LDGSTS.E.BYPASS.128 [R3], desc[UR4][R4.64]
            LDSM.16.M88.4 R8, [R5]
            HMMA.16816.F32.BF16 R8, R4, R6, R8
            HMMA.16816.F32.BF16 R12, R4, R6, R12
            @P2 BRA product
            FMNMX R20, R8, R12, !PT
            @P3 BRA rare
            back:
            @P1 BRA tile
            end:
            STG.E desc[UR4][R2.64], R20
            EXIT
            rare:
            MUFU.EX2 R20, R20
            BRA back
        """)
    )
    outer, inner = reading.loops
    assert reading.outside == 4
    assert (outer.depth, outer.instructions, outer.tensor_core, outer.flops) == (0, 5, 0, 0)
    assert (inner.depth, inner.instructions, inner.tensor_core) == (1, 5, 2)
    assert inner.flops == 2 * (2 * 16 * 8 * 16)
    assert reading.accesses == {"LDGSTS 16": 1, "LDSM 16": 1, "STG 4": 1}


def test_without_products_the_longest_loop_is_the_main_one():
    reading = sass.read(
        assembled("""
            short:
            FADD R1, R1, R2
            @P0 BRA short
            long:
            FADD R1, R1, R2
            FMUL R1, R1, R2
            @P1 BRA long
            LDS.U16 R3, [R4]
            LDS.64 R3, [R4]
            LDS R3, [R4]
            EXIT
        """)
    )
    assert [loop.instructions for loop in reading.loops] == [3]
    assert reading.outside == 2 + 4
    assert reading.accesses == {"LDS 2": 1, "LDS 4": 1, "LDS 8": 1}


def test_flops_are_those_of_a_warp():
    (line,) = sass.parse(assembled("HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, !UPT, gsb0"))
    # four warps share it
    assert line.flops == 2 * 64 * 256 * 16 / 4
