"""The native GEMM has the bits of its declared order, whatever the shape, layout and threads."""

from __future__ import annotations

import ctypes
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from batch_invariant.cpu import native
from batch_invariant.cpu.matmul import product
from replay import (
    AMX,
    DOT,
    SERIAL,
    cancelling,
    fma32,
    powers,
    replay,
    replay_bf16,
    replay_chunks,
    same,
)

PACK = struct.Struct("=7qQ2qQ3qQ3qQ4q2d").pack
CODE = {getattr(torch, name): code for name, code in native.DTYPES.items()}
KN, NK = 0, 1

LIBRARY = native.library()
ORDERS = [o for o in native.BF16_ORDERS if LIBRARY.bi_bf16_order_supported(o)]
KINDS = [(torch.float32, SERIAL), (torch.float64, SERIAL), (torch.float16, SERIAL)] + [
    (torch.bfloat16, order) for order in ORDERS
]
every_kind = pytest.mark.parametrize(
    ("dtype", "order"), KINDS, ids=lambda v: str(v).removeprefix("torch.")
)


def gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    layout: int = NK,
    *,
    order: int = -1,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    addend: torch.Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    threads: int = 1,
    chunk: int = 0,
    library: Any = LIBRARY,
) -> torch.Tensor:
    """`alpha * a @ b + beta * addend`; a: [.., M, K], b: [.., N, K] (NK) or [.., K, N] (KN)."""
    a3, b3 = a if a.dim() == 3 else a[None], b if b.dim() == 3 else b[None]
    batch = max(a3.size(0), b3.size(0))
    a3, b3 = a3.expand(batch, -1, -1), b3.expand(batch, -1, -1)
    m, k, n = a3.size(1), a3.size(2), b3.size(1 if layout == NK else 2)
    if out is None:
        out = torch.empty(batch, m, n, dtype=out_dtype or a.dtype)
    where, steps = 0, (0, 0, 0)
    if addend is not None:
        full = addend.expand(batch, m, n)
        where, steps = full.data_ptr(), (full.stride(1), full.stride(2), full.stride(0))
    status = library.bi_gemm(
        PACK(
            CODE[a.dtype], CODE[out.dtype], m, n, k, batch, chunk,
            a3.data_ptr(), a3.stride(1), a3.stride(0),
            b3.data_ptr(), layout, b3.stride(1), b3.stride(0),
            where, *steps,
            out.data_ptr(), out.stride(1), out.stride(0),
            threads, order, alpha, beta,
        )
    )  # fmt: skip
    assert status == 0, native.STATUS[status]
    return out if a.dim() == 3 or b.dim() == 3 else out[0]


SHAPES = [
    (1, 1, 1),
    (3, 5, 7),
    (5, 9, 33),
    (13, 40, 257),
    (1, 70, 513),
    (40, 3, 300),
    (26, 33, 530),
]


@pytest.mark.parametrize("data", ["randn", "cancelling", "denormal"])
@pytest.mark.parametrize(
    ("dtype", "order"), [kind for kind in KINDS if kind[0] != torch.float64], ids=str
)
def test_bits_are_those_of_the_declared_order(dtype: torch.dtype, order: int, data: str) -> None:
    for m, n, k in SHAPES:
        g = torch.Generator().manual_seed(m * n * k)
        a, b = torch.randn(m, k, generator=g), torch.randn(n, k, generator=g)
        if data == "cancelling":
            a, b = cancelling(m, k, torch.float32), powers(n, k, torch.float32)
        if data == "denormal":  # products and sums on both sides of the smallest normal number
            a = a * 2.0 ** (-14 if dtype == torch.float16 else -120)
            b = b * 2.0**-6
        a, b = a.to(dtype), b.to(dtype)
        want = replay_bf16(a, b, order) if dtype == torch.bfloat16 else replay(a, b)
        for layout, right in ((NK, b), (KN, b.mT.contiguous())):
            wide = gemm(a, right, layout, order=order, out_dtype=torch.float32)
            assert same(wide, want), f"{m}x{n}x{k}, layout {layout}"
            assert same(gemm(a, right, layout, order=order), want.to(dtype))


def test_float64_is_one_serial_fma_chain() -> None:
    fma = ctypes.CDLL(None).fma
    fma.restype, fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3
    a, b = cancelling(7, 300, torch.float64), torch.randn(19, 300, dtype=torch.float64)
    got = gemm(a, b)
    assert same(got, gemm(a, b.mT.contiguous(), KN))
    for i in range(7):
        for j in range(19):
            acc = 0.0
            for x, y in zip(a[i].tolist(), b[j].tolist(), strict=True):
                acc = fma(x, y, acc)
            assert got[i, j].item() == acc


@pytest.mark.parametrize("chunk", [256, 512])
@pytest.mark.parametrize("k", [513, 1024, 1300, 2065])
def test_chunks_are_added_ascending(chunk: int, k: int) -> None:
    for m, n in ((1, 1), (1, 70), (7, 45), (70, 33), (33, 2)):
        a, b = cancelling(m, k, torch.float32), powers(n, k, torch.float32)
        b *= torch.randn(n, k, generator=torch.Generator().manual_seed(k))
        want = replay_chunks(a, b, chunk)
        for right, layout in ((b, NK), (b.mT.contiguous(), KN)):
            for threads in (1, 2):
                assert same(gemm(a, right, layout, chunk=chunk, threads=threads), want)
    assert not same(gemm(a, b), want), "the data would not show another order"
    assert not same(want, replay_chunks(a.flip(1), b.flip(1), chunk))


def test_negative_zero_is_kept_by_the_first_chunk() -> None:
    """A sum that underflows to -0 stays -0 where the other chunks are -0 too."""
    a, b = torch.full((1, 1024), -(2.0**-100)), torch.full((3, 1024), 2.0**-100)
    want = replay_chunks(a, b, 512)
    assert torch.signbit(want).all()
    assert same(gemm(a, b, chunk=512), want)


def test_products_of_fp32_have_the_declared_chunks() -> None:
    for k in (2047, 2048, 4096):
        a, b = cancelling(3, k, torch.float32), torch.randn(9, k)
        want = replay_chunks(a, b, 512) if k >= 2048 else replay(a, b)
        assert same(product(a, b.mT), want)


def test_the_replay_tells_orders_apart() -> None:
    """Negative control: the same comparison fails for the reversed chain and for split sums."""
    a, b = cancelling(13, 257, torch.float32), torch.randn(40, 257)
    got = gemm(a, b)
    assert not same(got, replay(a, b, list(reversed(range(257)))))
    assert not same(got, replay(a, b, list(range(128))) + replay(a[:, 128:], b[:, 128:]))
    half = a.bfloat16(), b.bfloat16()
    wanted = [replay_bf16(*half, order) for order in (AMX, DOT, SERIAL)]
    assert not any(same(x, y) for i, x in enumerate(wanted) for y in wanted[:i])


# A row's bits do not depend on anything but the row ----------------------------------------------

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def find_variance(product: Product, dtype: torch.dtype, k: int, n: int) -> str | None:
    """None, or the first number of rows at which some row lost the bits it has among 1024."""
    big, b = cancelling(1024, k, dtype), powers(n, k, dtype)
    want = product(big, b)
    for m in (*range(1, 71), 383, 384, 385, 769):
        start = (37 * m) % (1024 - m)
        if not same(product(big[start : start + m].clone(), b), want[start : start + m]):
            return f"{m} rows"
    return None


@every_kind
@pytest.mark.parametrize(("k", "n"), [(1057, 67), (96, 130)])
def test_number_of_rows(dtype: torch.dtype, order: int, k: int, n: int) -> None:
    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return gemm(a, b, order=order, threads=1 + len(a) % 2)

    assert find_variance(product, dtype, k, n) is None


def test_number_of_rows_matters_to_a_variant_product() -> None:
    """Negative control: a product that splits K when there are few rows is found out."""

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if len(a) > 8:
            return gemm(a, b)
        return gemm(a[:, :512], b[:, :512]) + gemm(a[:, 512:], b[:, 512:])

    assert find_variance(product, torch.float32, 1057, 67) == "1 rows"


@every_kind
def test_position_layout_threads_and_strides(dtype: torch.dtype, order: int) -> None:
    m, k, n = 66, 1030, 150
    a, b = cancelling(m, k, dtype), powers(n, k, dtype) * torch.randn(n, k).to(dtype)
    want = gemm(a, b, order=order)
    bt = b.mT.contiguous()
    for i in range(m):
        assert same(gemm(a[i : i + 1], bt, KN, order=order)[0], want[i])
        assert same(gemm(a[i : i + 1], b, order=order)[0], want[i])
    for rows in (2, 8, 9, 33, 66):
        for threads in (1, 2):
            for right, layout in ((b, NK), (bt, KN)):
                got = gemm(a[:rows], right, layout, order=order, threads=threads)
                assert same(got, want[:rows])
    for columns in (slice(0, 1), slice(5, 6), slice(3, 80), slice(149, 150), slice(1, 149)):
        assert same(gemm(a, b[columns], order=order), want[:, columns])
        assert same(gemm(a, bt[:, columns], KN, order=order), want[:, columns])
        assert same(gemm(a[:1], bt[:, columns], KN, order=order), want[:1, columns])
    for shift in (1, 3):  # elements: starts that no vector is aligned to, and padded rows
        wide_a, wide_b = torch.zeros(m, k + 7, dtype=dtype), torch.zeros(n, k + 9, dtype=dtype)
        wide_bt, wide_c = torch.zeros(k, n + 5, dtype=dtype), torch.zeros(1, m, n + 3, dtype=dtype)
        moved_a, moved_b = wide_a[:, shift : shift + k], wide_b[:, shift : shift + k]
        moved_bt = wide_bt[:, shift : shift + n]
        out = wide_c[:, :, shift : shift + n]
        moved_a.copy_(a), moved_b.copy_(b), moved_bt.copy_(bt)
        gemm(moved_a, moved_b, order=order, out=out)
        assert same(out[0], want)
        assert not wide_c[:, :, :shift].any()
        assert not wide_c[:, :, shift + n :].any()
        assert same(gemm(moved_a, moved_bt, KN, order=order), want)
    assert same(gemm(a[1].expand(9, k), b, order=order), want[1].expand(9, n))
    assert same(gemm(a, b[4].expand(9, k), order=order), want[:, 4:5].expand(m, 9))
    assert same(gemm(a.flip(0), b, order=order), want.flip(0))


@every_kind
def test_batches(dtype: torch.dtype, order: int) -> None:
    for m, n, k in ((1, 200, 64), (40, 33, 64), (64, 64, 700), (7, 1, 65)):
        a = cancelling(9 * m, k, dtype).view(9, m, k)
        b = torch.randn(9, n, k).to(dtype)
        want = torch.stack([gemm(x, y, order=order) for x, y in zip(a, b, strict=True)])
        for threads in (1, 2):
            assert same(gemm(a, b, order=order, threads=threads), want)
            assert same(gemm(a, b.mT.contiguous(), KN, order=order, threads=threads), want)
            shared = gemm(a, b[0], order=order, threads=threads)
            assert same(shared[5], gemm(a[5], b[0], order=order))


@every_kind
def test_neighbours_that_are_not_finite(dtype: torch.dtype, order: int) -> None:
    for m in (2, 9, 40):
        a, b = cancelling(m, 70, dtype), torch.randn(45, 70).to(dtype)
        for layout, right in ((NK, b), (KN, b.mT.contiguous())):
            want = gemm(a, right, layout, order=order)
            dirty, dirty_right = a.clone(), right.clone()
            dirty[1] = torch.nan
            dirty[1, 3] = -torch.inf
            (dirty_right if layout == NK else dirty_right.mT)[44, 2] = torch.inf
            got = gemm(dirty, dirty_right, layout, order=order)
            assert same(got[2:, :44], want[2:, :44])
            assert same(got[:1, :44], want[:1, :44])
            one_nan = torch.full_like(got[1], torch.nan)
            assert same(got[1], one_nan)


def test_infinity_times_zero_is_the_one_nan() -> None:
    a, b = torch.zeros(14, 40), torch.full((35, 40), torch.inf)
    for rows in (1, 5, 14):
        assert same(gemm(a[:rows], b), torch.full((rows, 35), torch.nan))


# The last rounding -------------------------------------------------------------------------------


@every_kind
def test_alpha_beta_and_addend_round_once(dtype: torch.dtype, order: int) -> None:
    m, n, k = 11, 37, 130
    a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    chain = gemm(a, b, order=order, out_dtype=wide)
    full = torch.randn(m, n).to(dtype)
    bias, column = torch.randn(n).to(dtype), torch.randn(m, 1).to(dtype)
    for addend in (full, bias, column, full.mT.contiguous().mT, full[:1, :1]):
        same_bits = chain + addend.to(wide)
        assert same(gemm(a, b, order=order, addend=addend), same_bits.to(dtype))
        row = addend if addend is bias else addend[:1]
        assert same(gemm(a[:1], b, order=order, addend=row), same_bits[:1].to(dtype))
        if wide == torch.float32:
            scaled, beta = (chain * 0.3).numpy(), np.full((m, n), -1.7, np.float32)
            exact = fma32(beta, addend.float().expand(m, n).numpy(), scaled)
            got = gemm(a, b, order=order, addend=addend, alpha=0.3, beta=-1.7)
            assert same(got, torch.from_numpy(exact).to(dtype))
    nan = torch.full((m, n), torch.nan).to(dtype)
    assert same(gemm(a, b, order=order, addend=nan, beta=0.0), chain.to(dtype))
    assert not gemm(a, b, order=order, alpha=0.0).any()


@every_kind
def test_empty_sizes(dtype: torch.dtype, order: int) -> None:
    for layout in (NK, KN):
        b = torch.empty((9, 0) if layout == NK else (0, 9), dtype=dtype)
        a, addend = torch.empty(3, 0, dtype=dtype), torch.randn(9).to(dtype)
        assert same(gemm(a, b, layout, order=order), torch.zeros(3, 9, dtype=dtype))
        got = gemm(a, b, layout, order=order, addend=addend, beta=2.0)
        assert same(got, (2 * addend).expand(3, 9))
    assert gemm(torch.empty(0, 5, dtype=dtype), torch.ones(4, 5, dtype=dtype)).shape == (0, 4)
    assert gemm(torch.ones(4, 5, dtype=dtype), torch.empty(0, 5, dtype=dtype)).shape == (4, 0)


# The machine -------------------------------------------------------------------------------------


def test_the_bf16_order_is_the_fastest_that_the_cpu_has() -> None:
    order = LIBRARY.bi_bf16_order()
    assert order == ORDERS[0]
    a, b = cancelling(5, 300, torch.bfloat16), torch.randn(20, 300).bfloat16()
    assert same(gemm(a, b), gemm(a, b, order=order))


@pytest.mark.skipif(sys.platform != "linux", reason="looks for Linux libraries")
def test_instruction_sets_agree() -> None:
    """The AVX2 library has the bits of the one in use, in the portable orders."""
    path = native._path("x86_64_v3")
    if LIBRARY._name == str(path) or not path.exists():
        pytest.skip("this machine runs one instruction set")
    other = ctypes.CDLL(str(path))
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        for m, n, k in ((1, 70, 300), (2, 33, 65), (9, 40, 1030), (70, 100, 129)):
            a, b = cancelling(m, k, dtype), torch.randn(n, k).to(dtype)
            for layout, right in ((NK, b), (KN, b.mT.contiguous())):
                want = gemm(a, right, layout, order=SERIAL)
                assert same(gemm(a, right, layout, order=SERIAL, library=other), want)


def test_flushed_denormals_of_the_caller_do_not_matter() -> None:
    a, b = torch.randn(40, 65) * 2.0**-120, torch.randn(300, 65) * 2.0**-8
    want = gemm(a, b)
    assert ((want != 0) & (want.abs() < 2.0**-126)).any()
    if not torch.set_flush_denormal(True):
        pytest.skip("torch cannot flush denormals here")
    try:
        assert same(gemm(a, b), want)
        assert same(gemm(a, b, threads=2), want)
    finally:
        torch.set_flush_denormal(False)


def test_several_callers_at_once() -> None:
    a, b = cancelling(70, 513, torch.float32), torch.randn(300, 513)
    want = gemm(a, b)
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(gemm, a[i % 7 :], b, threads=1 + i % 2) for i in range(24)]
        for i, call in enumerate(calls):
            assert same(call.result(), want[i % 7 :])


def test_a_forked_child_computes_on() -> None:
    """The pool's threads do not exist in a forked child; it must neither hang nor change bits."""
    script = """
        import os, signal, sys
        sys.path[:0] = PATHS
        import torch
        from batch_invariant.cpu.matmul import product
        torch.set_num_threads(2)
        a, b = torch.randn(40, 512), torch.randn(512, 700)
        want = product(a, b)
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            os._exit(0 if torch.equal(product(a, b), want) else 3)
        status = os.waitpid(child, 0)[1]
        sys.exit(0 if status == 0 and torch.equal(product(a, b), want) else 1)
    """
    source = textwrap.dedent(script).replace("PATHS", repr(sys.path))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", source], timeout=120, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ((7, 0), "unsupported dtype"),
        ((0, 2), "unsupported dtype"),
        ((1, 0), "unsupported dtype"),
        ((0, 0, -1), "invalid argument"),
        ((0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 5), "invalid argument"),
        ((0, 0, 1, 1, 1, 1, 100), "invalid argument"),
        ((2, 2, 1, 1, 1, 1, 512), "invalid argument"),
    ],
)
def test_what_cannot_be_computed_is_refused(fields: tuple[int, ...], reason: str) -> None:
    rest = (0,) * (23 - len(fields))
    assert native.STATUS[LIBRARY.bi_gemm(PACK(*fields, *rest, 1.0, 0.0))] == reason
