"""What torch users see: the route, the kit's checks through CPU tensors, TorchTPU's border."""

import json
import sys
import types

import pytest
import torch

import batch_invariant as core
from batch_invariant import registry
from batch_invariant.backend import Evidence
from batch_invariant.cli import main
from batch_invariant.cli.doctor import _lines, diagnose
from batch_invariant.errors import BackendUnavailable, BatchInvariantError, OpNotSupported
from batch_invariant.proof import checks
from batch_invariant.stock import dispatch_key
from batch_invariant_tpu import evidence, route, torchtpu
from batch_invariant_tpu.exchange import to_jax, to_torch

# One kernel of each kind; the whole is `bi verify --backend tpu`.
PLAN = [
    item
    for item in checks.plan("tpu", ["mm", "rms_norm"], full=False)
    if item.label == "mm float32 order"
    or (item.check != "order" and (item.subject.op.name == "mm" or "bfloat16" not in item.label))
]


@pytest.mark.parametrize("item", PLAN, ids=lambda item: item.label)
def test_the_kits_checks(item: checks.Item) -> None:
    outcome = checks.run(item)
    assert outcome.ok, str(outcome)


def test_gaps_name_what_is_not_there() -> None:
    (item,) = (item for item in checks.plan("tpu") if item.check == "restoration")
    assert item.gap is not None
    assert "importing jax" in item.gap.reason
    gaps = registry.load("tpu").gaps()
    missing = {gap.op: gap.dtype for gap in gaps if gap.check == "kernel"}
    assert missing == {None: torch.float16, **dict.fromkeys(("attention", "grouped_mm", "sample"))}


def test_probe_and_doctor_say_which_route_is_live() -> None:
    assert registry.load("tpu").probe().reason == route.INTERPRETER
    report = diagnose()
    assert any("Pallas interpreter" in str(line) for line in _lines(report))
    assert report["selected"] == {"cpu": "cpu"}


def test_cpu_tensors_are_not_taken_when_it_is_selected() -> None:
    with (
        core.use_backend("tpu"),
        pytest.raises(OpNotSupported, match="serves 'tpu' tensors"),
    ):
        core.mm(torch.ones(2, 2), torch.ones(2, 2))


def test_torchax_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchax", types.ModuleType("torchax"))
    answer = registry.load("tpu").probe()
    assert not answer.ok
    assert "linear would slip past" in answer.reason
    assert "0.0.13 cannot even be imported" in answer.reason


def test_another_vendors_device_is_not_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch_key("tpu") == "PrivateUse1"
    monkeypatch.setattr(torch._C, "_get_privateuse1_backend_name", lambda: "npu")
    with pytest.raises(BatchInvariantError, match="taken by 'npu' in this process"):
        dispatch_key("tpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_tensors_cross_the_border_and_are_copied(dtype: torch.dtype) -> None:
    tensor = torch.arange(6).reshape(2, 3).mT.to(dtype)
    array = to_jax(tensor)
    back = to_torch(array)
    assert torch.equal(back, tensor)
    back.zero_()
    assert torch.equal(to_torch(array), tensor)
    assert to_torch(to_jax(tensor[:0])).shape == (0, 2)


def test_wider_numbers_are_not_narrowed() -> None:
    with pytest.raises(OpNotSupported, match="float64"):
        to_jax(torch.ones(2, dtype=torch.float64))


def test_tensors_without_torchtpu_are_refused() -> None:
    mm = registry.load("tpu").kernels()["mm"].fn
    with pytest.raises(BackendUnavailable, match="tensors on cpu"):
        mm(torch.ones(2, 2), torch.ones(2, 2))


def test_calls_go_through_torchtpus_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for `torch.tpu.pallas`: it shows what is handed over, not that a TPU takes it."""
    made = []

    def jax_op(name, fn):
        made.append((name, fn.__annotations__))
        return lambda *tensors: tensors[0]

    fake = types.SimpleNamespace(pallas=types.SimpleNamespace(jax_op=jax_op))
    monkeypatch.setattr(torch, "tpu", fake, raising=False)
    torchtpu._operator.cache_clear()

    class OnTpu(torch.Tensor):
        @property
        def device(self):
            return types.SimpleNamespace(type="tpu")

    x = torch.ones(2, 3).as_subclass(OnTpu)
    for dims in ([0, 1], [0, 1], [1]):
        torchtpu.run("sum", lambda *a, **k: None, (x, dims, False), {"dtype": None})
    assert [name.split("::")[0] for name, _ in made] == ["batch_invariant_tpu"] * len(made)
    fn = registry.load("tpu").kernels()["addmm"].fn.__wrapped__
    before = len(made)
    for _ in range(2):
        torchtpu.run("addmm", fn, (x, x, x), {"alpha": 2})
    assert len(made) == before + 1  # one operator for one choice of what is no array
    assert list(made[-1][1]) == ["array0", "array1", "array2"]
    torchtpu._operator.cache_clear()


def test_torchtpu_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    torchtpu._operator.cache_clear()
    monkeypatch.delattr(torch, "tpu", raising=False)
    with pytest.raises(BackendUnavailable, match=r"Python 3\.12"):
        torchtpu._operator("mm", lambda: None, (), ())


@pytest.mark.parametrize("holds", [True, False])
def test_verify_asks_for_evidence_and_keeps_it(
    holds: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = [item for item in PLAN if item.label == "mm float32 result"]
    monkeypatch.setattr(checks, "plan", lambda *a, **k: one)
    found = Evidence(holds, ["  the compiler: seen"], {"compiler": {"holds": holds}})
    monkeypatch.setattr(type(registry.load("tpu")), "evidence", lambda self, full: found)
    assert main(["verify", "--backend", "tpu"]) == (0 if holds else 1)
    assert "the compiler: seen" in capsys.readouterr().out
    assert main(["verify", "--backend", "tpu", "--json"]) == (0 if holds else 1)
    made = json.loads(capsys.readouterr().out)
    assert made["evidence"] == {"compiler": {"holds": holds}}
    assert made["holds"] is holds
    main(["verify", "--backend", "tpu", "--op", "mm", "--json"])
    assert "evidence" not in json.loads(capsys.readouterr().out)


def test_evidence_without_the_compiler_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"holds": True, "checks": [{"kernel": "x", "faults": []}]}
    monkeypatch.setattr(evidence, "_run", lambda module, full: good)
    monkeypatch.setattr(evidence, "libtpu_problem", lambda: ("libtpu is not installed", "pip"))
    found = registry.load("tpu").evidence(full=False)
    assert isinstance(found, Evidence)
    assert not found.holds
    assert any("libtpu is not installed; pip" in line for line in found.lines)
    monkeypatch.setattr(evidence, "libtpu_problem", lambda: None)
    assert evidence.gather(full=False).holds
    bad = {"holds": False, "checks": [{"case": "sum", "generation": "v6e", "faults": ["varies"]}]}
    monkeypatch.setattr(evidence, "_run", lambda module, full: bad)
    found = evidence.gather(full=False)
    assert not found.holds
    assert any("v6e sum: varies" in line for line in found.lines)


def _report_of(monkeypatch: pytest.MonkeyPatch, code: str) -> dict:
    """What `evidence` makes of a check that runs this instead."""
    monkeypatch.setattr(
        evidence,
        "_command",
        lambda module, report, full: [sys.executable, "-c", f"report = {str(report)!r}\n{code}"],
    )
    return evidence._run("package.some_check", full=False)


def test_a_check_is_heard_while_it_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "print('ok first'); open(report, 'w').write('{\"holds\": true}'); print('ok second')"
    assert _report_of(monkeypatch, code) == {"holds": True}
    assert capsys.readouterr().err == "some_check: ok first\nsome_check: ok second\n"


def test_a_check_that_stops_or_takes_too_long_is_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = _report_of(monkeypatch, "raise SystemExit('out of luck')")
    assert not found["holds"]
    assert "ended with 1: out of luck" in found["error"]
    monkeypatch.setattr(evidence, "_TIMEOUT", 0.2)
    found = _report_of(monkeypatch, "import time; time.sleep(60)")
    assert not found["holds"]
    assert "took longer than 0.2 s" in found["error"]


def test_no_compiler_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "_run", lambda module, full: {"holds": True, "checks": []})
    monkeypatch.setattr(evidence, "libtpu_problem", lambda: ("libtpu is missing", "install it"))
    found = evidence.gather(full=False)
    assert not found.holds
    assert "      libtpu is missing; install it" in found.lines
