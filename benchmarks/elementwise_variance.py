"""Which elementwise operators of torch give an element other bits when only its place changes.

Walks every aten overload that torch tags as pointwise, and the elementwise ones that it does not
tag, and compares an element's bits in a contiguous tensor of 4096 with its bits at another length,
at a shifted or misaligned start, in strided views, in a broadcast, with two threads, and beside
NaN, infinities and huge values. Half of the values are drawn over many binades, half are special
(signed zeros, infinities, NaN, subnormals, ties).

    python benchmarks/elementwise_variance.py --json docs/benchmarks/elementwise_variance.json
    python benchmarks/elementwise_variance.py --covered     # the same with our overrides in place
    python benchmarks/elementwise_variance.py --device cuda --processes 12
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import platform
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

N = 4096
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64)
DEVICE = "cpu"
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
SPECIAL = (
    0.0,
    -0.0,
    float("inf"),
    float("-inf"),
    float("nan"),
    1e-40,
    -1e-40,
    1.0,
    -1.0,
    0.5,
    -0.5,
    2.0,
    3.0,
    -3.0,
    6.0,
    3e38,
    -3e38,
)

UNTAGGED = """
    _add_relu.Tensor _prelu_kernel _prelu_kernel_backward binary_cross_entropy
    binary_cross_entropy_backward complex elu_backward floor_divide hardshrink_backward
    hardsigmoid_backward hardswish hardswish_backward hardtanh_backward huber_loss
    huber_loss_backward leaky_relu_backward log_sigmoid_backward log_sigmoid_forward mish_backward
    mse_loss mse_loss_backward polar smooth_l1_loss smooth_l1_loss_backward soft_margin_loss
    soft_margin_loss_backward softplus_backward softshrink_backward _to_copy
""".split()
"""Elementwise operators without the tag; float inputs, one shape for inputs and outputs."""

NOT_FLOAT = "bitwise __ gcd lcm logical_ equal"
"""Prefixes of tagged operators that compute integers or booleans alone."""

POSITIVE = """
    acosh digamma igamma igammac lgamma log log10 log1p log2 mvlgamma polygamma pow rsqrt
    special_bessel_y0 special_bessel_y1 special_modified_bessel_k0 special_modified_bessel_k1
    special_scaled_modified_bessel_k0 special_scaled_modified_bessel_k1 special_zeta sqrt
""".split()
UNIT = """
    acos asin atanh binary_cross_entropy binary_cross_entropy_backward erfinv logit logit_backward
    special_entr special_ndtri special_xlog1py xlogy
""".split()
"""Operators that give NaN for most values of a wide draw."""

SCALARS: dict[str, Any] = {
    "alpha": 1.7,
    "beta": 1.3,
    "decimals": 2,
    "delta": 0.6,
    "eps": 0.05,
    "exponent": 2.3,
    "input_scale": 1.2,
    "is_result": False,
    "lambd": 0.5,
    "lower": 0.1,
    "max": 0.7,
    "max_val": 0.7,
    "min": -0.5,
    "min_val": -0.5,
    "n": 3,
    "negative_slope": 0.01,
    "other": 1.3,
    "p": 3,
    "reduction": 0,
    "rounding_mode": "floor",
    "scale": 1.1,
    "self": 1.9,
    "threshold": 0.1,
    "training": False,
    "upper": 0.3,
    "value": 0.37,
    "weight": 0.3,
    "x": 0.7,
    "dtype": torch.bfloat16,
}
"""The value of every argument that is no tensor, by its name."""

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "add.Tensor": [{"alpha": 1}],
    "sub.Tensor": [{"alpha": 1}],
    "div.Tensor_mode": [{"rounding_mode": "trunc"}],
    "gelu": [{"approximate": "tanh"}],
    "gelu_backward": [{"approximate": "tanh"}],
    "pow.Tensor_Scalar": [{"exponent": e} for e in (2.0, 3.0, 0.5, -0.5, -1.0, -2.0, 4.0)],
    "elu_backward": [{"is_result": True}],
}
"""Further calls of operators whose kernel depends on such an argument."""


@dataclass
class Call:
    """One operator with fixed scalars, a function of its tensor operands."""

    label: str
    base: str
    operands: list[str]
    fn: Callable[..., Any]

    def __call__(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        result = self.fn(*tensors)
        return [result] if isinstance(result, torch.Tensor) else list(result)


def calls() -> Iterator[Call]:
    """Every functional elementwise overload, and its variants."""
    names = []
    for full in torch._C._dispatch_get_all_op_names():
        base, _, overload = full.removeprefix("aten::").partition(".")
        if not full.startswith("aten::") or base.endswith("_") or not hasattr(torch.ops.aten, base):
            continue
        op = getattr(getattr(torch.ops.aten, base), overload or "default", None)
        if op is not None and torch.Tag.pointwise in op.tags:
            names.append(f"{base}.{overload}".rstrip("."))
    for name in sorted({*names, *UNTAGGED}):
        if not name.startswith(tuple(NOT_FLOAT.split())):
            for scalars in ({}, *VARIANTS.get(name, [])):
                if (call := _call(name, scalars)) is not None:
                    yield call


def _is_operand(argument: Any) -> bool:
    bound = str(argument.type) == "Optional[Tensor]" and argument.name in ("min", "max")
    return str(argument.type) == "Tensor" or bound


def _call(name: str, scalars: dict[str, Any]) -> Call | None:
    base, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.aten, base), overload or "default")
    operands, plan = [], []
    for argument in op._schema.arguments:
        if argument.is_out or "Tensor[]" in str(argument.type):
            return None
        if _is_operand(argument):
            operands.append(argument.name)
            plan.append((argument, None))
        elif str(argument.type) == "Optional[Tensor]":
            plan.append((argument, None))
        elif argument.name in scalars or argument.name in SCALARS:
            plan.append((argument, scalars.get(argument.name, SCALARS.get(argument.name))))
        elif not argument.has_default_value():
            return None
    if not operands:
        return None

    def fn(*tensors: torch.Tensor) -> Any:
        given = iter(tensors)
        args, kwargs = [], {}
        for argument, value in plan:
            is_operand = _is_operand(argument)
            value = next(given) if is_operand else value
            if argument.kwarg_only or (not is_operand and argument.has_default_value()):
                kwargs[argument.name] = value
            else:
                args.append(value)
        return op(*args, **kwargs)

    label = name + "".join(f" {key}={value}" for key, value in scalars.items())
    return Call(label, base, operands, fn)


def draw(call: Call, index: int, dtype: torch.dtype, special: bool) -> torch.Tensor:
    """Seeded values for one operand."""
    generator = torch.Generator().manual_seed(17 * index + special)
    z = torch.randn(N, generator=generator, dtype=torch.float64)
    u = torch.rand(N, generator=generator, dtype=torch.float64)
    name = call.operands[index]
    if call.base.startswith("special_") and name == "n":
        x = (6 * u).round()
    elif name in ("grad_output", "grad", "weight", "exponent"):
        x = z
    elif call.base in UNIT:
        x = 0.98 * u + 0.01
    elif call.base in POSITIVE:
        x = z.abs() + 1.01
    else:
        x = z * torch.exp2((12 * u - 8).round())
    if special:
        picked = torch.randint(len(SPECIAL), (N,), generator=generator)
        chosen = torch.rand(N, generator=generator) < 0.5
        x = torch.where(chosen, torch.tensor(SPECIAL, dtype=torch.float64)[picked], x)
        if call.base in ("binary_cross_entropy", "binary_cross_entropy_backward"):
            x = x.nan_to_num(0.5).clamp(0, 1)
    if dtype.is_complex:
        x = torch.complex(x, x.roll(1))
    return x.to(dtype).to(DEVICE)


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values, not contiguous."""
    square = x.view(64, 64)
    return {
        "step": torch.stack([x, x], 1).flatten()[::2],
        "chunk": torch.cat([square, square], 1)[:, :64],
        "transposed": square.t().contiguous().t(),
    }


class Differences:
    """Counts the elements whose bits differ from the reference, by context."""

    def __init__(self, reference: list[torch.Tensor]) -> None:
        self.reference = reference
        self.counts: list[tuple[str, torch.Tensor]] = []

    def add(self, context: str, got: list[torch.Tensor], where: Any = slice(None)) -> None:
        for a, b in zip(got, self.reference, strict=True):
            a, b = a.contiguous().flatten(), b[where]
            if a.is_complex():
                a, b = torch.view_as_real(a).flatten(), torch.view_as_real(b).flatten()
            if not a.is_floating_point():
                self.counts.append((context, (a != b).sum()))
                continue
            integer = INTEGERS[a.element_size()]
            differ = a.contiguous().view(integer) != b.contiguous().view(integer)
            payload = differ & a.isnan() & b.isnan()
            self.counts.append((context, (differ & ~payload).sum()))
            self.counts.append(("NaN payload", payload.sum()))

    def nonzero(self) -> dict[str, int]:
        """The counts, read once at the end: a device would wait for each."""
        found: Counter[str] = Counter()
        counts = torch.stack([count for _, count in self.counts]).tolist()
        for (context, _), count in zip(self.counts, counts, strict=True):
            found[context] += count
        return {context: count for context, count in found.items() if count}


def measure(call: Call, dtype: torch.dtype, special: bool) -> dict[str, int]:
    """Elements that changed, by context, for one operator in one dtype."""
    operands = [draw(call, i, dtype, special) for i in range(len(call.operands))]
    torch.set_num_threads(1)
    reference = [out.flatten() for out in call(operands)]
    if any(out.numel() != N for out in reference):
        raise ValueError("not elementwise: inputs and outputs differ in shape")
    differences = Differences(reference)
    for n in (1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 65, 100, 127, 1000):
        differences.add("length", call([x[:n].clone() for x in operands]), slice(n))
    for start, n in ((1, 64), (3, 100), (17, 256), (33, 1024)):
        part = slice(start, start + n)
        differences.add("position", call([x[part].clone() for x in operands]), part)
        differences.add("alignment", call([x[part] for x in operands]), part)
    for kind in ("step", "chunk", "transposed"):
        views = [layouts(x)[kind] for x in operands]
        differences.add(kind, call(views))
        if len(views) > 1:
            differences.add("mixed layouts", call([operands[0].view_as(views[0]), *views[1:]]))
    row = [x[:100].expand(3, 100) for x in operands]
    differences.add("expanded", [out[1] for out in call(row)], slice(100))
    if len(operands) > 1:
        for i in range(len(operands)):
            short = [x[:70].expand(3, 70) if i != j else x[:70] for j, x in enumerate(operands)]
            with contextlib.suppress(RuntimeError):  # derivatives need not broadcast
                full = [out.view(3, 70)[2] for out in call(short)]
                differences.add("broadcast", full, slice(70))
    if not special:
        # A probability beyond [0, 1] stops a CUDA device for good, rather than raise.
        neighbours = (float("nan"), float("inf"), 1e3, 1e5, 3e30, 0.0)
        for value in (0.0,) if call.base.startswith("binary_cross_entropy") else neighbours:
            odd = torch.arange(N, device=DEVICE) % 2 == 1
            other = torch.tensor(value, device=DEVICE).to(dtype)
            mixed = [torch.where(odd, other, x) for x in operands]
            with contextlib.suppress(RuntimeError):  # some check the range of their input
                differences.add("neighbour", [out[::2] for out in call(mixed)], slice(0, None, 2))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for n in (5001, 32769, 65569):
            whole = call([x.repeat(n // N + 1)[:n] for x in operands])
            for start in range(0, n, N):
                part = slice(min(N, n - start))
                differences.add(f"{threads} threads", [x[start : start + N] for x in whole], part)
    return differences.nonzero()


def survey(dtypes: list[torch.dtype], part: int, parts: int) -> dict[str, Any]:
    """Every call in every dtype: `{label: {dtype: {context: elements}}}`, and what cannot run.

    Of `parts` processes this one takes each `parts`-th call, from `part` on.
    """
    results: dict[str, dict[str, dict[str, int]]] = {}
    unsupported: dict[str, str] = {}
    for call in itertools.islice(calls(), part, None, parts):
        print(part, call.label, file=sys.stderr, flush=True)  # which kernel hangs, if one does
        done = results.setdefault(call.label, {})
        reason = ""
        for dtype in dtypes:
            try:
                plain, special = (measure(call, dtype, special) for special in (False, True))
            except torch.AcceleratorError:  # a GPU that stopped computes nothing any more
                raise
            except (RuntimeError, ValueError, NotImplementedError) as error:
                reason = str(error).splitlines()[0]
                continue
            done[str(dtype).removeprefix("torch.")] = {
                **plain,
                **{f"special values, {key}": value for key, value in special.items()},
            }
        if not done:
            del results[call.label]
            unsupported[call.label] = reason
    return {"results": results, "unsupported": unsupported}


def survey_part(part: int, options: argparse.Namespace) -> dict[str, Any]:
    """What one process finds."""
    global DEVICE
    DEVICE = options.device
    warnings.simplefilter("ignore")
    torch.set_grad_enabled(False)
    library = None
    if options.covered:
        from batch_invariant.cpu import elementwise

        library = torch.library.Library("aten", "IMPL")
        for name, fn in elementwise.overrides().items():
            library.impl(name, fn, "CPU", with_keyset=True)
    try:
        dtypes = [getattr(torch, name) for name in options.dtypes.split(",")]
        return survey(dtypes, part, options.processes)
    finally:
        if library is not None:
            library._destroy()


def varies(found: dict[str, int]) -> bool:
    """Whether more changed than the payload of a NaN."""
    return any("NaN payload" not in context for context in found)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write every count to this file")
    parser.add_argument("--covered", action="store_true", help="with the overrides in place")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--dtypes",
        default=",".join(str(dtype).removeprefix("torch.") for dtype in DTYPES),
        help="names with commas between; default: all",
    )
    parser.add_argument("--processes", type=int, default=1, help="that share the operators")
    options = parser.parse_args()
    if options.covered and options.device != "cpu":
        parser.error("--covered: the overrides are the CPU's")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, mp_context=context) as pool:
        parts = pool.map(survey_part, range(options.processes), itertools.repeat(options))
        found: dict[str, dict[str, Any]] = {"results": {}, "unsupported": {}}
        for part in parts:
            for kind, entries in part.items():
                found[kind].update(entries)
    found = {kind: dict(sorted(entries.items())) for kind, entries in found.items()}
    varying = {
        label: {dtype: counts for dtype, counts in by_dtype.items() if varies(counts)}
        for label, by_dtype in found["results"].items()
        if any(map(varies, by_dtype.values()))
    }
    payload = [
        label
        for label, by_dtype in found["results"].items()
        if label not in varying and any(by_dtype.values())
    ]
    report = {
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "machine": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "overrides": options.covered,
        "elements": N,
        "varying": varying,
        "only the payload of NaN varies": payload,
        "same bits": [
            label for label in found["results"] if label not in varying and label not in payload
        ],
        "not elementwise on floats": found["unsupported"],
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    for label, by_dtype in varying.items():
        for dtype, counts in by_dtype.items():
            shown = ", ".join(f"{context} {count}" for context, count in counts.items())
            print(f"{label:42} {dtype:9} {shown}")
    print(
        f"{len(varying)} of {len(found['results'])} calls vary with an element's place; of "
        f"{len(payload)} more only the payload of a NaN does; torch {torch.__version__}, "
        f"{report['cpu_capability']}"
    )
    return int(options.covered and bool(varying))


if __name__ == "__main__":
    sys.exit(main())
