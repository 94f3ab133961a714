"""Compiles kernels for a GPU that is not there, and prints the shared memory that each needs.

python architecture.py 80
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

from batch_invariant_cuda import (
    attention,
    attention_ring,
    cluster,
    launch,
    matmul,
    norm,
    norm_long,
    reduce,
    row_launch,
    softmax,
    softmax_long,
    softmax_short,
    turns,
    varlen_attention,
    varlen_ring,
    varlen_tiles,
)

CAPABILITY = int(sys.argv[1])
PROCESSORS = 100


class Absent:
    """A driver without a GPU."""

    utils = None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def report(made: Any, *label: Any) -> None:
    sys.stdout.write(" ".join(map(str, (made.metadata.shared, *label))) + "\n")


def compile_rows(
    self: row_launch.RowKernel, programs: int, tensors: Any, numbers: Any, static: Any, warps: int,
    wide: bool = True,
) -> None:  # fmt: skip
    """Instead of a launch."""
    fn = self._fn if wide else self._anywhere
    options = {"enable_fp_fusion": False, "maxnreg": self._registers.get(warps)}
    made = fn.warmup(*tensors, *numbers, *static, num_warps=warps, grid=(programs,), **options)
    made.metadata = made.metadata._replace(
        shared=made.metadata.shared + (cluster.MAILBOXES + turns.BYTES if self._cluster > 1 else 0)
    )
    report(made, fn.__name__, *static)


def products(dtype: torch.dtype) -> None:
    gpu = torch.device("cuda", 0)
    for m, n, k in ((1, 4096, 4096), (300, 4096, 1030), (300, 4096, 4096), (64, 1024, 8192)):
        a, b = torch.empty(m, k, dtype=dtype), torch.empty(n, k, dtype=dtype).t()
        out = torch.empty(m, n, dtype=dtype)
        p = matmul.problem(a, b, None, False)
        schedule, few = matmul.schedule_for(p, gpu), torch.empty(4)
        arguments = (a, b, out, None, few, few.view(torch.int32), PROCESSORS)
        for kernel, grid, given, options in launch.launches(p, schedule, *arguments):
            made = kernel.warmup(**given, **options, grid=(grid,))
            report(made, kernel.__name__, schedule, dtype)


def rows(n: int) -> None:
    x = torch.zeros(4, n, dtype=torch.bfloat16)
    softmax.KERNELS["softmax"].fn(x, -1, None)
    norm.KERNELS["rms_norm"].fn(x, x[0], 1e-6, x, None)
    reduce.KERNELS["sum"].fn(x, [-1], False)


def rows_in_registers() -> None:
    x = torch.zeros(4, 14336, dtype=torch.bfloat16)
    for warps in (8, 16):
        softmax_short.kernel(4, (x, x), (14336 // 16, PROCESSORS), (False, 14, warps), warps)


def rows_on_chip() -> None:
    """For GPUs with 227 KiB of shared memory for a program."""
    x = torch.zeros(4, 151936, dtype=torch.bfloat16)
    for log, kernel in ((False, softmax_long.kernel), (True, softmax_long.log_kernel)):
        held = softmax_long.held(log, 151936)
        kernel(4, (x, x), (151936 // 16, 4), held, cluster.WARPS.value)
    numbers = (151936 // 16, 4, 151936.0, 1e-6)
    for other in (None, x):
        tensors = (x, other, x[0], None, x, other, None, None)
        kept = norm_long.held(151936, True, True, other is not None)
        norm_long.kernel(4, tensors, numbers, kept, norm_long.WARPS.value)


def attend(size: int, dtype: torch.dtype) -> None:
    k = torch.zeros(2, 2, 700, size, dtype=dtype)
    for length in (1, 700):
        q = torch.zeros(2, 8, length, size, dtype=dtype)
        attention.KERNELS["scaled_dot_product_attention"].fn(
            q, k, k, is_causal=True, enable_gqa=True
        )
    paged = varlen_attention.KERNELS["attention"].fn
    pages = torch.zeros(40, 16, 2, size, dtype=dtype)
    table, lengths = torch.zeros(4, 30, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    for length in (1, 300):
        q = torch.zeros(4, length, 8, size, dtype=dtype)
        layout = (None, None, lengths, None, table)
        paged(q, pages, pages, None, *layout, True, None, None, None)


def compile_described(
    self: attention_ring.DescribedKernel, programs: int, described: Any, tensors: Any, numbers: Any,
    static: Any,
) -> None:  # fmt: skip
    """Instead of a launch."""
    given = (*described, *tensors, *numbers, *static)
    made = self._fn.warmup(*given, **self._options, grid=(programs,))
    report(made, self._fn.__name__, *static)


def attend_by_bulk_copies(size: int) -> None:
    """For compute capability 9.0; `fits` knows the tensors of that GPU alone."""
    attention_ring.fits = varlen_ring.fits = lambda *tensors: True
    attend(size, torch.bfloat16)
    k = torch.zeros(2, 2, 700, size, dtype=torch.bfloat16)
    parts = torch.zeros(4)
    for rows in (1, 4, 300):
        q = torch.zeros(2, 8, rows, size, dtype=torch.bfloat16)
        lse = torch.zeros(2, 8, rows)
        if rows > 4:
            attention_ring.many_rows(q, k, k, q, lse, None, None, True, 1.0)
            continue
        for split, alone in ((parts, False), (None, False), (None, True)):
            run = 6 if split is None else 2
            attention_ring.few_rows(q, k, k, q, lse, split, run, alone, 1.0)


driver.set_active(Absent())
attention_ring.DescribedKernel.__call__ = compile_described
attention_ring.multiprocessors = lambda device: PROCESSORS
CompiledKernel._init_handles = lambda self: None
row_launch.RowKernel.__call__ = compile_rows
row_launch.RowKernel.repeat = lambda *args, **options: None
capability = divmod(CAPABILITY, 10)
matmul.capability = lambda device: capability
matmul.programs = lambda device: PROCESSORS
attention.tile = varlen_tiles.tile = lambda rows, keys, widest, device, of=attention.tile: of(
    rows, keys, widest, torch.device("cuda", 0)
)
attention.tile_of_chains = varlen_tiles.tile_of_chains = (
    lambda rows, widest, masked, device, of=attention.tile_of_chains: of(
        rows, widest, masked, torch.device("cuda", 0)
    )
)
attention.capability = matmul.capability
varlen_attention.check_values = lambda *args: None
for dtype in (torch.bfloat16, torch.float32):
    products(dtype)
    for size in (64, 128, 256):
        attend(size, dtype)
for n in (1000, 4096, 151936):
    rows(n)
rows_in_registers()
if capability[0] in (9, 10):
    rows_on_chip()
if capability == (9, 0):
    for size in (64, 128):
        attend_by_bulk_copies(size)
