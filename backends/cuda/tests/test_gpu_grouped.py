"""grouped_mm on a GPU: every row has the bits of mm with its group's matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import batch_invariant as bi
from batch_invariant.ops.contract import FLOATS, Data, Draw

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("torch finds no CUDA GPU", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

from batch_invariant_cuda import grouped  # noqa: E402
from gpu import differing  # noqa: E402

SHAPES = ((1024, 512), (2048, 1536), (8192, 160), (1031, 67), (4096, 2048), (2816, 1792))
GROUPS = 8


def operands(m: int, k: int, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    draw = Draw(dtype, Data.CANCELLING, torch.Generator().manual_seed(m + k + n))
    b = draw.shared(GROUPS * n, k).view(GROUPS, n, k)
    return draw.rows(m, k).cuda(), b.cuda().mT


def ends(m: int) -> list[list[int]]:
    """Where groups end: spread, all in one, single rows, rows behind the last."""
    generator = torch.Generator().manual_seed(m)
    drawn = torch.randint(0, m + 1, (GROUPS,), generator=generator).sort().values
    drawn[-1] = m
    ones = [min(i, m) for i in range(GROUPS - 1)] + [m]
    return [drawn.tolist(), [0] * 3 + [m] * (GROUPS - 3), ones, [m // 3] * GROUPS]


def offsets(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_have_the_bits_of_mm(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    k, n = shape
    for m in (1, 2, 5, 16, 40, 129, 700):
        a, b = operands(m, k, n, dtype)
        for weights in (b, b.contiguous()):
            for cut in ends(m):
                out = bi.grouped_mm(a, weights, offsets(cut))
                start = 0
                for group, end in enumerate(cut):
                    if start < end:
                        want = bi.mm(a[start:end], weights[group])
                        assert differing(want, out[start:end]) == 0, (m, cut, group)
                    start = end
                assert out[start:].eq(0).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_row_does_not_see_who_shares_its_group(dtype: torch.dtype) -> None:
    a, b = operands(64, 2048, 768, dtype)
    whole = bi.grouped_mm(a, b, offsets([0, 0, 64, 64, 64, 64, 64, 64]))
    for row in (0, 1, 31, 63):
        alone = bi.grouped_mm(a[row : row + 1], b, offsets([0, 0, 1, 1, 1, 1, 1, 1]))
        assert differing(alone, whole[row : row + 1]) == 0
    bad = a.clone()
    bad[1:63] = float("nan")
    changed = bi.grouped_mm(bad, b, offsets([0, 0, 64, 64, 64, 64, 64, 64]))
    assert differing(whole[[0, 63]], changed[[0, 63]]) == 0
    other = bi.grouped_mm(a, b, offsets([0, 0, 0, 64, 64, 64, 64, 64]))
    assert differing(whole, other) > 0  # the control: another expert


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_gradients_have_the_bits_of_mm(dtype: torch.dtype) -> None:
    for m in (300, 2600):
        a, b = operands(m, 1024, 640, dtype)
        cut = [0, 7, 7, m // 2, m // 2 + 1, m - 40, m - 40, m]
        grad = Draw(dtype, Data.CANCELLING, torch.Generator().manual_seed(9)).rows(m, 640).cuda()
        a, b = a.requires_grad_(), b.detach().contiguous().requires_grad_()
        ours = torch.autograd.grad(bi.grouped_mm(a, b, offsets(cut)), (a, b), grad)
        with bi.enabled():
            by_torch = torch.autograd.grad(torch._grouped_mm(a, b, offsets(cut)), (a, b), grad)
        start = 0
        for group, end in enumerate(cut):
            part = slice(start, end)
            weight = bi.mm(a[part].detach().mT, grad[part])
            for got in (ours, by_torch):
                assert differing(weight, got[1][group]) == 0, (m, group)
                if start < end:
                    rows = bi.mm(grad[part], b[group].detach().mT)
                    assert differing(rows, got[0][part]) == 0, (m, group)
            start = end


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_columns(dtype: torch.dtype) -> None:
    a, b = operands(96, 1031, 40, dtype)
    cut = [0, 20, 20, 21, 50, 50, 96, 96]
    out = bi.grouped_mm(b.mT, a.mT, offsets(cut))
    start = 0
    for group, end in enumerate(cut):
        want = bi.mm(b[group].mT, a.mT[:, start:end])
        assert differing(want, out[:, start:end]) == 0, group
        start = end


def test_fp32_has_the_bits_of_the_cpu() -> None:
    a, b = operands(50, 2100, 130, torch.float32)
    cut = torch.tensor([0, 3, 3, 20, 21, 40, 50, 50], dtype=torch.int32)
    on_cpu = bi.grouped_mm(a.cpu(), b.cpu(), cut)
    assert differing(on_cpu, bi.grouped_mm(a, b, cut.cuda()).cpu()) == 0


def test_offsets_beyond_the_rows_are_cut_and_nothing_waits() -> None:
    a, b = operands(20, 1024, 64, torch.bfloat16)
    good = bi.grouped_mm(a, b, offsets([0, 5, 5, 20, 20, 20, 20, 20]))
    torch.cuda.set_sync_debug_mode("error")
    try:
        beyond = bi.grouped_mm(a, b, offsets_on_device([0, 5, 5, 99, 99, 99, 99, 99]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert differing(good, beyond) == 0


def offsets_on_device(values: list[int]) -> torch.Tensor:
    """Without a copy that waits."""
    return torch.tensor(values, dtype=torch.int32).pin_memory().to("cuda", non_blocking=True)


def test_float64_is_refused() -> None:
    a, b = operands(4, 64, 64, torch.float32)
    with pytest.raises(bi.OpNotSupported, match="float64"):
        bi.grouped_mm(a.double(), b.double(), offsets([0, 1, 1, 1, 4, 4, 4, 4]))


def tiny(family: str, experts: str, dtype: torch.dtype) -> Any:
    transformers = pytest.importorskip("transformers", reason="the models need transformers")
    sizes = {
        **{"vocab_size": 512, "hidden_size": 256, "intermediate_size": 320},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"head_dim": 64, "num_local_experts": 6, "num_experts_per_tok": 3},
    }
    kind, config = {
        "mixtral": (transformers.MixtralForCausalLM, transformers.MixtralConfig(**sizes)),
        "gpt_oss": (transformers.GptOssForCausalLM, transformers.GptOssConfig(**sizes)),
    }[family]
    config._experts_implementation = experts
    torch.manual_seed(0)
    model = kind(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype).cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_models_give_the_same_logits_in_every_batch(
    family: str, experts: str, dtype: torch.dtype
) -> None:
    model = tiny(family, experts, dtype)
    tokens = torch.randint(0, 512, (8, 21), generator=torch.Generator().manual_seed(2)).cuda()

    def logits(size: int) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([model(tokens[i : i + size]).logits for i in range(0, 8, size)])

    with bi.enabled():
        alone = logits(1)
        for size in (2, 3, 8):
            assert differing(alone, logits(size)) == 0, size


def test_tiles_change_no_bit() -> None:
    from batch_invariant_cuda.chunks import chunk_of
    from batch_invariant_cuda.schedules import parse

    a, b = operands(100, 2048, 512, torch.bfloat16)
    cut = offsets([0, 9, 9, 40, 41, 80, 100, 100])
    chunk = chunk_of(2048, 512, torch.bfloat16)
    texts = ("tile 16x32x128 w4 s5", "tile 64x64x64 w4 s4", "tile 128x128x64 w8 s3")
    found = [grouped.by_rows(a, b, cut, parse(text), chunk, "ieee") for text in texts]
    assert all(differing(found[0], other) == 0 for other in found[1:])
