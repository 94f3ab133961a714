"""What the tests of `bi demo` share: parsed options, decodings, a planted bit."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from batch_invariant.cli import demo
from batch_invariant.cli.demo.comparing import Decoded


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bi demo")
    demo.add_arguments(parser)
    return parser.parse_args(arguments)


def decoded(tokens: Sequence[int], *, words: int = 5, seed: int = 0) -> Decoded:
    generator = torch.Generator().manual_seed(seed)
    return Decoded(
        torch.tensor(tokens), torch.randn(len(tokens), words, generator=generator) * 2.0**10
    )


def flip_bit(tensor: torch.Tensor, index: tuple[int, ...], bit: int) -> None:
    tensor.view(torch.int32)[index] ^= 1 << bit
