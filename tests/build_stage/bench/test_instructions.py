"""What is counted in a kernel's machine code, on lines as nvdisasm 13.2 prints them."""

import pytest

from build.bench.instructions import Code, longest_loop, main, resident_blocks
from runtime.artifact.manifest import KernelUsage
from runtime.errors import UserError

LISTING = """
        .section        .text.kernel_kernel,"ax",@progbits
.text.kernel_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   MOV R2, 0x20 ;
.L_x_0:
        /*0020*/                   LDG.E.128.CONSTANT R8, desc[UR4][R2.64] ;
        /*0030*/                   LDS.128 R4, [R33+0x680] ;
        /*0040*/                   PRMT R9, R8, 0x7440, R10 ;
        /*0050*/              @!P1 FFMA R4, R4, R9, R5 ;
        /*0060*/                   HADD2.F32 R5, -RZ, R17.H1_H1 ;
        /*0070*/                   FADD R4, R4, R5 ;
        /*0080*/               @P0 BRA `(.L_x_0) ;
        /*0090*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00a0*/               @P2 BRA `(.L_x_1) ;
        /*00b0*/                   STG.E desc[UR4][R2.64], R4 ;
.L_x_1:
        /*00c0*/                   EXIT ;
.L_x_2:
        /*00d0*/                   BRA `(.L_x_2);
        /*00e0*/                   NOP ;
"""


def usage(arch, registers, shared):
    return KernelUsage("kernel", arch, registers, shared, 0, 0)


def test_the_longest_loop_is_counted_by_unit():
    loop = longest_loop(LISTING)
    assert loop == ["LDG.E.128.CONSTANT", "LDS.128", "PRMT", "FFMA", "HADD2.F32", "FADD", "BRA"]
    found = Code(usage("sm_90a", 32, 0), loop).units(2)  # one load of two weights
    assert found == {"float": 1.5, "integer": 0.5, "shared": 0.5, "global": 0.5, "other": 0.5}
    assert longest_loop("        /*0000*/                   EXIT ;") == []


# As CUDA's occupancy calculator has it: limited by registers, by shared memory (with 1 kB for each block), by threads.
@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "blocks"),
    [
        ("sm_90a", 45, 18560, 256, 5),
        ("sm_90a", 57, 0, 512, 2),
        ("sm_80", 32, 40960, 256, 4),
        ("sm_90a", 32, 40960, 256, 5),
        ("sm_80", 32, 0, 1024, 2),
    ],
)
def test_how_many_blocks_fit(arch, registers, shared, threads, blocks):
    assert resident_blocks(usage(arch, registers, shared), threads) == blocks


def test_a_missing_disassembler_is_named(monkeypatch):
    monkeypatch.setattr("sys.argv", ["instructions"])
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UserError, match="nvdisasm is not on PATH"):
        main()
