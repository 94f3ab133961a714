"""`bi tune`: what it asks a backend's tuner for, what it writes, its errors and exit codes.

The tuner here is made up: it measures nothing. That of a vendor is tested with its package.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from batch_invariant.cli import main
from plugin_source import PLUGIN, Install

TUNER = (
    PLUGIN
    + """
        def tuner(self):
            from batch_invariant.errors import ConfigurationError

            class Tuner:
                dtypes = ("bfloat16", "float32")

                def tune(self, shapes, dtypes, step):
                    for k, n in shapes:
                        step(f"{{k}}x{{n}} measured")
                    return {{"entries": {{d: [list(s) for s in shapes] for d in dtypes}}}}

                def refused(self, data, source):
                    if "entries" not in data:
                        raise ConfigurationError(f"{{source}}: expected an object with 'entries'")
                    return [f"{{name}}: differs" for name in data["entries"] if name == "bad"]

            return Tuner()
"""
)


@pytest.fixture
def mine(install: Install) -> str:
    install(TUNER.format(name="mine"), name="mine")
    return "mine"


def test_a_table_is_written(mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "table.json"
    words = ["tune", "--backend", mine, "4096x6144", "8x16", "--out", str(out)]
    assert main(words) == 0
    assert json.loads(out.read_text()) == {"entries": {"bfloat16": [[4096, 6144], [8, 16]]}}
    printed = capsys.readouterr()
    assert "4096x6144 measured" in printed.err
    assert f"--check {out}" in printed.out
    assert main([*words, "--dtype", "float32", "--dtype", "bfloat16"]) == 0
    assert list(json.loads(out.read_text())["entries"]) == ["float32", "bfloat16"]


def test_a_table_is_checked(mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table.json"
    for name, code, words in (("good", 0, "every line holds"), ("bad", 1, "refused: bad: differs")):
        path.write_text(json.dumps({"entries": {name: []}}))
        assert main(["tune", "--backend", mine, "--check", str(path)]) == code
        assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "give products to tune"),
        (["8x8", "--check", "x.json"], "give products to tune"),
        (["--check", "x.json", "--out", "y.json"], "--check writes nothing"),
        (["--check", "x.json", "--dtype", "float32"], "--check writes nothing"),
        (["--check", "missing.json"], "missing.json: No such file"),
        (["--check", "text.json"], "text.json: no JSON"),
        (["--check", "other.json"], "other.json: expected an object with 'entries'"),
        (["8x8", "--dtype", "int8"], "--dtype int8: there are schedules for bfloat16, float32"),
        (["8x8", "--out", "missing/table.json"], "no file can be written there"),
        (["8x8", "--out", "."], "no file can be written there"),
    ],
)
def test_what_means_nothing_is_a_usage_error(
    mine: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.json").write_text("{")
    Path("other.json").write_text("{}")
    assert main(["tune", "--backend", mine, *words]) == 2
    assert reason in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["other.json", "text.json"]


@pytest.mark.parametrize("shape", ["4096", "4096x", "0x8", "8x0", "-1x8", "axb", "8x8x8"])
def test_what_is_no_shape(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["tune", "--", shape])
    assert stopped.value.code == 2
    assert "is no shape KxN" in capsys.readouterr().err


def test_backends_without_schedules(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--backend", "cpu", "8x8"]) == 2
    assert "the backend 'cpu' has no schedules to tune" in capsys.readouterr().err
    assert main(["tune", "--backend", "nobody", "8x8"]) == 2
    assert "unknown backend 'nobody'" in capsys.readouterr().err


def test_a_backend_that_cannot_run_here(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    away = TUNER.format(name="away").replace(
        "Availability(True)", "Availability(False, 'no chip found', 'plug one in')"
    )
    install(away, name="away")
    assert main(["tune", "--backend", "away", "8x8"]) == 1
    assert "no chip found; plug one in" in capsys.readouterr().err
