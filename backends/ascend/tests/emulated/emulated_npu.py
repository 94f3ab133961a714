"""The pytest plugin of the tests on the emulated device: `-p emulated_npu --npu=SCENE`.

plain: CANN before 9.2, nothing else. level3: CANN 9.2. ascendc: the AscendC package. broken: an
AscendC package whose products and attention depend on the batch, and kernels of silu and exp that
depend on the place. triton: triton-ascend, which is upstream's interpreter under its name. Each is
a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import batch_invariant as bi
import fakes
import npu_device
import npu_kernels

SCENES = ("plain", "level3", "ascendc", "broken", "triton")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--npu", choices=SCENES, default="plain")


@pytest.hookimpl(tryfirst=True)  # the plugin of batch-invariant asks for the backend in its own
def pytest_configure(config: pytest.Config) -> None:
    scene = config.getoption("--npu")
    npu_device.install()
    fakes.install_torch_npu()
    if scene == "level3":
        npu_device.npu.newest_level = 3
    if scene in ("ascendc", "broken"):
        fakes.install_ascendc()
    if scene == "triton":
        fakes.install_triton_ascend(config)
    if scene == "broken":
        fakes.broken.add("npu_mm_batch_invariant")
        fakes.broken.add("npu_fused_infer_attention_score_batch_invariant")
        npu_kernels.places_differ.update(("silu", "exp"))


@pytest.fixture
def mode() -> Iterator[None]:
    """The mode on, and nothing noted yet."""
    with bi.enabled():
        fakes.called.clear()
        npu_kernels.log.clear()
        yield
