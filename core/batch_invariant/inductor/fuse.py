"""The graph pass that puts an operator of `pairs` where its two parts stand in a row."""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass

from batch_invariant.inductor import pairs
from batch_invariant.inductor.rules import Rules


def after(given: Any, rules: Rules) -> Any:
    """The user's own passes, and then ours, as this torch takes them: several, or one."""
    several = getattr(custom_graph_pass, "get_custom_graph_passes", None)
    return Fuse(rules, given) if several is None else (*several(given), Fuse(rules))


class Fuse(CustomGraphPass):
    """Inductor's pass over a forward, backward or inference graph; `before` it runs another."""

    def __init__(self, rules: Rules, before: Any = None) -> None:
        self.rules = rules
        self.before = before

    def __call__(self, graph: torch.fx.Graph) -> None:
        if self.before is not None:
            self.before(graph)
        for node in graph.find_nodes(
            op="call_function", target=torch.ops.batch_invariant.mean.default
        ):
            operand = self._squared(node)
            if operand is None:
                continue
            square = node.args[0]
            with graph.inserting_before(node):
                target = getattr(torch.ops, pairs.NAMESPACE).mean_square.default
                fused = graph.call_function(target, (operand, *node.args[1:]))
            fused.meta = dict(node.meta)
            node.replace_all_uses_with(fused)
            graph.erase_node(node)
            graph.erase_node(square)

    def uuid(self) -> Any:
        if self.before is None:
            return repr(self.rules.identity)
        # Without a name of the other, Inductor caches nothing.
        other = self.before.uuid() if isinstance(self.before, CustomGraphPass) else None
        return repr((self.rules.identity, other)) if other else None

    def __reduce__(self) -> Any:
        return str, (str(self.uuid()),)

    def _squared(self, mean: torch.fx.Node) -> torch.fx.Node | None:
        """What is squared in fp32 and goes to this mean alone; before it was widened, if it was."""
        square = mean.args[0]
        if not isinstance(square, torch.fx.Node) or len(square.users) != 1 or mean.kwargs:
            return None
        value = square.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return None
        device = self.rules.devices.get(value.device.type)
        if device is None or "mean_square" not in device.fused:
            return None
        operand = square.args[0] if _is_square(square) else None
        if not isinstance(operand, torch.fx.Node):
            return None
        if operand.target is torch.ops.prims.convert_element_type.default:
            narrow = operand.args[0]
            assert isinstance(narrow, torch.fx.Node)
            if narrow.meta["val"].dtype in (torch.bfloat16, torch.float16):
                return narrow
        return operand if operand.meta["val"].dtype == torch.float32 else None


def _is_square(node: torch.fx.Node) -> bool:
    aten = torch.ops.aten
    if node.target is aten.mul.Tensor:
        return bool(node.args[0] is node.args[1])
    return bool(node.target is aten.pow.Tensor_Scalar and node.args[1] == 2)
