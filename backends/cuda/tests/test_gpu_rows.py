"""Row operators on a GPU: the very bits of the CPU reference, and rows that ignore their batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import batch_invariant as bi
from batch_invariant.ops import CONTRACTS
from batch_invariant.ops.bits import mismatch
from batch_invariant.ops.contract import FLOATS, Data
from batch_invariant.proof.invariance import compare
from batch_invariant.proof.subject import draw
from batch_invariant.proof.transforms import LEVELS, variants

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("torch finds no CUDA GPU", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

from batch_invariant.cpu import _kernels as cpu_kernels  # noqa: E402
from batch_invariant_cuda import (  # noqa: E402
    attention,
    elementwise,
    embedding,
    norm,
    norm_long,
    reduce,
    row_launch,
    scan,
    select,
    softmax,
    softmax_long,
    softmax_short,
)

FAMILIES = (reduce, softmax, norm, scan, select, embedding, elementwise, attention)
GPU = {name: kernel for family in FAMILIES for name, kernel in family.KERNELS.items()}
CPU = cpu_kernels()
LENGTHS = (1, 3, 64, 1023, 1024, 1025, 4096, 8191, 8192, 8193, 14336, 16385, 20011, 151936)


def data(kind: str, rows: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    """Seeded rows of one kind."""
    generator = torch.Generator().manual_seed(rows * 1000003 + n)
    x = torch.randn(rows, n, generator=generator)
    if kind == "cancelling":
        scale = torch.exp2(torch.randint(-12, 13, (rows, n), generator=generator).float())
        x = x * scale
        x[:, 1::2] = -x[:, : n - n % 2 : 2] if n > 1 else x[:, 1::2]
        x[:, 0] += 1
    elif kind == "denormal":
        x = x * torch.finfo(dtype).smallest_normal / 8
    elif kind == "far":  # exponentials of all sizes, denormal ones and zeros too
        x = x * 25
    elif kind == "special":
        x[0, n // 2] = math.inf
        x[-1, n - 1] = math.nan
        if rows > 2:
            x[1, 0] = -math.inf
            x[2] = -0.0
    return x.to(dtype)


KINDS = ("normal", "cancelling", "denormal", "far", "special")

Call = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], Any]
CALLS: dict[str, tuple[str, Call]] = {
    "sum": ("sum", lambda f, x, y, w: f(x, -1)),
    "sum to fp32": ("sum", lambda f, x, y, w: f(x, -1, dtype=torch.float32)),
    "mean": ("mean", lambda f, x, y, w: f(x, -1)),
    "prod": ("prod", lambda f, x, y, w: f(x, -1)),
    "var": ("var", lambda f, x, y, w: f(x, -1)),
    "std": ("std", lambda f, x, y, w: f(x, -1, correction=0)),
    "norm": ("norm", lambda f, x, y, w: f(x, 2, -1)),
    "norm 1": ("norm", lambda f, x, y, w: f(x, 1, -1)),
    "norm 0": ("norm", lambda f, x, y, w: f(x, 0, -1)),
    "norm inf": ("norm", lambda f, x, y, w: f(x, math.inf, -1)),
    "logsumexp": ("logsumexp", lambda f, x, y, w: f(x, [-1])),
    "softmax": ("softmax", lambda f, x, y, w: f(x, -1, None)),
    "log_softmax": ("log_softmax", lambda f, x, y, w: f(x, -1, None)),
    "softmax to fp32": ("softmax", lambda f, x, y, w: f(x, -1, torch.float32)),
    "log_softmax to fp32": ("log_softmax", lambda f, x, y, w: f(x, -1, torch.float32)),
    "softmax_backward": ("softmax_backward", lambda f, x, y, w: f(x, y, -1, x.dtype)),
    "log_softmax_backward": ("log_softmax_backward", lambda f, x, y, w: f(x, y, -1, x.dtype)),
    "rms_norm": ("rms_norm", lambda f, x, y, w: f(x, w, 1e-6, None, None)),
    "rms_norm without weight": ("rms_norm", lambda f, x, y, w: f(x, None, 1e-6, None, None)),
    "rms_norm fp32 weight": ("rms_norm", lambda f, x, y, w: f(x, w.float(), 1e-6, None, None)),
    "rms_norm residual and weight": ("rms_norm", lambda f, x, y, w: f(x, w, 1e-6, y, None)),
    "rms_norm residual": ("rms_norm", lambda f, x, y, w: f(x, None, 1e-6, y, None)),
    "rms_norm partial": (
        "rms_norm",
        lambda f, x, y, w: f(x, w.float(), None, y, max(1, x.size(1) * 5 // 8)),
    ),
    "layer_norm": ("layer_norm", lambda f, x, y, w: f(x, [x.size(1)], w, w, 1e-5)),
    "cumsum": ("cumsum", lambda f, x, y, w: f(x[:, :8193], -1)),
    "argmax": ("argmax", lambda f, x, y, w: f(x, -1, False)),
    "topk": ("topk", lambda f, x, y, w: f(x, min(50, x.size(1)), -1, True, True)),
    "topk smallest": ("topk", lambda f, x, y, w: f(x, min(50, x.size(1)), -1, False, True)),
}


def tensors(out: Any) -> tuple[torch.Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def differing(name: str, call: Call, *args: torch.Tensor) -> list[str]:
    on_cpu = tensors(call(CPU[name].fn, *args))
    on_gpu = tensors(call(GPU[name].fn, *(a.cuda() for a in args)))
    found = [mismatch(a, b.cpu()) for a, b in zip(on_cpu, on_gpu, strict=True)]
    return [str(m) for m in found if m is not None]


@pytest.mark.parametrize("label", CALLS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bits_are_those_of_the_cpu(label: str, dtype: torch.dtype) -> None:
    name, call = CALLS[label]
    wrong = []
    for n in LENGTHS:
        for rows in (1, 5) if n > 8193 else (1, 5, 300):
            for kind in KINDS:
                x, y = data(kind, rows, n, dtype), data("normal", rows, n, dtype)
                w = data("normal", 1, n, dtype)[0]
                wrong += [f"{n} x {rows} {kind}: {m}" for m in differing(name, call, x, y, w)]
    assert not wrong, wrong[:8]


@pytest.mark.parametrize("label", ["sum", "var", "softmax", "log_softmax", "rms_norm", "logsumexp"])
def test_a_row_on_many_programs_has_the_bits_of_one(
    label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, call = CALLS[label]
    for n in (8193, 16384, 20011, 700_001):
        x = data("cancelling", 3, n, torch.float32).cuda()
        w = data("normal", 1, n, torch.float32)[0].cuda()
        found = []
        for split in (False, True):
            shape = row_launch.Plan(0, 1024, 1, False, row_launch.unit_of(n), 8, split)
            monkeypatch.setattr(row_launch, "plan", lambda *_, shape=shape: shape)
            for family in (reduce, softmax, norm):
                family._calls.forget()
            found.append(tensors(call(GPU[name].fn, x, x, w))[0])
        assert mismatch(*found) is None, n
    for family in (reduce, softmax, norm):
        family._calls.forget()


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that have compiled nothing, so that a test sees whether its calls take them."""
    for family in (norm, reduce, softmax):
        family._calls.forget()
    held = (norm_long.kernel, softmax_long.kernel, softmax_long.log_kernel, softmax_short.kernel)
    for kernel in (*held, reduce._long_reduce):
        monkeypatch.setattr(kernel, "_compiled", {})


def differing_of_many(label: str, dtype: torch.dtype, n: int, times: int) -> list[str]:
    """Rows of all kinds, as often as that: those for the slow parts of exp among others."""
    name, call = CALLS[label]
    x = torch.cat([data(kind, 3, n, dtype) for kind in KINDS])
    y, w = x.flip(0), data("normal", 1, n, dtype)[0]
    on_cpu = tensors(call(CPU[name].fn, x, y, w))
    many = (x.repeat(times, 1).cuda(), y.repeat(times, 1).cuda(), w.cuda())
    on_gpu = tensors(call(GPU[name].fn, *many))
    pairs = [(c, g) for c, g in zip(on_cpu, on_gpu, strict=True) if c.numel()]
    found = [mismatch(c.cuda().repeat(times, *[1] * (c.dim() - 1)), g) for c, g in pairs]
    return [f"{n}: {m}" for m in found if m is not None]


SIXTEEN_BITS = [torch.bfloat16, torch.float16]
SOFTMAXES = ["softmax", "softmax to fp32", "log_softmax", "log_softmax to fp32"]


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize(
    "label",
    [
        *SOFTMAXES,
        *("rms_norm", "rms_norm without weight", "rms_norm fp32 weight"),
        *("rms_norm residual and weight", "rms_norm partial"),
    ],
)
def test_many_long_rows_have_the_bits_of_the_cpu(label: str, dtype: torch.dtype) -> None:
    """More rows than programs, and fewer, held on chip where there is room."""
    kernel, least = norm_long.kernel, 49168
    if label in SOFTMAXES:
        log = label.startswith("log")
        kernel, least = (softmax_long.log_kernel, 49168) if log else (softmax_long.kernel, 32784)
    if label == "rms_norm residual and weight":
        least = 16400
    sizes = [(least, 1), (least, 30), (65552, 5), (73728, 10), (98304, 30), (107536, 20)]
    sizes += [(128256, 30), (151936, 4), (151936, 30), (155648, 1), (196608, 10), (262144, 20)]
    for n, times in sizes:
        kernel._compiled.clear()
        assert not differing_of_many(label, dtype, n, times), n
        assert bool(kernel._compiled) == (label != "rms_norm partial"), (n, times)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("label", [*SOFTMAXES, "rms_norm", "rms_norm residual and weight"])
def test_rows_shared_by_a_cluster_have_the_bits_of_rows_on_one_program(
    label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many that another order of additions would be seen in results of 16 bits too."""
    name, call = CALLS[label]
    x = torch.randn(768, 151936, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    args = (x.bfloat16(), x.flip(0).bfloat16(), x[0].bfloat16())
    shared = tensors(call(GPU[name].fn, *args))
    for family in (norm_long, softmax_long):
        monkeypatch.setattr(family, "launch_of", lambda *_: None)
    for family in (norm, softmax):
        family._calls.forget()
    alone = tensors(call(GPU[name].fn, *args))
    assert [mismatch(a, b) for a, b in zip(shared, alone, strict=True)] == [None] * len(alone)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("label", SOFTMAXES)
def test_short_rows_in_registers_have_the_bits_of_the_cpu(label: str, dtype: torch.dtype) -> None:
    """Few rows on many warps, and many on fewer."""
    for n in (2064, 4096, 14336):
        assert not differing_of_many(label, dtype, n, 1), n
    assert softmax_short.kernel._compiled
    softmax_short.kernel._compiled.clear()
    for n in (4112, 8208, 14336, 16384):
        assert not differing_of_many(label, dtype, n, 60), n
    assert bool(softmax_short.kernel._compiled) == ("fp32" not in label)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "label", ["rms_norm", "rms_norm residual and weight", "rms_norm partial", "layer_norm"]
)
def test_many_rows_that_are_walked_have_the_bits_of_the_cpu(label: str, dtype: torch.dtype) -> None:
    for n in (16400, 20011, 24576):
        assert not differing_of_many(label, dtype, n, 25), n


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("label", ["sum", "sum to fp32", "mean", "prod", "norm", "var"])
def test_many_long_sums_have_the_bits_of_the_cpu(label: str, dtype: torch.dtype) -> None:
    """Two segments at once, and an odd number of them."""
    for n in (131072, 139264, 151936):
        assert not differing_of_many(label, dtype, n, 25), n
    if label != "var":
        assert reduce._long_reduce._compiled


def test_another_order_is_seen() -> None:
    """The control: torch's own sum, in another order, differs on the same data."""
    x = data("cancelling", 300, 4096, torch.float32)
    assert mismatch(CPU["sum"].fn(x, -1), x.cuda().sum(-1).cpu()) is not None


@pytest.mark.parametrize("dims", [(0,), (1,), (0, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("name", ["sum", "mean", "var", "norm"])
def test_any_dimension(name: str, dims: tuple[int, ...]) -> None:
    for shape in ((2, 37, 40), (1030, 3, 48), (3, 2051, 33), (9001, 1, 64)):
        x = data("cancelling", 1, math.prod(shape), torch.float32).view(shape)
        for dtype in FLOATS:
            v = x.to(dtype)
            args = (2, dims) if name == "norm" else (dims,)
            cpu, gpu = CPU[name].fn(v, *args), GPU[name].fn(v.cuda(), *args).cpu()
            assert mismatch(cpu, gpu) is None, (shape, dtype)
            strided = v.mT
            cpu, gpu = CPU[name].fn(strided, *args), GPU[name].fn(strided.cuda().mT.mT, *args).cpu()
            assert mismatch(cpu, gpu) is None, (shape, dtype, "strided")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_group_norm_and_column_scans(dtype: torch.dtype) -> None:
    x = data("normal", 6, 12 * 1025, dtype).view(6, 12, 1025)
    w, b = data("normal", 2, 12, dtype)
    on_cpu = CPU["group_norm"].fn(x, 4, w, b, 1e-5)
    on_gpu = GPU["group_norm"].fn(x.cuda(), 4, w.cuda(), b.cuda(), 1e-5)
    for c, g in zip(on_cpu, on_gpu, strict=True):
        assert mismatch(c, g.cpu()) is None
    columns = data("cancelling", 1030, 40, dtype)
    assert mismatch(CPU["cumsum"].fn(columns, 0), GPU["cumsum"].fn(columns.cuda(), 0).cpu()) is None


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", sorted(GPU))
def test_transforms_of_the_batch(name: str, dtype: torch.dtype) -> None:
    op, kernel = CONTRACTS[name], GPU[name]

    def run(args: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        native = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in args.items()}
        for key, value in args.items():  # keeps a misaligned address misaligned
            if isinstance(value, torch.Tensor) and value.storage_offset():
                room = torch.empty(value.numel() + 1, dtype=value.dtype, device="cuda")
                native[key] = room.as_strided(value.shape, value.stride(), 1).copy_(value)
        return tuple(out.cpu() for out in op.call(kernel.fn, native))

    of_a_batch = [name for name, level in LEVELS.items() if level == kernel.guarantee.BATCH]
    for case in op.cases:
        axes, out_axes = case.batch_axes or op.batch_axes, case.out_axes or op.out_axes
        for kind in Data:
            args = draw(op, case, dtype, kind)
            base = run(args)
            for transform in of_a_batch:
                for variant in variants(op, axes, args, transform):
                    found = compare(base, run(variant.args), out_axes, variant)
                    assert found is None, (case.label, transform, variant.label, found)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", sorted(elementwise.KERNELS))
def test_elements_do_not_know_their_place(name: str, dtype: torch.dtype) -> None:
    x = (3 * torch.randn(40_003, device="cuda", generator=None)).to(dtype)
    args = (1.7,) if name == "pow" else ()
    fn = GPU[name].fn
    whole = fn(x, *args)
    for start, stop, step in (
        (0, 1, 1),
        (1, 40_003, 1),
        (3, 70, 1),
        (40_001, 40_003, 1),
        (0, 40_003, 7),
    ):
        part = slice(start, stop, step)
        assert mismatch(whole[part], fn(x[part], *args)) is None, part


def test_graph_replays_and_streams_agree() -> None:
    x = torch.randn(2, 151936, device="cuda")
    fn = GPU["softmax"].fn
    eager = fn(x, -1, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fn(x, -1, None)
    graph.replay()
    streams = [torch.cuda.Stream() for _ in range(4)]
    outs = []
    for stream in streams * 4:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            outs.append(fn(x, -1, None))
    graph.replay()
    torch.cuda.synchronize()
    for out in (captured, *outs):
        assert mismatch(eager, out) is None


def test_cumsum_down_columns_beyond_32_bits() -> None:
    n, inner = 2**15 + 5, 2**16
    x = torch.ones(n, inner, dtype=torch.bfloat16, device="cuda")
    x[:-3] = 0
    out = GPU["cumsum"].fn(x, 0)
    assert out[-4].eq(0).all()
    assert out[-1].eq(3).all()


def test_a_sum_of_more_than_32_bits_count() -> None:
    x = torch.zeros(2**31 + 16, dtype=torch.bfloat16, device="cuda")
    x[:: 2**20] = 1
    assert GPU["sum"].fn(x, dtype=torch.float32).item() == 2**11 + 1


ADDING = {
    "index_add": lambda start, index, x: start.index_add(0, index[:, 0], x),
    "index_add with alpha": lambda start, index, x: start.index_add(0, index[:, 0], x, alpha=0.3),
    "scatter_add": lambda start, index, x: start.scatter_add(0, index, x),
    "scatter_add_": lambda start, index, x: start.clone().scatter_add_(0, index, x),
}


@pytest.mark.parametrize("label", ADDING)
@pytest.mark.parametrize("width", [1, 3, 64, 1000])
def test_adding_at_places_is_the_same_from_run_to_run(label: str, width: int) -> None:
    """And a column's bits do not depend on how many columns there are."""
    generator = torch.Generator("cuda").manual_seed(5)
    x = data("cancelling", 3000, width, torch.float32).cuda()
    index = torch.randint(0, 7, (3000, 1), device="cuda", generator=generator).expand(3000, width)
    start = torch.randn(7, width, device="cuda", generator=generator)
    with bi.enabled():
        first = ADDING[label](start, index, x)
        for _ in range(20):
            assert mismatch(first, ADDING[label](start, index, x)) is None
        part = ADDING[label](start[:, :1].clone(), index[:, :1], x[:, :1].clone())
    assert mismatch(first[:, :1], part) is None
    exact = ADDING[label](start.double(), index, x.double())
    bound = 3001 * torch.finfo(torch.float32).eps * (x.abs().sum(0) + start.abs().sum(0)).double()
    assert ((first.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("name", ["amax", "amin", "max", "min"])
def test_selections_between_zeros_are_positive(name: str) -> None:
    x = torch.zeros(64, 5000, device="cuda")
    x[:, ::3] = -0.0
    with bi.enabled():
        found = getattr(torch, name)(x, 1)
        found = found if isinstance(found, torch.Tensor) else found.values
        nothing = getattr(torch, name)(-torch.zeros(4, 33, device="cuda"), 1)
        nothing = nothing if isinstance(nothing, torch.Tensor) else nothing.values
    assert not torch.signbit(found).any()
    assert not torch.signbit(nothing).any()
