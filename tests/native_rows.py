"""The native row operations as functions on matrices, for each library that this CPU can run."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from batch_invariant.cpu import native

FOLDER = Path(native.__file__).parent / "native"
CODE = {getattr(torch, name): code for name, code in native.DTYPES.items()}
SUM, MEAN, PROD, NORM0, NORM1, NORM2, NORM_INF, NORM_NEG_INF = range(8)
SOFTMAX, LOG_SOFTMAX = range(2)
LARGEST, SMALLEST = range(2)
EXP, LOG, TANH, MINUS_LOG1M, SHORT_EXP = range(5)

Tensor = torch.Tensor
_TYPES = {"i": ctypes.c_int32, "l": ctypes.c_int64, "p": ctypes.c_void_p, "d": ctypes.c_double}
_SIGNATURES = {
    "bi_row_reduce": "iiillplpi",
    "bi_row_var": "iiillpldppi",
    "bi_row_softmax": "iiillplpli",
    "bi_row_logsumexp": "iillplpi",
    "bi_row_softmax_backward": "iiillplplpli",
    "bi_rms_norm": "iiilllplplpdplplpi",
    "bi_layer_norm": "iiillllplppdplppi",
    "bi_norm_backward": "iiilllplplplppppli",
    "bi_row_cumsum": "iillplpli",
    "bi_row_topk": "iilllplppi",
    "bi_row_argmax": "iillplpi",
    "bi_map": "ilppi",
    "bi_row_sample": "illpppppppi",
    "bi_column_reduce": "iiilllpllpi",
    "bi_column_var": "iiilllplldppi",
    "bi_column_cumsum": "iilllpllpi",
}


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _step(x: Tensor | None) -> int:
    """How far the rows of x are apart."""
    if x is None:
        return 0
    assert x.dim() == 2
    assert x.stride(1) == 1 or x.shape[1] <= 1
    return x.stride(0)


class Rows:
    """One compiled library, called with a number of threads. Matrices have unit element stride."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        self.name = path.name
        self.path = path
        self.threads = threads
        self._library = ctypes.CDLL(str(path))
        self._library.bi_init.argtypes = [ctypes.c_void_p]
        self._library.bi_init(native._gomp_parallel())
        for name, letters in _SIGNATURES.items():
            entry = getattr(self._library, name)
            entry.argtypes = [_TYPES[letter] for letter in letters]
            entry.restype = ctypes.c_int32

    def with_threads(self, threads: int) -> Rows:
        return Rows(self.path, threads)

    def call(self, name: str, *args: object) -> None:
        status = getattr(self._library, name)(*args, self.threads)
        if status:
            raise ValueError(f"{name}: {native.STATUS[status]}")

    def reduce(self, op: int, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        out = torch.empty(len(x), dtype=out_dtype or x.dtype)
        self.call(
            "bi_row_reduce",
            op,
            CODE[x.dtype],
            CODE[out.dtype],
            *x.shape,
            x.data_ptr(),
            _step(x),
            out.data_ptr(),
        )
        return out

    def var(
        self,
        x: Tensor,
        correction: float = 1,
        root: bool = False,
        out_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        out, mean = torch.empty(2, len(x), dtype=out_dtype or x.dtype)
        self.call(
            "bi_row_var",
            root,
            CODE[x.dtype],
            CODE[out.dtype],
            *x.shape,
            x.data_ptr(),
            _step(x),
            correction,
            out.data_ptr(),
            mean.data_ptr(),
        )
        return out, mean

    def softmax(self, op: int, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        out = torch.empty(x.shape, dtype=out_dtype or x.dtype)
        self.call(
            "bi_row_softmax",
            op,
            CODE[x.dtype],
            CODE[out.dtype],
            *x.shape,
            x.data_ptr(),
            _step(x),
            out.data_ptr(),
            _step(out),
        )
        return out

    def logsumexp(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        out = torch.empty(len(x), dtype=out_dtype or x.dtype)
        self.call(
            "bi_row_logsumexp",
            CODE[x.dtype],
            CODE[out.dtype],
            *x.shape,
            x.data_ptr(),
            _step(x),
            out.data_ptr(),
        )
        return out

    def softmax_backward(
        self, op: int, g: Tensor, y: Tensor, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        out = torch.empty(g.shape, dtype=out_dtype or g.dtype)
        self.call(
            "bi_row_softmax_backward",
            op,
            CODE[g.dtype],
            CODE[out.dtype],
            *g.shape,
            g.data_ptr(),
            _step(g),
            y.data_ptr(),
            _step(y),
            out.data_ptr(),
            _step(out),
        )
        return out

    def rms_norm(
        self,
        x: Tensor,
        weight: Tensor | None = None,
        eps: float = 1e-5,
        residual: Tensor | None = None,
        variance_size: int | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The result, the rounded sum with the residual, and 1/rms."""
        out = torch.empty(x.shape, dtype=out_dtype or x.dtype)
        total = None if residual is None else torch.empty(x.shape, dtype=x.dtype)
        rstd = torch.empty(len(x))
        size = x.shape[1] if variance_size is None else variance_size
        self.call(
            "bi_rms_norm",
            CODE[x.dtype],
            CODE[x.dtype if weight is None else weight.dtype],
            CODE[out.dtype],
            *x.shape,
            size,
            x.data_ptr(),
            _step(x),
            _address(residual),
            _step(residual),
            _address(weight),
            eps,
            out.data_ptr(),
            _step(out),
            _address(total),
            _step(total),
            rstd.data_ptr(),
        )
        return out, x if total is None else total, rstd

    def layer_norm(
        self,
        x: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        spatial: int = 0,
        groups: int = 0,
        out_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The result, the mean, and 1/deviation."""
        out = torch.empty(x.shape, dtype=out_dtype or x.dtype)
        mean, rstd = torch.empty(2, len(x))
        self.call(
            "bi_layer_norm",
            CODE[x.dtype],
            CODE[x.dtype if weight is None else weight.dtype],
            CODE[out.dtype],
            *x.shape,
            spatial,
            groups,
            x.data_ptr(),
            _step(x),
            _address(weight),
            _address(bias),
            eps,
            out.data_ptr(),
            _step(out),
            mean.data_ptr(),
            rstd.data_ptr(),
        )
        return out, mean, rstd

    def norm_backward(
        self,
        g: Tensor,
        x: Tensor,
        mean: Tensor | None,
        rstd: Tensor,
        weight: Tensor | None = None,
        residual: Tensor | None = None,
        variance_size: int | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        out = torch.empty(x.shape, dtype=out_dtype or x.dtype)
        size = x.shape[1] if variance_size is None else variance_size
        self.call(
            "bi_norm_backward",
            CODE[x.dtype],
            CODE[x.dtype if weight is None else weight.dtype],
            CODE[out.dtype],
            *x.shape,
            size,
            g.data_ptr(),
            _step(g),
            x.data_ptr(),
            _step(x),
            _address(residual),
            _step(residual),
            _address(mean),
            rstd.data_ptr(),
            _address(weight),
            out.data_ptr(),
            _step(out),
        )
        return out

    def cumsum(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        out = torch.empty(x.shape, dtype=out_dtype or x.dtype)
        self.call(
            "bi_row_cumsum",
            CODE[x.dtype],
            CODE[out.dtype],
            *x.shape,
            x.data_ptr(),
            _step(x),
            out.data_ptr(),
            _step(out),
        )
        return out

    def topk(self, op: int, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values = torch.empty(len(x), k, dtype=x.dtype)
        indices = torch.empty(len(x), k, dtype=torch.int64)
        self.call(
            "bi_row_topk",
            op,
            CODE[x.dtype],
            *x.shape,
            k,
            x.data_ptr(),
            _step(x),
            values.data_ptr(),
            indices.data_ptr(),
        )
        return values, indices

    def argmax(self, op: int, x: Tensor) -> Tensor:
        out = torch.empty(len(x), dtype=torch.int64)
        self.call(
            "bi_row_argmax", op, CODE[x.dtype], *x.shape, x.data_ptr(), _step(x), out.data_ptr()
        )
        return out

    def map(self, op: int, x: Tensor) -> Tensor:
        out = torch.empty(x.shape)
        self.call("bi_map", op, x.numel(), x.contiguous().data_ptr(), out.data_ptr())
        return out

    # Over the middle dimension of x [outer, n, inner], the last one at unit stride.
    def column_reduce(self, op: int, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        out = torch.empty(x.shape[0], x.shape[2], dtype=out_dtype or x.dtype)
        self.call(
            "bi_column_reduce",
            op,
            CODE[x.dtype],
            CODE[out.dtype],
            *x.shape,
            x.data_ptr(),
            *x.stride()[:2],
            out.data_ptr(),
        )
        return out

    def column_var(
        self, x: Tensor, correction: float = 1, root: bool = False
    ) -> tuple[Tensor, Tensor]:
        out, mean = torch.empty(2, x.shape[0], x.shape[2], dtype=x.dtype)
        self.call(
            "bi_column_var",
            root,
            CODE[x.dtype],
            CODE[x.dtype],
            *x.shape,
            x.data_ptr(),
            *x.stride()[:2],
            correction,
            out.data_ptr(),
            mean.data_ptr(),
        )
        return out, mean

    def column_cumsum(self, x: Tensor) -> Tensor:
        out = torch.empty(x.shape, dtype=x.dtype)
        self.call(
            "bi_column_cumsum",
            CODE[x.dtype],
            CODE[x.dtype],
            *x.shape,
            x.data_ptr(),
            *x.stride()[:2],
            out.data_ptr(),
        )
        return out


def runnable() -> list[Rows]:
    """Every compiled library that this CPU can run, the least demanding first."""
    if native.availability() is not None:
        return []
    found = [path for path in sorted(FOLDER.glob("libbi_*")) if path.suffix in (".so", ".dylib")]
    features = native.library().bi_cpu_features()
    return [Rows(path) for path in found if "v4" not in path.name or features & native._V4]


def bits(x: Tensor) -> Tensor:
    """The bits of x as integers: NaNs compare equal, zeros of both signs do not."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.contiguous().view(kind)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
