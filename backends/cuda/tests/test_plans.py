"""What is decided before a launch, on CPU tensors and made-up shapes: keys, plans and refusals."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install 'batch-invariant-cuda[runtime]'")

from batch_invariant.errors import ConfigurationError
from batch_invariant_cuda import (
    attention,
    choice,
    cluster,
    gemm,
    gemm_double,
    gemm_hopper,
    gemm_single,
    matmul,
    norm_long,
    problem,
    row_launch,
    row_ring,
    rows,
    softmax,
    softmax_long,
)
from batch_invariant_cuda.chunks import DEPTHS, chunk_of, chunks_by_depth
from batch_invariant_cuda.schedules import parse, read

BF16 = torch.bfloat16


def test_a_plan_belongs_to_the_alignment_of_each_operand():
    """A kernel is compiled for the pointers that are aligned: which one it is matters."""
    even, odd = torch.zeros(4, 4), torch.zeros(17)[1:].view(4, 4)
    assert even.data_ptr() % 16 == 0
    assert odd.data_ptr() % 16
    pairs = [(a, b) for a in (even, odd) for b in (even, odd)]
    assert len({matmul._key("mm", a, b) for a, b in pairs}) == 4
    assert len({matmul._key_of(x, 1, 1) for x in (even, odd)}) == 2


def test_tf32_is_part_of_the_plan_and_only_when_asked():
    """Every switch of torch's; bf16 does not care."""
    x, low = torch.zeros(4, 4), torch.zeros(4, 4).to(BF16)
    asked = []
    before = torch.get_float32_matmul_precision()
    plain, other = matmul._key("mm", x, x), matmul._key("mm", low, low)
    assert not matmul.problem(x, x, None, False).tf32
    assert "serial" in str(matmul.KERNELS["mm"].order_of(torch.float32))
    try:
        torch.set_float32_matmul_precision("high")
        asked.append(matmul._key("mm", x, x))
        assert matmul.problem(x, x, None, False).tf32
        assert not matmul.problem(low, low, None, False).tf32
        assert "TF32" in str(matmul.KERNELS["mm"].order_of(torch.float32))
        assert matmul._key("mm", low, low) == other
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.allow_tf32 = True
        asked.append(matmul._key("mm", x, x))
        torch.backends.cuda.matmul.allow_tf32 = False
    finally:
        torch.set_float32_matmul_precision(before)
    assert len({*asked, plain}) == 2
    assert matmul._key("mm", x, x) == plain


def test_tf32_is_computed_by_tiles_alone(monkeypatch):
    monkeypatch.setattr(matmul, "capability", lambda device: (9, 0))
    gpu = torch.device("cuda", 0)
    for m, n in ((1, 64), (64, 64), (8192, 8192)):
        p = problem.Problem(
            dtype=torch.float32, batch=1, m=m, n=n, k=4096, a=(0, 4096, 1), b=(0, 1, 4096),
            addend=None, scaled=False, chunk=0, aligned=True, tf32=True,
        )  # fmt: skip
        assert p.refuses(matmul.schedule_for(p, gpu)) is None
        assert "TF32" in str(p.refuses(parse("fma 64x64x32 w4 s6")))


def test_no_kernel_is_compiled_anew_for_another_number_of_rows():
    kernels = (
        *(gemm.gemm_tile, gemm.gemm_tma, gemm.gemm_tma_chunked, gemm.gemm_fold),
        *(gemm_hopper.gemm_ring, gemm_single.gemm_fma, gemm_double.gemm_double),
    )
    for kernel in kernels:
        (rows,) = [param for param in kernel.params if param.name == "M"]
        assert rows.do_not_specialize, kernel
    assert not gemm.gemm_tile.params[7].do_not_specialize, "N: its alignment widens the stores"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("tma 64x64x64 w4 s4 split apart", "only 'ring' and 'fma'"),
        ("tile 64x64x64 w4 s4 c2", "only 'ring' and 'fma'"),
        ("ring 64x64x64 w4 s4 apart", "only split chunks"),
        ("ring 64x64x64 w4 s4 swap", "takes only split"),
        ("fma 64x64x64 w4 s4 c7", "1 to 4 programs"),
        ("fma 4x64x64 w4 s4", "8 rows"),
        ("tile 8x64x64 w4 s4", "16"),
        ("fma 64x64+32x64 w4 s4", "one width"),
    ],
)
def test_schedules_that_mean_nothing(text, reason):
    with pytest.raises(ConfigurationError, match=reason):
        parse(text)


def test_schedules_are_what_they_print():
    for text in ("ring 64x64x64 w4 s4 hybrid apart g4 c2", "fma 8x64x32 w4 s5 split ahead c4"):
        assert str(parse(text)) == text
        assert parse(str(parse(text))) == parse(text)


def test_the_rule_for_fp32_names_schedules_that_can_run():
    for m in (1, 8, 9, 32, 33, 64, 300, 5000):
        for n in (64, 1280, 4096, 151936):
            for k in (512, 8192):
                for aligned in (True, False):
                    p = problem.Problem(
                        dtype=torch.float32, batch=1, m=m, n=n, k=k, a=(0, k, 1), b=(0, 1, k),
                        addend=None, scaled=False, chunk=chunk_of(k, n, torch.float32),
                        aligned=aligned,
                    )  # fmt: skip
                    s = choice.default(m, n, k, p.dtype, bulk=p.bulk(), chunk=p.chunk, programs=132)
                    assert p.refuses(s) is None, (m, n, k, str(s))


@pytest.mark.parametrize(
    ("n", "unit"), [(16, 16), (17, 1), (2**31 - 16, 16), (2**31, 1), (2**32, 1)]
)
def test_lengths_beyond_32_bits_arrive_whole(n, unit):
    assert row_launch.unit_of(n) == unit
    assert row_launch.plan(1, n, 132, True).unit == unit
    assert n // unit * unit == n
    assert n // unit < 2**31 or unit == 1


def huge(m: int, n: int, k: int = 64) -> problem.Problem:
    return problem.Problem(
        dtype=BF16, batch=1, m=m, n=n, k=k, a=(0, k, 1), b=(0, 1, k),
        addend=None, scaled=False, chunk=0, aligned=True,
    )  # fmt: skip


def test_swapped_bulk_copies_refuse_results_beyond_32_bits():
    swapped = parse("tma 32x64x128 w4 s6 swap")
    assert huge(64, 4096).refuses(swapped) is None
    assert "32 bits" in str(huge(32_000, 70_000).refuses(swapped))
    assert huge(32_000, 70_000).refuses(parse("ring 128x128x64 w8 s6")) is None


def test_a_tables_last_line_does_not_serve_what_it_cannot_compute(monkeypatch):
    table = read({"entries": {"bfloat16": {"64x70000": [[64, "tma 32x64x128 w4 s6 swap"]]}}}, "t")
    monkeypatch.setattr(matmul, "table_for", lambda capability: table)
    monkeypatch.setattr(matmul, "capability", lambda device: (9, 0))
    monkeypatch.setattr(matmul, "programs", lambda device: 132)
    gpu = torch.device("cuda", 0)
    assert matmul.schedule_for(huge(64, 70_000), gpu).swap
    chosen = matmul.schedule_for(huge(32_000, 70_000), gpu)
    assert not chosen.swap
    assert chosen == choice.default(32_000, 70_000, 64, BF16, bulk=True, chunk=0, programs=132)


def test_tensors_of_two_devices_are_refused_before_a_launch():
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args: launched.append(args)

    class Elsewhere:
        device = torch.device("cuda", 1)

        def get_device(self) -> int:
            return 1

    kernel = row_launch.RowKernel(Kernel())
    kernel(1, (torch.zeros(1), None, torch.zeros(1)), (), (), 1)
    assert len(launched) == 1
    with pytest.raises(RuntimeError, match="one device, found cpu and cuda:1"):
        kernel(1, (torch.zeros(1), None, Elsewhere()), (), (), 1)  # type: ignore[arg-type]
    assert len(launched) == 1


def test_attention_says_beforehand_what_it_refuses():
    kernel = attention.KERNELS["scaled_dot_product_attention"]
    x = torch.zeros(1, 1, 2, 257)
    assert kernel.supports is not None
    assert "up to 256; got 257" in str(kernel.supports(x, x, x, None, 0.0, False, scale=None))
    assert "float64" in str(kernel.supports(*[x[..., :8].double()] * 3))
    assert kernel.supports(*[x[..., :256]] * 3, attn_mask=None) is None


@pytest.mark.parametrize("name", ["softmax_backward", "log_softmax_backward"])
def test_derivatives_refuse_arguments_that_do_not_fit(name):
    x = torch.zeros(3, 8)
    for g, y in ((torch.zeros(3, 9), x), (x[None], x), (x.half(), x), (x, torch.zeros(3, 9))):
        with pytest.raises(RuntimeError, match="softmax_backward"):
            softmax.KERNELS[name].fn(g, y, -1, torch.float32)


def test_an_input_that_must_be_copied_makes_one_plan(monkeypatch):
    made = []

    class Plan:
        def __init__(self, p, s, a, b, addend, programs, shape):
            made.append(a.shape)
            self.shape = shape

        def __call__(self, a, b, addend, alpha, beta):
            return a.new_zeros(self.shape)

    class Nothing:
        def __init__(self, device):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(matmul, "Plan", Plan)
    monkeypatch.setattr(matmul, "schedule_for", lambda p, device: None)
    monkeypatch.setattr(matmul, "programs", lambda device: 1)
    monkeypatch.setattr(torch.cuda, "device", Nothing)
    matmul.forget()
    x = torch.zeros(2, 64, 3, 8).transpose(1, 2)
    try:
        for _ in range(3):
            out = matmul.KERNELS["linear"].fn(x, torch.zeros(5, 8), torch.zeros(5))
            assert out.shape == (2, 3, 64, 5)
        assert len(made) == 1
        assert len(matmul._plans) == 1
    finally:
        matmul.forget()


def test_a_kernel_that_learns_k_on_the_device_has_the_same_chunks():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for n in (64, 1536, 1537, 14336):
            few, some, many = chunks_by_depth(n, dtype)
            for k in (1, 512, 2047, 2048, 2049, 8191, 8192, 8193, 65536):
                want = few if k < DEPTHS[0] else some if k < DEPTHS[1] else many
                assert chunk_of(k, n, dtype) == want, (k, n, dtype)


def test_attention_keeps_to_one_tile_where_the_matrix_units_are_unknown(monkeypatch):
    gpu = torch.device("cuda", 0)
    found = {}
    for capability in ((9, 0), (8, 0), (10, 0)):
        monkeypatch.setattr(attention, "capability", lambda device, at=capability: at)
        for widest in (64, 128, 256):
            tiles = {
                attention.tile(rows, keys, widest, gpu)
                for rows in (1, 16, 17, 64, 65, 4096)
                for keys in (1, 512, 513, 100_000)
            }
            found[capability, widest] = len(tiles)
    assert all((count == 1) == (at != (9, 0)) for (at, _), count in found.items())


@pytest.mark.parametrize(
    ("tiles", "size", "blocks", "alone"),
    [
        *((64, 128, 256, True), (64, 128, 16, True), (64, 128, 15, False), (80, 128, 4, True)),
        *((55, 128, 256, False), (64, 64, 256, False), (80, 64, 4, True), (132, 64, 2, True)),
        *((133, 128, 256, False), (132, 128, 1, False), (1, 128, 1000, False)),
    ],
)
def test_tiles_that_go_alone(tiles, size, blocks, alone):
    """On 132 multiprocessors; which way they go changes no bit."""
    assert attention.goes_alone(tiles, size, blocks, 132) is alone


def test_no_more_clusters_are_launched_than_a_gpu_runs_at_a_time(monkeypatch):
    """A launch of none would leave the results as they are, without an error."""
    fits = {"some": 15, "none": 0}
    tools = SimpleNamespace(cuOccupancyMaxActiveClusters=lambda name, shared, size: fits[name])
    driver = SimpleNamespace(active=SimpleNamespace(utils=tools))
    monkeypatch.setattr(row_launch.triton.runtime, "driver", driver)

    def made(name):
        about = SimpleNamespace(shared=1 << 17)
        return type("Made", (), {"_init_handles": int, "function": name, "metadata": about})

    def kernel():
        """A kernel without a GPU."""

    shared = row_launch.RowKernel(kernel, cluster=8)
    assert [shared._at_a_time(made("some"), programs) for programs in (1, 15, 1024)] == [1, 15, 15]
    with pytest.raises(RuntimeError, match="kernel needs clusters of 8 programs"):
        shared._at_a_time(made("none"), 1024)
    assert row_launch.RowKernel(kernel)._at_a_time(made("none"), 1024) == 1024


@pytest.mark.parametrize("n", range(16400, 262145, 16384))
def test_rings_of_long_rows_are_long_enough_and_not_too_long(n):
    """Longer than a row; and what is told of a row stays until all have heard of it."""
    slots, tiles = row_ring.slots_of(n)
    assert ((slots - 1) * row_ring.TILES + tiles - 1) * rows.LANES < n
    assert n <= ((slots - 1) * row_ring.TILES + tiles) * rows.LANES
    rings = [norm_long.held(n, True, True, True)[-1:]]
    if n > softmax_long._LEAST:
        *_, ring, kept = softmax_long.held(False, n)
        assert kept >= slots
        rings.append((ring, kept, 2))  # each group of adders has one in registers
    if n > softmax_long._LOG_LEAST:
        rings += softmax_long.held(True, n)[-1:], norm_long.held(n, True, True, False)[-1:]
    for ring, *others in rings:
        assert ring > slots
        assert ring + sum(others) < (cluster.TOLD + 1) * slots
