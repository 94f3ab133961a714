"""Contract of embedding: rows of a table, copied. Exact."""

from __future__ import annotations

from typing import Any

import torch

from batch_invariant.ops.contract import Case, Draw, Op
from batch_invariant.ops.variant import tokens


def embedding(input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`weight[input]`, as `torch.nn.functional.embedding`.

    input: integer indices [...], weight: [V, D]; returns [..., D]. The gradient of the weight
    adds the rows of equal indices in the order in which they stand in `input`, in fp32.
    """
    out: torch.Tensor = torch.ops.batch_invariant.embedding.default(weight, input)
    return out


def _fake(weight: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return weight.new_empty(*indices.shape, weight.size(1))


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.rows = inputs[0].size(0)


def _back(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    derivative = torch.ops.aten.embedding_dense_backward.default
    return derivative(grad, indices, ctx.rows, -1, False), None


def _args(draw: Draw, rows: int) -> dict[str, Any]:
    indices = torch.randint(0, 1000, (rows, 7), generator=draw.generator)
    return {"weight": draw.shared(1000, 64), "indices": indices}


OPS = (
    Op(
        name="embedding",
        schema="(Tensor weight, Tensor indices) -> Tensor",
        fake=_fake,
        reference=lambda weight, indices: weight[indices],
        cases=(Case("1000x64", _args),),
        batch_axes={"indices": 0},
        schedule=tokens,
        setup_context=_save,
        backward=_back,
    ),
)
