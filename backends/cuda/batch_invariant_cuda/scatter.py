"""index_add and scatter_add on CUDA: through index_put, which sorts by place before it adds.

Torch's own kernels add with atomics: what meets in one place is added in the order of timing. After
a sort the order is the same from run to run. It need not be the order of the index.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from batch_invariant.stock import stock


def overrides(key: str = "CUDA") -> dict[str, Callable[..., Any]]:
    """The aten overloads by name; each callable takes the keyset first."""
    put = stock("_index_put_impl_", key)
    found: dict[str, Callable[..., Any]] = {}
    for name, write in (("index_add", _index_add), ("scatter_add", _scatter_add)):
        found |= _variants(name, put, write)
    return found


_Put = Callable[..., Any]


def _index_add(
    put: _Put,
    out: torch.Tensor,
    dim: int,
    index: torch.Tensor,
    source: torch.Tensor,
    *,
    alpha: Any = 1,
) -> None:
    """As scatter_add: with an index for every element there is one order for slices of any size."""
    if out.dim() == 0:
        out, dim = out.view(1), 0
    dim %= out.dim()
    if source.dim() == 0:
        source = source.reshape([1] * out.dim())
    along = index.reshape([-1 if d == dim else 1 for d in range(out.dim())])
    values = source if alpha == 1 else source * alpha
    _scatter_add(put, out, dim, along.expand(source.shape), values)


def _scatter_add(
    put: _Put, out: torch.Tensor, dim: int, index: torch.Tensor, src: torch.Tensor
) -> None:
    if index.numel() == 0:
        return
    if out.dim() == 0:
        out, dim = out.view(1), 0
    if index.dim() == 0:
        index = index.view(1)
    if src.dim() == 0:
        src = src.view(1)
    dim %= out.dim()
    # What index_put would read back to the CPU to check; it would also count -1 from the end.
    torch._assert_async(
        ((index >= 0) & (index < out.size(dim))).all(),
        f"an index is out of bounds for dimension {dim} with size {out.size(dim)}",
    )
    places = []
    for d, size in enumerate(index.shape):
        along = torch.arange(size, device=out.device)
        places.append(along.view([-1 if i == d else 1 for i in range(index.dim())]))
    places[dim] = index.long()
    values = src[tuple(slice(size) for size in index.shape)]
    put(out, places, values, True, True)


def _variants(name: str, put: _Put, write: Callable[..., None]) -> dict[str, Callable[..., Any]]:
    """The functional, in-place and out= overloads, after torch's own checks of the arguments."""
    check = stock(name, "Meta")

    def checked(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        there = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in (self, *args)]
        check(*there, **kwargs)

    def functional(_keyset: Any, self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        checked(self, *args, **kwargs)
        out = self.clone()
        write(put, out, *args, **kwargs)
        return out

    def in_place(_keyset: Any, self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        checked(self, *args, **kwargs)
        write(put, self, *args, **kwargs)
        return self

    def into(
        _keyset: Any, self: torch.Tensor, *args: Any, out: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        out.resize_(self.shape)
        out.copy_(functional(_keyset, self, *args, **kwargs))
        return out

    return {name: functional, f"{name}_": in_place, f"{name}.out": into}
