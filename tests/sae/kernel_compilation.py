"""Compiles every kernel for GPUs of the compute capabilities given as arguments; `test_kernels.py` runs it."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tsae.sae.kernels import candidates, codes, contrast, radix, screen, sums, update

LEAST_SHARED = 99 * 1024
"""Bytes of shared memory that a program can have on the smallest GPU with tensor cores for bfloat16 (8.6, 8.9, 12.0)."""
INT, FLOAT, LOW = "*i64", "*fp32", "*bf16"
TILE = {"BLOCK_E": sums.ENTRIES, "BLOCK_D": sums.WIDTH}
LIST = {"BLOCK": candidates.TILE}

# Kernel, types of its arguments, its constants, options of the launch.
KERNELS: list[tuple[Any, list[str], dict[str, Any], dict[str, Any]]] = [
    (sums._weighted_rows, [INT, INT, INT, *[FLOAT] * 3, *["i32"] * 4], TILE, {}),
    (sums._nested_residuals, [INT, INT, *[FLOAT] * 3, INT, *[FLOAT] * 3, *["i32"] * 7], TILE, {}),
    (sums._sampled_products, [INT, INT, *[FLOAT] * 3, *["i32"] * 4], TILE, {}),
    (sums._segment_sums, [INT, INT, FLOAT, FLOAT, "i32"], {"BLOCK": sums.SCALARS}, {}),
    (sums._add_rows, [INT, INT, *[FLOAT] * 3, *["i32"] * 4], TILE, {}),
    (sums._row_squares, [*[FLOAT] * 3, "i32", "i32"], {"SHIFTED": True, "BLOCK_D": sums.SQUARED}, {}),
    (sums._nested_gradients, [*[FLOAT] * 6, *["i32"] * 6], {"PREDICTS": True, "BLOCK_D": sums.SQUARED}, {}),
    (screen._round_rows, [FLOAT, LOW, FLOAT, FLOAT, "i32", "i32", "fp32", "fp32"], {"BLOCK_D": screen.ROUNDED}, {}),
]
of_row = {"BLOCK": codes.OF_ROW}
KERNELS += [
    (codes._refine, [INT, INT, INT, *[FLOAT] * 4, INT, FLOAT, *["i32"] * 7], TILE, {}),
    (codes._largest, [INT, FLOAT, FLOAT, "i32", "i32"], of_row, codes.OPTIONS),
    (codes._count_kept, [INT, INT, FLOAT, FLOAT, INT, INT, *["i32"] * 5], of_row, codes.OPTIONS),
    (
        codes._write_kept,
        [INT, INT, FLOAT, FLOAT, INT, INT, INT, INT, FLOAT, INT, FLOAT, INT, *["i32"] * 6],
        of_row,
        codes.OPTIONS,
    ),
    (codes._of_groups, [INT, INT, FLOAT, INT, FLOAT, INT, "i32", "i32"], of_row, codes.OPTIONS),
]
listed = {"MATCHES": contrast.MATCHES}
strips = {"STRIP": contrast.STRIP, "TALL": contrast.TALL, "WIDE": contrast.WIDE}
KERNELS += [
    (
        contrast._logits_of_rows,
        [INT, INT, FLOAT, INT, INT, INT, FLOAT, INT, INT, *[FLOAT] * 3, *["i32"] * 4, "fp32"],
        {"MASKED": masked, **listed, "BLOCK_C": contrast.COLUMNS},
        {},
    )
    for masked in (True, False)
]
KERNELS.append((contrast._sums_of_columns, [*[FLOAT] * 3, "i32", "i32"], strips, {}))
KERNELS.append((contrast._sums_of_strips, [*[FLOAT] * 4, "i32", "i32"], {"WIDE": contrast.WIDE}, {}))
KERNELS.append(
    (contrast._through_logits, [INT, INT, INT, INT, INT, *[FLOAT] * 5, *["i32"] * 7, "fp32"], listed, {}),
)
for first, bits in radix.DIGITS:
    digit = {"FIRST": first, "BITS": bits}
    state = INT if first == radix.DIGITS[0][0] else "*i32"
    of_list = [FLOAT, INT, INT, INT, INT, state, "*i32", *["i32"] * 4]
    KERNELS.append((radix._count_digits, of_list, {**digit, "BLOCK": radix.COUNTED}, radix.OPTIONS))
    KERNELS.append((radix._next_digit, ["*i32", state, state, "*i32", "*i32", FLOAT], digit, {}))
for width, warps in ((768, 4), (2304, 16)):
    row = {"BLOCK": triton.next_power_of_2(width)}
    options = {"num_warps": warps}
    assert {**row, **options} == update._row_tile(width)
    KERNELS.append((update._along_and_norm, [*[FLOAT] * 4, "i32", "fp32"], row, options))
    types = [*[FLOAT] * 7, *["fp32"] * 8, "i32", "i32"]
    KERNELS += [(update._adam, types, {"PROJECTED": both, "UNIT": both, **row}, options) for both in (True, False)]
shape = [FLOAT, INT, *["i32"] * 4]
KERNELS += [
    (candidates._count, [FLOAT, INT, *shape], LIST, {}),
    (candidates._write, [FLOAT, INT, INT, INT, INT, FLOAT, "i32", *shape], LIST, {}),
    (candidates._count_bits, ["*i32", INT, "i32"], LIST, {}),
    (candidates._write_bits, ["*i32", INT, INT, INT, INT, *["i32"] * 3], LIST, {}),
]
for tile, largest, even in itertools.product((screen.TILE, screen.SMALL_TILE), (True, False), (True, False)):
    options = {name: tile[name] for name in ("num_warps", "num_stages")}
    constants = {"LARGEST": largest, "EVEN": even, "LOW": tl.bfloat16, "WORD": screen.WORD, "BAND": screen.BAND}
    constants |= {name: size for name, size in tile.items() if name not in options}
    types = [LOW, FLOAT, FLOAT, LOW, *[FLOAT] * 4, INT, FLOAT if largest else "*i32", *["i32"] * 4]
    KERNELS.append((screen._screen, types, constants, options))


def compiled(
    kernel: Any, types: list[str], constants: dict[str, Any], options: dict[str, Any], capability: int
) -> tuple[str, int]:
    """PTX for arguments that are aligned as torch's are, and the bytes of shared memory that it takes."""
    names = kernel.arg_names
    signature = dict(zip(names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
    assert list(signature) == names
    aligned = {(place,): [["tt.divisibility", 16]] for place, kind in enumerate(types) if kind != "fp32"}
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, places, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return made.asm["ptx"], made.metadata.shared


def assembled(ptx: str, capability: int) -> str:
    """What the assembler says of registers and spills."""
    tool = (
        Path(triton.__file__).parent
        / "backends"
        / "nvidia"
        / "bin"
        / ("ptxas-blackwell" if capability >= 100 else "ptxas")
    )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        name = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
        command = [str(tool), "-v", "--gpu-name", name, str(source), "-o", str(source.with_suffix(".cubin"))]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


if __name__ == "__main__":
    for capability, (kernel, types, constants, options) in itertools.product(map(int, sys.argv[1:]), KERNELS):
        large = constants.get("BLOCK_N") == screen.TILE["BLOCK_N"]
        if large and capability not in (90, 100):
            continue  # it has not the shared memory, and takes `SMALL_TILE`
        ptx, shared = compiled(kernel, types, constants, options, capability)
        assert shared <= (screen.TILE_BYTES if large else LEAST_SHARED), (kernel.__name__, shared)
        report = assembled(ptx, capability)
        assert "0 bytes spill stores" in report, f"{kernel.__name__}: {report}"
        if kernel is screen._screen:
            instruction = {90: "wgmma.mma_async", 100: "tcgen05.mma"}.get(capability, "mma.sync")
            assert instruction in ptx, "a product that is not on the tensor cores as it should be"
