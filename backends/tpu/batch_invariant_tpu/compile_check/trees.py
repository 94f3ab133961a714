"""The order of additions in a compiled TPU program, read from the compiler's low-level dump.

Looked at after the pass that may reassociate sums. A tree starts at a `vadd.f32` whose result no
other one takes. Its leaves are named by where they come from: P a result of the matrix unit, L a
load, R a rotation of lanes, V any other value. Trees do not reach over basic blocks; what loops
add is loaded and stored, and shows as an L.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable

_LINE = re.compile(r"^(%\w+) = ([\w.]+) ?(.*)$")
_VALUE = re.compile(r"%\w+")
_ADD = "vadd.f32"


def trees(text: str) -> Counter[str]:
    """How often each shape of tree stands in a dump; operands of an addition are unordered."""
    kind: dict[str, str] = {}
    parts: dict[str, list[str]] = {}
    taken: set[str] = set()
    for line in text.splitlines():
        found = _LINE.match(line)
        if found is None:
            continue
        name, opcode, rest = found.groups()
        kind[name] = opcode
        if opcode == _ADD:
            operands = _operands(rest)
            parts[name] = operands
            taken.update(operands)
    shapes: dict[str, str] = {}
    for name, operands in parts.items():  # in SSA form operands come first
        terms = (shapes.get(operand) or _leaf(kind.get(operand, "")) for operand in operands)
        shapes[name] = f"({'+'.join(sorted(terms))})"
        if len(shapes[name]) > 400:  # a long chain by a name of its own, equal for equal chains
            shapes[name] = f"<{_short(shapes[name])}>"
    return Counter(shape for name, shape in shapes.items() if name not in taken)


def digest(found: Iterable[Counter[str]]) -> str:
    """A short name of the trees of some dumps: equal if all of them are."""
    return _short("\n".join(sorted(f"{n} {shape}" for c in found for shape, n in c.items())))


def _operands(rest: str) -> list[str]:
    """Both operands; a constant stands for itself."""
    fields = [field.strip() for field in rest.split("/*")[0].split(",")]
    names = []
    for field in fields[:2]:
        value = _VALUE.search(field)
        names.append(value.group() if value else field)
    return names


def _leaf(opcode: str) -> str:
    if opcode.startswith(("vpop.f32.mrf", "vpop.f32.mrb", "vmatres", "vpop.mr")):
        return "P"
    if opcode.startswith("vpop.permute") or "rot" in opcode:
        return "R"
    return "L" if opcode.startswith("vld") else "V"


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
