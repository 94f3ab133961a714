"""Fakes of torch_npu 2.13 and of the AscendC package: exact schemas, no numerics of any chip.

The fused kernels add something that depends on the size of the batch, so a program that reaches one
fails a comparison of bits. Those of AscendC are batch-invariant, as its makers say of theirs,
unless `broken` names them.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
import types
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch

from batch_invariant_ascend.fused_attention import RENAMED, is_given
from batch_invariant_ascend.schemas import SCHEMAS
from npu_device import npu, on_cpu, on_npu
from npu_kernels import KEY, libraries

Tensor = torch.Tensor
called: list[str] = []
"""The fakes that ran, by name."""
broken: set[str] = set()
"""Names of AscendC's fakes that are made batch-variant."""
options: dict[str, str] = {}
"""What `_npu_setOption` has set."""
formats: dict[int, int] = {}
"""Storage formats by the address of a tensor's data; absent: ND."""

_OTHERS = (
    "npu_ffn(Tensor x, Tensor weight1, Tensor weight2, str activation) -> Tensor",
    "npu_mm_all_reduce_base(Tensor x1, Tensor x2, str hcom, *, str reduce_op='sum') -> Tensor",
    "npu_prompt_flash_attention(Tensor query, Tensor key, Tensor value) -> Tensor",
    "npu_swiglu(Tensor input, int dim=-1) -> Tensor",
    "npu_transpose(Tensor input, int[] perm, bool require_contiguous=True) -> Tensor",
    "npu_of_the_future(Tensor input) -> Tensor",
)
"""Operators that are not replaced: refused by name, unclassified, measured, or harmless."""

_ASCENDC = (
    "npu_mm_batch_invariant(Tensor self, Tensor mat2) -> Tensor",
    "npu_matmul_batch_invariant(Tensor self, Tensor other) -> Tensor",
    "npu_reduce_sum_batch_invariant(Tensor self, int dim, bool keepdim=False) -> Tensor",
    "npu_log_softmax_batch_invariant(Tensor self, int dim) -> Tensor",
    *(
        schema.replace("score(", "score_batch_invariant(", 1)
        for schema in SCHEMAS
        if schema.startswith("npu_fused_infer_attention_score(")
    ),
)
"""Inferred from callers: the package's own schemas are not public."""


class _Core(types.ModuleType):
    """`torch_npu._C`, as far as it is used."""

    def _npu_getOption(self, name: str) -> bytes:
        return options.get(name, "").encode()

    def _npu_setOption(self, values: dict[str, str]) -> None:
        options.update(values)


def _varied(x: Tensor, batch: int) -> Tensor:
    return x + torch.tensor(batch % 29 / 64, dtype=x.dtype)


def _norm(x: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    dims = tuple(range(x.dim() - gamma.dim(), x.dim()))
    rstd = torch.rsqrt((x * x).mean(dims, keepdim=True) + epsilon)
    return x * rstd * gamma.float(), rstd


def _rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    y, rstd = _norm(_varied(on_cpu(x).float(), x.size(0)), on_cpu(gamma), epsilon)
    return on_npu(y.to(x.dtype)), on_npu(rstd)


def _add_rms_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    s = _varied(on_cpu(x1).float() + on_cpu(x2).float(), x1.size(0))
    y, rstd = _norm(s, on_cpu(gamma), epsilon)
    return on_npu(y.to(x1.dtype)), on_npu(rstd), on_npu(s.to(x1.dtype))


def _v2(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> Tensor:
    y, rstd, x = _add_rms_norm(x1, x2, gamma, epsilon)
    x1.copy_(y)
    x2.copy_(x)
    return rstd


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, **keywords: Any) -> Any:
    """Attention within the limits of the vendor's documentation; variant below level 3."""
    out, lse = _attention(*(on_cpu(t) for t in (query, key, value)), **keywords)
    if npu.level < 3:
        out = _varied(out, len(keywords.get("actual_seq_lengths") or query))
    return on_npu(out), on_npu(lse)


def _fused_attention_v2(query: Tensor, key: Tensor, value: Tensor, **keywords: Any) -> Any:
    return _fused_attention(
        query, key, value, **{RENAMED.get(name, name): given for name, given in keywords.items()}
    )


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_heads: int = 1,
    num_key_value_heads: int = 0,
    scale: float = 1.0,
    input_layout: str = "BSH",
    sparse_mode: int = 0,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: Sequence[int] | None = None,
    actual_seq_lengths_kv: Sequence[int] | None = None,
    softmax_lse_flag: bool = False,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """What the vendor's kernel takes of CPU tensors [B, N, S, D] and [T, N, D], and refuses."""
    contiguous = all(t.is_contiguous() for t in (query, key, value))
    half = query.dtype in (torch.bfloat16, torch.float16)
    if not contiguous or not half or key.shape != value.shape or query.size(-1) % 16:
        raise RuntimeError("AclNN_Parameter_Error(EZ1001): query, key or value")
    if given := sorted(name for name, value_ in others.items() if is_given(value_)):
        unlimited = {"pre_tokens", "next_tokens"}
        if set(given) - unlimited:
            raise AssertionError(f"the fake does not know {given}")
    if input_layout == "TND":
        ends, key_ends = [0, *actual_seq_lengths], [0, *actual_seq_lengths_kv]
        spans = zip(pairwise(ends), pairwise(key_ends), strict=True)
        parts = [
            [t.transpose(0, 1)[None] for t in (query[a:b], key[c:d], value[c:d])]
            for (a, b), (c, d) in spans
        ]
    elif input_layout == "BNSD":
        parts = [[query, key, value]]
    else:
        raise AssertionError(f"the fake does not know {input_layout}")
    outs, sums = zip(
        *(
            _one(*part, num_heads, num_key_value_heads or num_heads, scale, sparse_mode, atten_mask)
            for part in parts
        ),
        strict=True,
    )
    if input_layout == "TND":
        outs, sums = ([t[0].transpose(0, 1) for t in ts] for ts in (outs, sums))
    lse = torch.cat(sums)[..., None] if softmax_lse_flag else torch.zeros(1)
    return torch.cat(outs).contiguous(), lse.contiguous()


def _one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    kv_heads: int,
    scale: float,
    sparse_mode: int,
    atten_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if (q.size(1), k.size(1)) != (heads, kv_heads):
        raise RuntimeError("AclNN_Parameter_Error(EZ1001): num_heads, num_key_value_heads")
    keep = None if atten_mask is None else ~on_cpu(atten_mask).bool()
    if sparse_mode in (2, 3):
        if keep is None or keep.shape != (2048, 2048):
            raise RuntimeError("AclNN_Parameter_Error(EZ1001): atten_mask is not 2048 x 2048")
        length, keys = q.size(2), k.size(2)
        keep = torch.ones(length, keys, dtype=torch.bool).tril(
            keys - length if sparse_mode == 3 else 0
        )
    elif sparse_mode:
        raise AssertionError(f"the fake does not know sparse_mode={sparse_mode}")
    fn = _cpu_kernels()["scaled_dot_product_attention"].fn
    out, lse = fn(q, k, v, keep, scale=scale, enable_gqa=heads != kv_heads)
    return out.contiguous(), lse


@cache
def _cpu_kernels() -> Any:
    """Of the CPU backend, whichever a test has selected."""
    from batch_invariant.cpu import CpuBackend

    return CpuBackend().kernels()


def _swiglu(x: Tensor, dim: int = -1) -> Tensor:
    a, b = x.chunk(2, dim)
    return torch.nn.functional.silu(a) * b


_KERNELS: dict[str, Any] = {
    "npu_rms_norm": _rms_norm,
    "npu_gemma_rms_norm": lambda x, g, epsilon=1e-6: _rms_norm(x, g + 1, epsilon),
    "npu_add_rms_norm": _add_rms_norm,
    "npu_add_rms_norm_v2": _v2,
    "npu_add_rms_norm_v2_functional": lambda *a, **k: [
        _add_rms_norm(*a, **k)[i] for i in (1, 0, 2)
    ],
    "npu_format_cast": lambda x, f, **k: x.clone(),
    "npu_fused_infer_attention_score": _fused_attention,
    "npu_fused_infer_attention_score_v2": _fused_attention_v2,
    "npu_swiglu": _swiglu,
    "npu_transpose": lambda x, perm, require_contiguous=True: x.permute(perm).contiguous(),
    "get_npu_format": lambda x: formats.get(x.data_ptr(), 2),
}


def _unreachable(name: str) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"the vendor's own {name} was reached")

    return run


def _noted(name: str, fn: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        called.append(name)
        return fn(*args, **kwargs)

    return run


def install_torch_npu(version: str = "2.13.0") -> types.ModuleType:
    """`torch_npu` as an importable module, with its operators."""
    library = torch.library.Library("npu", "DEF")
    module = types.ModuleType("torch_npu")
    module.__spec__ = importlib.machinery.ModuleSpec("torch_npu", None)
    module.__version__ = version
    for schema in (*SCHEMAS, *_OTHERS):
        library.define(schema)
        name = schema.split("(")[0]
        library.impl(name, _noted(name, _KERNELS.get(name, _unreachable(name))), KEY)
        torch.library._impls.discard(f"npu/{name}/{KEY}")
    for schema in (*SCHEMAS, *_OTHERS):
        base = schema.split("(")[0].split(".")[0]
        setattr(module, base, getattr(torch.ops.npu, base))
    module.npu = npu
    module._C = _Core("torch_npu._C")
    libraries.append(library)
    sys.modules["torch_npu"] = module
    return module


def install_ascendc(own: bool = True) -> None:
    """The AscendC package; with own=False another package of that name, as there are two."""
    module = types.ModuleType("batch_invariant_ops")
    module.__spec__ = importlib.machinery.ModuleSpec("batch_invariant_ops", None)
    sys.modules["batch_invariant_ops"] = module
    if not own:
        return
    library = torch.library.Library("batch_invariant_ops", "DEF")
    for schema in _ASCENDC:
        library.define(schema)
        name = schema.split("(")[0]
        library.impl(name, _noted(name, _ascendc(name)), KEY)
    libraries.append(library)


def install_triton_ascend(config: Any) -> None:
    """The name of triton-ascend for the Triton that is installed, whose interpreter must be on."""
    import tempfile
    from pathlib import Path

    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("upstream Triton stands for triton-ascend only in its interpreter")
    folder = tempfile.TemporaryDirectory()
    config.add_cleanup(folder.cleanup)
    info = Path(folder.name, "triton_ascend-3.2.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: triton-ascend\nVersion: 3.2.0\n")
    sys.path.insert(0, folder.name)
    from batch_invariant_ascend import gemm, product, row_kernels, row_sum, softmax

    # A product of the interpreter is NumPy's, whose rows depend on their place: nothing to compare.
    for module in (product, row_sum, softmax):
        module._varies = lambda fn: None

    # The interpreter copies tensors between devices in ways that the emulated one has not.
    for module, name in (
        (gemm, "product"),
        (row_kernels, "row_sum"),
        (row_kernels, "rms_norm"),
        (row_kernels, "softmax"),
    ):
        setattr(module, name, _on_cpu(getattr(module, name)))


def _on_cpu(fn: Any) -> Any:
    def run(*args: Any) -> Any:
        out = fn(*(on_cpu(a) if isinstance(a, Tensor) else a for a in args))
        return on_npu(out) if isinstance(out, Tensor) else tuple(on_npu(o) for o in out)

    return run


def _ascendc(name: str) -> Any:
    ours = {op: kernel.fn for op, kernel in _cpu_kernels().items()}

    def compute(x: Tensor, *rest: Any) -> Tensor:
        if name == "npu_mm_batch_invariant":
            return ours["mm"](x, rest[0])
        if name == "npu_matmul_batch_invariant":
            return ours["bmm"](x, rest[0])
        if rest[0] not in (-1, x.dim() - 1):
            raise RuntimeError("AclNN_Parameter_Error(EZ1001): dim only supports the last dim")
        if name == "npu_log_softmax_batch_invariant":
            return ours["log_softmax"](x, rest[0], None)
        return ours["sum"](x, [rest[0]], bool(rest[1:] and rest[1]))

    def run(x: Tensor, *rest: Any) -> Tensor:
        other = [on_cpu(r) if isinstance(r, Tensor) else r for r in rest]
        out = compute(on_cpu(x), *other)
        return on_npu(_varied(out, x.size(0)) if name in broken else out)

    def attention(query: Tensor, key: Tensor, value: Tensor, **keywords: Any) -> Any:
        out, lse = _attention(*(on_cpu(t) for t in (query, key, value)), **keywords)
        return on_npu(_varied(out, len(query)) if name in broken else out), on_npu(lse)

    return attention if "attention" in name else run
