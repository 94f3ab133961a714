"""jax on eight virtual CPUs; and a word where jax or the TPU compiler is missing."""

from importlib.util import find_spec
from pathlib import Path

_MISSING = []
collect_ignore = []

if find_spec("jax") is None:
    every = {path.name for path in Path(__file__).parent.glob("test_*.py")}
    collect_ignore += sorted(every - {"test_requirements.py"})
    _MISSING.append("jax is not installed: only test_requirements.py was collected")
else:
    import jax

    # Before jax starts: nothing here must look for a TPU, and shard_map needs several devices.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    if find_spec("libtpu") is None:
        _MISSING.append("libtpu is not installed: test_compile_real.py was not collected")
        collect_ignore.append("test_compile_real.py")


def pytest_terminal_summary(terminalreporter):
    for line in _MISSING:
        terminalreporter.write_line(
            f"TPU backend: {line}; pip install 'batch-invariant-tpu[compile]'"
        )
