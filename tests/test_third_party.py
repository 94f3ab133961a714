"""A backend of somebody else: installed into an environment of its own, certified, then broken.

`sample_backend` is a distribution as a vendor would write it. Its certification takes most of a
minute on one core, so it runs beside the broken copies and is looked at last.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import batch_invariant as bi
from batch_invariant.ops import CONTRACTS

SAMPLE = Path(__file__).parent / "sample_backend"
PACKAGE = "batch_invariant_sample"
SUITE = ("-m", "pytest", "-p", "no:cacheprovider", "--pyargs", "batch_invariant.conformance")


@dataclass(frozen=True)
class Venv:
    """A virtual environment with the sample installed; the rest is that of the running tests."""

    python: Path
    environment: Mapping[str, str]

    def start(self, *words: str, first: Path | None = None) -> subprocess.Popen[str]:
        """Starts Python there; `first` comes before everything that is installed."""
        extra = {"PYTHONPATH": str(first)} if first else {}
        return subprocess.Popen(
            [str(self.python), *words],
            env={**self.environment, **extra},
            cwd=self.python.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: str, first: Path | None = None) -> tuple[int, str]:
        """The exit code, and everything that was printed."""
        process = self.start(*words, first=first)
        text, _ = process.communicate(timeout=300)
        return process.returncode, text

    def suite(self, *words: str, first: Path | None = None) -> tuple[int, str]:
        """The conformance suite over the sample, or over a broken copy of it."""
        return self.run(*SUITE, "--bi-backend=sample", *words, first=first)


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Venv:
    """Installed by pip from the source, as a user would; nothing is fetched."""
    folder = tmp_path_factory.mktemp("third_party")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    library = subprocess.check_output(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    # torch, core and the build backend come from here; core may be an editable install, which is a
    # .pth file of its own, so the folder is added as a site folder.
    places = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    lines = [f"import site; site.addsitedir({place!r})\n" for place in sorted(places)]
    (Path(library) / "outer.pth").write_text("".join(lines))
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST_", "PIP_"))},
        "XDG_CACHE_HOME": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }
    source = shutil.copytree(SAMPLE, folder / "source", ignore=_caches)
    made = Venv(python, environment)
    options = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    code, text = made.run("-m", "pip", "install", *options, str(source))
    assert code == 0, text
    assert (Path(library) / PACKAGE / "__init__.py").is_file()
    return made


@dataclass
class Certification:
    """The whole suite over the sample, running."""

    process: subprocess.Popen[str]
    report: Path
    text: str = ""


@pytest.fixture(scope="module", autouse=True)
def certification(venv: Venv, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Certification]:
    report = tmp_path_factory.mktemp("report") / "sample.json"
    words = ("--bi-backend=sample", f"--bi-report={report}", "-q", "-rfEsxX")
    process = venv.start(*SUITE, *words)
    yield Certification(process, report)
    if process.poll() is None:
        process.kill()
        process.communicate()


def _caches(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if name == "__pycache__"}


@dataclass(frozen=True)
class Break:
    """A copy of the sample with one mistake, and what the suite must say of it.

    patch: file, what stands there, what is put in its place. words: which part of the suite is
        run. code: 4 where the backend cannot be used at all, 1 where checks fail.
    """

    patch: tuple[str, str, str]
    code: int
    message: str
    words: tuple[str, ...] = field(default=())


def _only(op: str, dtype: str, check: str) -> tuple[str, ...]:
    return (f"--bi-op={op}", "-k", f"{dtype} and {check}")


_INIT = "__init__.py"
_SWITCHED = "        self._switch_before = os.environ.get(SWITCH)\n"
_UNDONE = "            os.environ.pop(SWITCH, None)\n"
_LONG = "rows of more than 8192 elements are not written yet"
_LONE = "rows of one element are not written yet"
_ONLY_LONG = f'    if self.size(-1) == 1:\n        raise OpNotSupported("{_LONE}")\n'

BREAKS = {
    "wrong signature of a method": Break(
        (_INIT, "def probe(self)", "def probe(self, device)"),
        4,
        r"the backend 'sample' of batch-invariant-sample 0\.1\.0 defines probe\(self, device\); "
        r"expected probe\(self\)",
    ),
    "wrong signature of a kernel": Break(
        ("matmul.py", "def _mm(self: torch.Tensor, mat2", "def _mm(self: torch.Tensor, *, mat2"),
        1,
        r"mm float32 kernel: \[1024x512\] self \[3, 1024\], mat2 \[1024, 512\] is supported, and "
        r"raises TypeError: _mm\(\) takes 1 positional argument but 2 were given",
        _only("mm", "float32", "kernel"),
    ),
    "wrong api_version": Break(
        (_INIT, "= API_VERSION", "= API_VERSION + 1"),
        4,
        r"'sample' of batch-invariant-sample 0\.1\.0 is written for api_version 2, and this "
        r"batch-invariant has 1; install matching versions",
    ),
    "import error": Break(
        (_INIT, "import torch\n", "import no_such_sdk\nimport torch\n"),
        4,
        r"'sample' of batch-invariant-sample 0\.1\.0 does not import: ModuleNotFoundError: "
        r"No module named 'no_such_sdk'",
    ),
    "import error of the kernels": Break(
        ("norm.py", "import torch\n", "import no_such_sdk\nimport torch\n"),
        4,
        r"kernels\(\) of the backend 'sample' \(batch-invariant-sample 0\.1\.0\) raised "
        r"ModuleNotFoundError: No module named 'no_such_sdk'",
    ),
    "variant kernel": Break(
        ("reduce.py", "lane_sum(rows)", "lane_sum(rows if len(rows) < 16 else rows.flip(1))"),
        1,
        r"sum float32 T1 population: \[4099 cancelling\] self \[64, 4099\] against self "
        r"\[1, 4099\] \(1 of 64 rows\): row 31 changed in 1 of 1 values, the first at \[0\], "
        r"max \|diff\| 0\.125",
        _only("sum", "float32", "population"),
    ),
    "mutated input": Break(
        ("softmax.py", "rows - rows.amax(1, keepdim=True)", "rows.sub_(rows.amax(1, True))"),
        1,
        r"softmax float32 result: \[1024\] the argument self was changed by the call in: 3072 of "
        r"3072 values",
        _only("softmax", "float32", "result"),
    ),
    "wrong output dtype": Break(
        ("reduce.py", "dtype or self.dtype", "dtype or torch.float32"),
        1,
        r"mean bfloat16 result: \[1024\] output 0 of self \[3, 1024\] is: torch\.float32\[3\], and "
        r"the contract says torch\.bfloat16\[3\]",
        _only("mean", "bfloat16", "result"),
    ),
    "NaN leak between rows": Break(
        ("norm.py", " / root  #", " / root + 0 * root.sum()  #"),
        1,
        r"rms_norm float32 T3 neighbours: \[576 weight normal\] .* \(nan\): row 0 changed in "
        r"2880 of 2880 values, the first at \[0, 0\], max \|diff\| inf",
        _only("rms_norm", "float32", "neighbours"),
    ),
    "a variable that is not restored": Break(
        (_INIT, _UNDONE, "            pass\n"),
        1,
        r"restoration: os\.environ\['BATCH_INVARIANT_SAMPLE'\] was absent and is '1' after "
        r"the backend was loaded, used and deselected",
        ("-k", "restoration or (embedding and float32 and result)"),
    ),
    "a function that is not restored": Break(
        (_INIT, _SWITCHED, _SWITCHED + "        torch.nn.functional.silu = torch.sigmoid\n"),
        1,
        r"restoration: torch\.nn\.functional\.silu was <function silu .* and is <built-in method "
        r"sigmoid",
        ("-k", "restoration"),
    ),
    "a variable that importing sets": Break(
        (_INIT, "\n\nclass Sample", '\nos.environ["OTHER"] = "1"\n\n\nclass Sample'),
        1,
        r"restoration: os\.environ\['OTHER'\] was absent and is '1' after",
        ("-k", "restoration"),
    ),
    "supports says yes to what raises": Break(
        (
            "reduce.py",
            "    dims = normalize",
            f'    if self.size(-1) > 8192:\n        raise OpNotSupported("{_LONG}")\n'
            "    dims = normalize",
        ),
        1,
        rf"sum float32 kernel: \[20011\] self \[3, 20011\] is supported, and raises "
        rf"OpNotSupported: {_LONG}",
        _only("sum", "float32", "kernel"),
    ),
    "supports says no to what works": Break(
        (
            "reduce.py",
            "supports=_supports",
            f'supports=lambda x, *_, **__: "{_LONG}" if x.size(-1) > 8192 else None',
        ),
        1,
        rf"sum float32 kernel: \[20011\] supports says '{_LONG}' of self \[3, 20011\], and the "
        r"call goes through",
        _only("sum", "float32", "kernel"),
    ),
    "supports says yes at a size that no case has": Break(
        ("reduce.py", "    dims = normalize", _ONLY_LONG + "    dims = normalize"),
        1,
        rf"sum float32 kernel: \[1\] self \[3, 1\] is supported, and raises "
        rf"OpNotSupported: {_LONE}",
        _only("sum", "float32", "kernel"),
    ),
    "a kernel that leaves a switch set": Break(
        ("elementwise.py", "    check_dtype", "    torch.set_num_threads(2)\n    check_dtype"),
        1,
        r"exp float32 kernel: the calls changed: torch\.get_num_threads\(\) was 1 and is 2",
        _only("exp", "float32", "kernel"),
    ),
    "a kernel that the mode refuses": Break(
        ("norm.py", 'stock("sqrt")', "torch.sqrt"),
        1,
        r"rms_norm float32 dispatch: .* with the mode on, the registered operator at .*: "
        r"UncoveredOpError: aten::sqrt\(float64\[3\]\) has no batch-invariant kernel",
        _only("rms_norm", "float32", "dispatch"),
    ),
    "an order that is not kept": Break(
        ("matmul.py", "order=serial()", "order=fused(4)"),
        1,
        r"mm float32 order: the declared order of 1100 additions is: fused\(4\), and "
        r"serial.* is measured",
        _only("mm", "float32", "order"),
    ),
    "an order in words": Break(
        ("matmul.py", "order=serial()", 'order="serial"'),
        4,
        r"kernels\(\) of the backend 'sample' .* raised TypeError: the order of a kernel is an "
        r"Order of batch_invariant\.order, such as serial\(\).*; got 'serial'",
    ),
    "a device that is not there": Break(
        (_INIT, "return Availability(True)", 'return Availability(False, "no device", "plug it")'),
        4,
        r"backend 'sample' is not available: no device; plug it",
    ),
    "a gap that is closed": Break(
        (_INIT, "for op in missing),", 'for op in [*missing, "exp"]),'),
        1,
        r"exp float32 kernel holds, although a gap is declared \(not written: .*; remove the gap",
        _only("exp", "float32", "kernel"),
    ),
    "a gap without a reason": Break(
        (_INIT, '"float16 has not been tried yet"', '""'),
        4,
        r"gaps\(\) of the backend 'sample' .* raised ValueError: a gap without a reason",
    ),
    "a gap that no check meets": Break(
        (_INIT, 'Gap(dtype=torch.float16, check="kernel"', 'Gap(op="exp", check="golden"'),
        4,
        r"sample declares a gap that no check meets: Gap\(.*op='exp', .*'golden'\); remove it",
    ),
    "a gap in nothing": Break(
        (_INIT, 'Gap(dtype=torch.float16, check="kernel"', 'Gap(check="kernels"'),
        4,
        r"sample declares a gap in an unknown check 'kernels'; known: kernel, result",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_copy_is_caught_and_named(venv: Venv, tmp_path: Path, name: str) -> None:
    broken = BREAKS[name]
    copy = shutil.copytree(SAMPLE / PACKAGE, tmp_path / PACKAGE, ignore=_caches)
    file, old, new = broken.patch
    source = (copy / file).read_text()
    assert source.count(old) == 1
    source = source.replace(old, new)
    (copy / file).write_text(source.replace("import serial\n", "import fused, serial\n"))
    code, text = venv.suite(*broken.words, first=tmp_path)
    assert code == broken.code, text
    assert re.search(broken.message, text), text


def test_a_kernel_may_refuse_what_no_case_has_if_it_says_so(venv: Venv, tmp_path: Path) -> None:
    copy = shutil.copytree(SAMPLE / PACKAGE, tmp_path / PACKAGE, ignore=_caches)
    source = (copy / "reduce.py").read_text()
    said = f'    if self.size(-1) == 1:\n        return "{_LONE}"\n'
    for old, new in (
        ("    # The tensor's dtype", said + "    # The tensor's dtype"),
        ("    dims = normalize", _ONLY_LONG + "    dims = normalize"),
    ):
        assert source.count(old) == 1
        source = source.replace(old, new)
    (copy / "reduce.py").write_text(source)
    words = ("--bi-op=sum", "-k", "float32 and (kernel or size)")
    code, text = venv.suite(*words, first=tmp_path)
    assert code == 0, text
    assert "2 passed" in text


def test_a_second_package_of_the_same_name_is_named(venv: Venv, tmp_path: Path) -> None:
    info = tmp_path / "copycat-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: copycat\nVersion: 2.0\n")
    entry = f"[batch_invariant.backends]\nsample = {PACKAGE}:SampleBackend\n"
    (info / "entry_points.txt").write_text(entry)
    code, text = venv.suite(first=tmp_path)
    assert code == 4, text
    assert "two packages provide the backend 'sample': " in text
    for distribution in ("copycat 2.0", "batch-invariant-sample 0.1.0"):
        assert f"{distribution} ({PACKAGE}:SampleBackend)" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "batch_invariant.conformance needs --bi-backend=NAME"),
        (("--bi-backend=other",), "unknown backend 'other'; installed: "),
        (("--bi-backend=sample", "--bi-op=nosuch"), "unknown operator nosuch; known: mm, addmm,"),
    ],
)
def test_a_suite_that_cannot_run_is_an_error(
    venv: Venv, words: tuple[str, ...], message: str
) -> None:
    code, text = venv.run(*SUITE, *words)
    assert code == 4, text
    assert message in text


def test_a_part_of_the_suite_is_no_certificate(venv: Venv, tmp_path: Path) -> None:
    report = tmp_path / "part.json"
    code, text = venv.suite(*_only("exp", "float32", "result"), f"--bi-report={report}")
    assert code == 0, text
    made = json.loads(report.read_text())
    assert made["scope"] == "partial"
    assert made["holds"] is False


def test_doctor_finds_it(venv: Venv) -> None:
    code, text = venv.run("-m", "batch_invariant", "doctor", "--json")
    assert code == 0, text
    report = json.loads(text)
    (found,) = (entry for entry in report["backends"] if entry["name"] == "sample")
    assert found["ok"]
    assert found["ops"]["mm"]["float32"] == {
        "guarantee": "schedule",
        "order": "serial",
        "portable": False,
    }
    assert report["selected"]["cpu"] == "cpu"  # the embedded one, unless the other is asked for


def test_doctor_names_a_broken_copy_and_goes_on(venv: Venv, tmp_path: Path) -> None:
    copy = shutil.copytree(SAMPLE / PACKAGE, tmp_path / PACKAGE, ignore=_caches)
    (copy / "norm.py").write_text("import no_such_sdk\n")
    code, text = venv.run("-m", "batch_invariant", "doctor", first=tmp_path)
    assert code == 0, text
    assert re.search(
        r"--  sample   not usable here\s+batch-invariant-sample 0\.1\.0 does not list its kernels: "
        r"ModuleNotFoundError: No module named 'no_such_sdk'",
        text,
    ), text
    assert "* selected for cpu" in text


def test_verify_holds(venv: Venv) -> None:
    code, text = venv.run("-m", "batch_invariant", "verify", "--backend", "sample")
    assert code == 0, text
    held, missing = len(_operators()), len(CONTRACTS) - len(_operators())
    gaps = missing * 3 + held  # every dtype of what is missing; float16 of the rest
    assert f"{held} of {len(CONTRACTS)} operators hold, {missing} are declared missing" in text
    assert f"{gaps} declared gaps" in text


def test_the_certificate_holds(certification: Certification) -> None:
    text, _ = certification.process.communicate(timeout=600)
    assert certification.process.returncode == 0, text
    made = json.loads(certification.report.read_text())
    assert made["holds"] is True
    assert made["scope"] == "full"
    assert made["versions"]["plugin"] == "batch-invariant-sample 0.1.0"
    assert list(made["ops"]) == list(CONTRACTS)  # although the tests run in another order
    for op in _operators():
        for dtype in ("float32", "bfloat16"):
            found = made["ops"][op][dtype]
            assert {"kernel", "result", "T1 population", "T3 neighbours"} <= found["checks"].keys()
            assert "broken" not in found
        assert made["ops"][op]["float16"]["gaps"] == {"kernel": "float16 has not been tried yet"}
    assert made["ops"]["mm"]["float32"]["text"].startswith("serial")
    assert "golden" in made["ops"]["sum"]["float32"]["checks"]
    assert made["whole"]["checks"] == {"restoration": 1}
    missing = len(CONTRACTS) - len(_operators())
    last = text.splitlines()[-1]
    assert f" {missing * 3 + len(_operators())} xfailed" in last
    assert "skipped" not in last
    assert "failed" not in last.replace("xfailed", "")


def _operators() -> set[str]:
    """What the sample has, by its source: a test that asked the package would need it installed."""
    sources = [path.read_text() for path in (SAMPLE / PACKAGE).glob("*.py")]
    tables = [text.split("\nKERNELS = {")[1] for text in sources if "\nKERNELS = {" in text]
    return {name for table in tables for name in re.findall(r'"(\w+)": (?:_k|K)ernel\(', table)}


@pytest.mark.parametrize(
    "name",
    [
        "wrong signature of a method",
        "variant kernel",
        "NaN leak between rows",
        "mutated input",
        "wrong output dtype",
        "supports says no to what works",
        "an order that is not kept",
        "a variable that is not restored",
    ],
)
def test_the_page_quotes_what_is_said(name: str) -> None:
    page = (SAMPLE.parent.parent / "docs" / "backends.md").read_text()
    assert re.search(BREAKS[name].message, page)


def test_its_versions_are_those_of_core() -> None:
    project = tomllib.loads((SAMPLE / "pyproject.toml").read_text())["project"]
    assert project["version"] == bi.__version__
    assert project["dependencies"] == [f"batch-invariant~={bi.__version__}"]
