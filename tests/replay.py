"""The declared orders of the native kernels, replayed in numpy, and data that shows an order."""

from __future__ import annotations

import numpy as np
import torch

AMX, DOT, SERIAL = 0, 1, 2  # Bf16Order of native/gemm.h
WIDTH = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    assert x.dtype == y.dtype
    width = WIDTH[x.element_size()]
    return torch.equal(x.contiguous().view(width), y.contiguous().view(width))


def cancelling(rows: int, k: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Shuffled pairs v, -v of widely spread v: nearly all of the exact sum cancels, so every
    change of the order shows."""
    g = torch.Generator().manual_seed(seed)
    v = torch.randn(rows, (k + 1) // 2, generator=g).mul(1.5).exp()
    return torch.cat([v, -v], 1)[:, torch.randperm(2 * v.size(1), generator=g)][:, :k].to(dtype)


def powers(rows: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    exponents = torch.randint(-1, 2, (rows, 1), generator=g).float()
    return torch.exp2(exponents).to(dtype).expand(rows, k).contiguous()


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Correctly rounded fp32 a * b + c: the exact product and sum rounded to odd in float64, which
    leaves the last rounding to fp32 undisturbed."""
    product = a.astype(np.float64) * b.astype(np.float64)
    wide = c.astype(np.float64)
    total = product + wide
    with np.errstate(invalid="ignore"):
        back = total - product
        error = (product - (total - back)) + (wide - back)
    even = (total.view(np.int64) & 1) == 0
    adjust = np.isfinite(total) & (error != 0) & even
    with np.errstate(invalid="ignore", over="ignore"):
        odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
        return np.where(adjust, odd, total).astype(np.float32)


def flush(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def replay(a: torch.Tensor, b: torch.Tensor, ks: list[int] | None = None) -> torch.Tensor:
    """The portable order on a [M, K], b [N, K]: one fp32 chain over k (or over `ks`), from +0."""
    x, y = a.float().numpy(), b.float().numpy()
    acc = np.zeros((x.shape[0], y.shape[0]), np.float32)
    for k in range(x.shape[1]) if ks is None else ks:
        acc = fma32(x[:, k, None], y[None, :, k], acc)
    return torch.from_numpy(acc)


def replay_chunks(a: torch.Tensor, b: torch.Tensor, chunk: int) -> torch.Tensor:
    """The same of every `chunk` of k by itself; their results added ascending."""
    first, *more = (replay(x, y) for x, y in zip(a.split(chunk, 1), b.split(chunk, 1), strict=True))
    for part in more:
        first = first + part
    return first


def replay_weighted(
    weight: np.ndarray, values: np.ndarray, takes_part: np.ndarray, first: np.ndarray, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of weight [L, S], and of weight times values [S, Ev], over the keys that take part: a
    chain over each `block` of keys, counted from key first[i] of row i; the chains added ascending.
    """
    total, sums = np.zeros((2, len(weight), 1), np.float32)
    acc, products = np.zeros((2, len(weight), values.shape[1]), np.float32)
    for j in range(len(values)):
        begins = (j - first[:, None]) % block == 0
        total, acc = (
            np.where(begins, x + chain, x) for x, chain in ((total, sums), (acc, products))
        )
        sums, products = (np.where(begins, np.float32(0), x) for x in (sums, products))
        part, w = takes_part[:, j, None], weight[:, j, None]
        sums = np.where(part, sums + w, sums)
        products = np.where(part, fma32(w, values[None, j], products), products)
    return total + sums, acc + products


def replay_bf16(a: torch.Tensor, b: torch.Tensor, order: int) -> torch.Tensor:
    """What gemm.h says about the three orders of bf16, in fp32."""
    if order == SERIAL:
        return replay(a, b)
    x, y = flush(a.float().numpy()), flush(b.float().numpy())
    pad = -x.shape[1] % (32 if order == AMX else 2)
    x, y = np.pad(x, ((0, 0), (0, pad))), np.pad(y, ((0, 0), (0, pad)))
    acc = np.zeros((x.shape[0], y.shape[0]), np.float32)

    def extend(chain: np.ndarray, k: int) -> np.ndarray:
        return flush(fma32(x[:, k, None], y[None, :, k], chain))

    if order == DOT:
        for k in range(0, x.shape[1], 2):
            acc = extend(extend(acc, k + 1), k)
    else:
        for k0 in range(0, x.shape[1], 32):
            even = odd = np.zeros_like(acc)
            for k in range(k0, k0 + 32, 2):
                even, odd = extend(even, k), extend(odd, k + 1)
            acc = flush(acc + flush(even + odd))
    return torch.from_numpy(acc)
