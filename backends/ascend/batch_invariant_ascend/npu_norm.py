"""torch_npu's norms: the fused kernels replaced by an addition in fp32 and one norm.

The sum of input and residual is not rounded before it is normalised; it is rounded once, for the
output that carries it on. rstd is the real one. Keywords and the order of results are torch_npu's.
"""

from __future__ import annotations

import math

import torch

from batch_invariant.errors import OpNotSupported
from batch_invariant_ascend.dtypes import check_dtype
from batch_invariant_ascend.norm import rms_rows
from batch_invariant_ascend.reduce import divided
from batch_invariant_ascend.row_sum import row_sum

Tensor = torch.Tensor


def _normed(
    name: str, s: Tensor, gamma: Tensor, eps: float, like: Tensor, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """y in fp32 and rstd of fp32 s, normalised over the dimensions of gamma."""
    check_dtype(name, like, gamma)
    kept = s.dim() - gamma.dim()
    if gamma.dim() == 0 or kept < 0 or s.shape[kept:] != gamma.shape or not 1 <= s.dim() <= 8:
        raise OpNotSupported(
            f"{name}: gamma of shape {list(gamma.shape)} does not end the input's shape "
            f"{list(s.shape)}, or the input has not 1 to 8 dimensions"
        )
    n = math.prod(gamma.shape)
    rows = s.reshape(s.shape[:kept].numel(), n)
    weight = gamma.float().reshape(n)
    y, r = rms_rows(rows, weight + offset if offset else weight, eps, n)
    return y.view(s.shape), r.view(*s.shape[:kept], *(1,) * gamma.dim())


def _sum(name: str, x1: Tensor, x2: Tensor) -> Tensor:
    check_dtype(name, x1, x2)
    if x1.shape != x2.shape or x1.dtype != x2.dtype:
        raise OpNotSupported(
            f"{name}: x1 {x1.dtype}{list(x1.shape)} and x2 {x2.dtype}{list(x2.shape)} must have "
            "one shape and one dtype"
        )
    return x1.float() + x2.float()


def rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """npu_rms_norm: y, rstd."""
    y, r = _normed("npu_rms_norm", input.float(), gamma, epsilon, input)
    return y.to(input.dtype), r


def gemma_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """npu_gemma_rms_norm: the weight is 1 + gamma."""
    y, r = _normed("npu_gemma_rms_norm", input.float(), gamma, epsilon, input, 1.0)
    return y.to(input.dtype), r


def add_rms_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """npu_add_rms_norm: y, rstd, x1 + x2; out of place."""
    s = _sum("npu_add_rms_norm", x1, x2)
    y, r = _normed("npu_add_rms_norm", s, gamma, epsilon, x1)
    return y.to(x1.dtype), r, s.to(x1.dtype)


def add_rms_norm_v2(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> Tensor:
    """npu_add_rms_norm_v2: rstd; in place, x1 <- y and x2 <- x1 + x2."""
    y, r, x = add_rms_norm(x1, x2, gamma, epsilon)
    x1.copy_(y)
    x2.copy_(x)
    return r


def add_rms_norm_v2_functional(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """npu_add_rms_norm_v2_functional: rstd first, then y, x1 + x2."""
    y, r, x = add_rms_norm(x1, x2, gamma, epsilon)
    return r, y, x


def add_rms_norm_cast(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """npu_add_rms_norm_cast: y in fp32, y, rstd, x1 + x2. The fp32 y is y, widened."""
    y, r, x = add_rms_norm(x1, x2, gamma, epsilon)
    return y.float(), y, r, x


def rms_norm_backward(
    dy: Tensor, input: Tensor, gamma: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """npu_rms_norm_backward: gradients of input and gamma; that of gamma sums over the batch."""
    check_dtype("npu_rms_norm_backward", dy, input, gamma)
    n = gamma.numel()
    x, g = input.float().reshape(-1, n), dy.float().reshape(-1, n)
    r = rstd.float().reshape(-1, 1)
    normed = x * r
    weighted = g * gamma.float().reshape(1, n)
    dx = (weighted - normed * divided(row_sum(weighted * normed), n)[:, None]) * r
    dgamma = row_sum((g * normed).mT)
    return dx.to(input.dtype).view(input.shape), dgamma.to(gamma.dtype).view(gamma.shape)


OVERRIDES = {
    "npu::npu_rms_norm": rms_norm,
    "npu::npu_gemma_rms_norm": gemma_rms_norm,
    "npu::npu_add_rms_norm": add_rms_norm,
    "npu::npu_add_rms_norm_v2": add_rms_norm_v2,
    "npu::npu_add_rms_norm_v2_functional": add_rms_norm_v2_functional,
    "npu::npu_add_rms_norm_cast": add_rms_norm_cast,
    "npu::npu_rms_norm_backward": rms_norm_backward,
}
"""By the name of the operator."""
