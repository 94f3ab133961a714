"""What the package says of itself agrees: versions, pins, README."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from hatchling.builders.wheel import WheelBuilder

import batch_invariant as bi
from batch_invariant.ops import CONTRACTS

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text()
PINS = dict(
    line.lower().replace("_", "-").split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if "==" in line
)


def test_one_version() -> None:
    assert PROJECT["version"] == bi.__version__


def test_every_direct_dependency_is_pinned() -> None:
    extras = [e for group in PROJECT["optional-dependencies"].values() for e in group]
    for requirement in (*PROJECT["dependencies"], *extras):
        name = re.split(r"[\[<>=]", requirement)[0].lower()
        assert name == PROJECT["name"] or name in PINS, name


def test_the_wheel_holds_core_alone() -> None:
    found = [file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()]
    assert "batch_invariant/conformance/test_operators.py" in found
    top = {path.split("/")[0] for path in found}
    assert top == {"batch_invariant", "batch_invariant_pytest.py"}


def test_the_readmes_commands_name_pinned_weights_and_existing_extras() -> None:
    commands = re.findall(r"^pip install .*$", README, re.MULTILINE)
    assert [c.split(" && ")[-1] for c in commands] == ["bi demo", "pytest"]
    for command in commands:
        (extra,) = re.findall(r'-e "\.\[(\w+)\]"', command)
        assert extra in PROJECT["optional-dependencies"]
        (pin,) = re.findall(r"--no-deps (\S+)", command)
        name, version = pin.split("==")
        assert PINS[name] == version


def test_the_readmes_operators_are_the_contracts() -> None:
    table = README.split("## Operators and backends")[1].split("\n\n")[1]
    named = set(re.findall(r"\w+", "".join(row.split("|")[1] for row in table.splitlines()[2:])))
    internal = {"softmax_backward", "log_softmax_backward"}
    assert named == (set(CONTRACTS) - internal) | {"matmul"}
