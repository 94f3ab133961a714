"""Bulk copies of blocks of 128 keys from where they lie, in boxes of PAGE rows, written in Gluon.

A buffer of a block is made of boxes [1, 1, PAGE, 64] in the order in which the matrix units want
them: the first 64 columns of all rows, then the others. A box never crosses a page.
"""

# ruff: noqa: RUF005  (compiled by Triton, which knows less of Python)
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from batch_invariant_cuda.attention_merge import BLOCK

WIDTH = 64  # columns of a box: as many bytes as bulk copies can swizzle

_KEYS = gl.constexpr(BLOCK)
_WIDTH = gl.constexpr(WIDTH)


@gluon.jit
def pages_of(table, batch, block, columns, per, PAGE: gl.constexpr, ONE: gl.constexpr):
    """Numbers of the pages of a block's boxes, as loaded; any where the table ends before.

    per: boxes of a page; ONE: it is 1, and nothing need be divided. Nothing is computed with the
    numbers here, so that nobody waits for them.
    """
    found = ()
    if table is not None:
        COUNT: gl.constexpr = _KEYS // PAGE
        for i in gl.static_range(COUNT):
            column = block * COUNT + i
            if not ONE:
                column = column // per
            at = batch.to(gl.int64) * columns + gl.minimum(column, columns - 1)
            found = found + (gl.load(table + at),)
    return found


@gluon.jit
def boxes(desc, SLOTS: gl.constexpr, D: gl.constexpr, PAGE: gl.constexpr):
    """Buffers of blocks, as boxes."""
    COUNT: gl.constexpr = SLOTS * (D // _WIDTH) * (_KEYS // PAGE)
    return gl.allocate_shared_memory(desc.dtype, [COUNT] + desc.block_type.shape, desc.layout)


@gluon.jit
def blocks_of(buffers, SLOTS: gl.constexpr, D: gl.constexpr):
    """The same buffers as whole blocks [1, 1, 128, D]."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, _KEYS, D], buffers.dtype)
    return buffers._reinterpret(buffers.dtype, [SLOTS, 1, 1, _KEYS, D], LAYOUT)


@gluon.jit
def copy_block(
    desc, buffers, slot, full, held, batch, head, first, block, per, pages, D: gl.constexpr,
    PAGE: gl.constexpr, ONE: gl.constexpr,
):  # fmt: skip
    """Begins the copy of a block, of `held` pages or of a batch from its first key."""
    bar = full.index(slot)
    mbarrier.expect(bar, _KEYS * D * 2)
    COUNT: gl.constexpr = _KEYS // PAGE
    for i in gl.static_range(COUNT):
        if len(held) > 0:
            of = gl.minimum(gl.maximum(held[i], 0), pages - 1).to(gl.int32)
            row = 0
            if not ONE:
                row = (block * COUNT + i) % per * PAGE
        else:
            of = batch
            row = first + block * _KEYS
        for half in gl.static_range(D // _WIDTH):
            to = buffers.index((slot * (D // _WIDTH) + half) * COUNT + i)
            tma.async_copy_global_to_shared(desc, [of, head, row, half * _WIDTH], bar, to)
