"""Block sizes: functions of (K, N, dtype, generation) and of nothing else, the batch least of all.

On a TPU the block of a matrix product is part of its order of additions: the matrix unit adds up a
block over K before it meets the accumulator, and on v6e and TPU7x a narrow or flat block changes
how it does so. So one block serves every M, which is padded up to it.
"""

from __future__ import annotations

from batch_invariant.errors import OpNotSupported

KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}
"""What jax calls a device (`device_kind`), and the generation that it belongs to."""

# (bm, largest bk, largest bn). What is read from memory falls with bm and bn. At M = 1 the 256
# padded rows cost the matrix unit about the time in which the weights are read, and no more.
_BLOCKS = {
    **dict.fromkeys(("v4", "v5e", "v5p", "v6e", "tpu7x"), (256, 512, 1024)),
    "interpreter": (16, 512, 512),  # low, so that tests of a few rows take little time
}
GENERATIONS = tuple(name for name in _BLOCKS if name != "interpreter")

VMEM = 16 << 20
"""Bytes of vector memory that a kernel gets on the generation that gives least."""

LANE = 128
"""Elements of a vector register along the last dimension."""


def round_up(size: int, multiple: int) -> int:
    """The least multiple that is not less than size."""
    return -(-size // multiple) * multiple


def generation_of(device_kind: str) -> str:
    """The generation of a device; `OpNotSupported` for one whose blocks nobody has checked."""
    if device_kind not in KINDS:
        raise OpNotSupported(
            f"unknown TPU {device_kind!r}: no block size was checked for it; known are "
            f"{', '.join(KINDS)}. Run `bi verify --backend tpu` with a libtpu that knows it, and "
            "add it to batch_invariant_tpu.jax.blocks"
        )
    return KINDS[device_kind]


def matmul_block(k: int, n: int, dtype: str, generation: str) -> tuple[int, int, int]:
    """(bm, bk, bn) of the product [M, k] @ [k, n].

    dtype: "float32" or "bfloat16"; both use one block as yet. generation: one of `GENERATIONS`, or
    "interpreter".
    """
    if generation not in _BLOCKS:
        raise OpNotSupported(
            f"unknown TPU generation {generation!r}; known: {', '.join(GENERATIONS)}"
        )
    if dtype not in ("float32", "bfloat16"):
        raise OpNotSupported(f"matrix products on TPU take float32 and bfloat16; got {dtype}")
    bm, bk, bn = _BLOCKS[generation]
    return bm, min(bk, round_up(k, LANE)), min(bn, round_up(n, LANE))


def check_block(block: tuple[int, ...], itemsize: int) -> None:
    """Raises `OpNotSupported` for a block that no TPU takes: not in whole tiles, or too large."""
    if len(block) != 3 or block[0] % 16 or any(size % LANE for size in block[1:]) or 0 in block:
        raise OpNotSupported(
            f"block {block}: expected (bm, bk, bn) with bm a multiple of 16, bk and bn of {LANE}"
        )
    bm, bk, bn = block
    # Both operands and the result twice, since the next block is fetched meanwhile; one fp32 sum.
    needed = 2 * itemsize * (bm * bk + bk * bn + bm * bn) + 4 * bm * bn
    if needed > VMEM:
        raise OpNotSupported(
            f"block {block} needs {needed >> 20} MiB of a TPU's vector memory, and {VMEM >> 20} "
            "MiB are there; take a smaller one"
        )


def row_block(width: int) -> int:
    """Rows of one block of a row operator whose rows are `width` elements wide in memory.

    Row operators are made of elementwise steps, so this changes no bit: it bounds the memory of a
    block to half a MiB of fp32.
    """
    rows = (1 << 17) // width
    return min(256, max(16, 1 << (rows.bit_length() - 1)))
