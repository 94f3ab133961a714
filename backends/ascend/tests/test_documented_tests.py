"""Every test that docs/ascend.md names exists, and every row of its tables names one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PAGE = (HERE.parents[2] / "docs" / "ascend.md").read_text()


def _rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading whose last column is "shown by"."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("|")]
    assert rows[0][-1].strip() == "shown by"
    return [[cell.strip() for cell in row] for row in rows[2:]]


def _functions(file: str) -> set[str]:
    found = [path for path in HERE.rglob(f"{file}.py") if "lowering" not in path.parts]
    assert len(found) == 1, f"{file}: {found}"
    nodes = ast.parse(found[0].read_text()).body
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def _missing(cell: str) -> list[str]:
    """What a cell names and is not there; a cell that names nothing at all is missing too."""
    names = re.findall(r"`([^`]+)`", cell)
    lost = [
        n for n in names if "::" not in n or n.split("::")[1] not in _functions(n.split("::")[0])
    ]
    return lost if names else [cell]


@pytest.mark.parametrize("heading", ["Against vllm-ascend", "Bad input"])
def test_every_row_names_tests_that_exist(heading: str) -> None:
    rows = _rows(heading)
    assert len(rows) > 6
    for row in rows:
        if row[-1] == "nothing":
            assert "**not " in row[-2], row
        else:
            assert not _missing(row[-1]), row


def test_a_test_that_is_not_there_would_be_found() -> None:
    assert _missing("`check_fused::test_nz_weights`, `check_fused::test_nothing`") == [
        "check_fused::test_nothing"
    ]
    assert _missing("by hand") == ["by hand"]
