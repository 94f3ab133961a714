"""Philox4x32-10, a random function of a counter and a key, in plain torch.

The definition that native and device code is compared with. A key has 64 bits, a counter 128; four
words of 32 bits come out. Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3,
SC 2011.
"""

from __future__ import annotations

import torch

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

_WORD = 0xFFFFFFFF


def philox(counter: Words, key: tuple[torch.Tensor, torch.Tensor]) -> Words:
    """Ten rounds; every word is an int64 tensor of values in 0 .. 2^32 - 1, broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A product of two words wraps around int64, but its 64 bits are those of the product.
        left, right = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = _high(right) ^ c1 ^ k0, right & _WORD
        c2, c3 = _high(left) ^ c3 ^ k1, left & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def column_words(seeds: torch.Tensor, positions: torch.Tensor, n: int) -> torch.Tensor:
    """The word of every column of every row, [rows, n], for int64 seeds and positions [rows].

    Column i has word i % 4 of the block with counter (i // 4, low half of the position, its high
    half, 0) and the halves of the seed as key.
    """
    blocks = torch.arange(-(-n // 4), device=seeds.device)[None, :]
    at, seed = positions[:, None], seeds[:, None]
    counter = (blocks, at & _WORD, _high(at), torch.zeros_like(blocks))
    words = philox(counter, (seed & _WORD, _high(seed)))
    return torch.stack(words, 2).flatten(1)[:, :n]


def _high(x: torch.Tensor) -> torch.Tensor:
    return x >> 32 & _WORD
