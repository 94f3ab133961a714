"""What triton-ascend makes of the kernels: one loop over K, fp32 in it, and no sum left to a
compiler.

Run by job.py. Each check has a control: a kernel that breaks the rule must be found.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from batch_invariant_ascend import gemm, row_kernels

TARGET = GPUTarget("npu", "Ascend910B3", 0)


@triton.jit
def tree_sum_kernel(x, out, rows, n):
    """The control of `sums`: the order of 1024 terms is the compiler's."""
    at = tl.arange(0, 1024)
    tl.store(out, tl.sum(tl.load(x + at, mask=at < n, other=0.0), 0))


@triton.jit
def rounding_gemm_kernel(a, b, c, K, BK: tl.constexpr):
    """The control of `product`: the accumulator is rounded in every step."""
    at = tl.arange(0, 64)
    total = tl.zeros((64, 64), tl.float16)
    for k in range(0, K, BK):
        left = tl.load(a + at[:, None] * K + k + at[None, :])
        right = tl.load(b + (k + at)[:, None] * 64 + at[None, :])
        total += tl.dot(left, right, input_precision="ieee").to(tl.float16)
    tl.store(c + at[:, None] * 64 + at[None, :], total)


def lowered(fn: Any, signature: dict[str, str], constants: dict[str, Any]) -> str:
    """The linalg MLIR of a kernel."""
    try:
        triton.compile(ASTSource(fn=fn, signature=signature, constants=constants), target=TARGET)
    except Exception as error:  # the last stage needs CANN
        if "ASCEND_HOME_PATH" not in str(error):
            raise
    found = list(Path(os.environ["TRITON_CACHE_DIR"]).rglob(f"{fn.__name__}.ttadapter"))
    newest = max(found, key=lambda path: path.stat().st_mtime_ns)
    return newest.read_text()


def product_problem(text: str, bound: str) -> str | None:
    """None if there is one loop, over K, with one product into an fp32 accumulator."""
    loops = re.findall(r"scf\.for %\w+ = %\w+ to (%\w+) step (%\w+) iter_args.*-> \((.*?)\)", text)
    if len(loops) != 1:
        return f"{len(loops)} loops instead of one over K"
    ((end, step, carried),) = loops
    if end != bound or not step.startswith(f"%c{gemm._BK}"):
        return f"the loop runs to {end} in steps of {step}"
    if not carried.endswith("xf32>"):
        return f"the accumulator is {carried}"
    products = re.findall(r"linalg\.matmul (\{.*?\})", text)
    if len(products) != 1 or '"ieee"' not in products[0]:
        return f"products {products} instead of one with ieee precision"
    body = text[text.index("scf.for") : text.index("scf.yield", text.index("linalg.matmul"))]
    return "the accumulator is rounded inside the loop" if "truncf" in body else None


def sum_problem(text: str) -> str | None:
    """None if no operation adds more than two terms, in an order that nobody has written down."""
    for found in re.finditer(
        r"linalg\.reduce ins\(.*?: tensor<(\d+)x.*?dimensions = \[(\d)\]", text
    ):
        body = text[found.end() : text.index("linalg.yield", found.end())]
        if "arith.addf" in body and (found[1] != "2" or found[2] != "0"):
            return f"a sum over {found[1]} terms in one operation"
    return None


def main() -> int:
    """0 if every kernel passes and every control is found."""
    problems = []
    names = gemm.gemm_kernel.arg_names[:11]
    for dtype in ("bf16", "fp16", "fp32"):
        for transposed in (True, False):
            signature = {n: f"*{dtype}" if n in "abc" else "i32" for n in names}
            constants = {"TRANSPOSED": transposed, "BM": gemm._BM, "BN": gemm._BN, "BK": gemm._BK}
            text = lowered(gemm.gemm_kernel, signature, constants)
            # %arg0 and %arg1 are the runtime's; then a, b, c, M, N, K.
            problems.append((f"gemm {dtype} {transposed}", product_problem(text, "%arg7")))
    rows = {"x": "*fp32", "out": "*fp32", "rows": "i32", "n": "i32"}
    norm = {**rows, "weight": "*fp32", "rstd": "*fp32", "eps": "fp32"}
    order = row_kernels.rms_norm_kernel.arg_names
    for fn, signature, constants in (
        (row_kernels.row_sum_kernel, rows, {}),
        (row_kernels.softmax_kernel, rows, {}),
        (row_kernels.rms_norm_kernel, {n: norm[n] for n in order if n in norm}, {"WEIGHTED": True}),
    ):
        text = lowered(fn, signature, constants)
        problems.append((fn.__name__, sum_problem(text)))
        if text.count("linalg.reduce") < 9:
            problems.append((fn.__name__, "the folds of the lanes are not there"))
    if sum_problem(lowered(tree_sum_kernel, rows, {})) is None:
        problems.append(("control", "a sum of 1024 terms was not found"))
    half = {"a": "*fp16", "b": "*fp16", "c": "*fp16", "K": "i32"}
    if product_problem(lowered(rounding_gemm_kernel, half, {"BK": 64}), "%arg5") is None:
        problems.append(("control", "an accumulator in fp16 was not found"))
    for name, problem in problems:
        print(f"{name}: {problem or 'ok'}")
    return int(any(problem for _, problem in problems))


if __name__ == "__main__":
    raise SystemExit(main())
