"""How the compiler's output is read, on texts in its form: a reader that sees nothing passes."""

import subprocess
import sys

import pytest

from batch_invariant.errors import BatchInvariantError, ConfigurationError
from batch_invariant_tpu.compile_check.compiler import Compiler, foreign_arithmetic, normalised
from batch_invariant_tpu.compile_check.trees import digest, trees

CHAIN = """
%v1 = vpop.f32.mrf.mxu0
%v2 = vpop.f32.mrf.mxu1
%v3 = vadd.f32 %v2, %v1
%v4 = vld [vmem:[#allocation3 + $0xb0] sm:$0xff]
%v5 = vpop.f32.mrf.mxu2
%v6 = vadd.f32 %v3, %v5 /* a remark, with a comma */
%v7 = vadd.f32 %v6, %v4
"""


def test_a_tree_is_read_with_its_leaves() -> None:
    assert dict(trees(CHAIN)) == {"(((P+P)+P)+L)": 1}


def test_operands_have_no_order_and_shape_matters() -> None:
    turned = CHAIN.replace("%v3, %v5", "%v5, %v3")
    pairs = CHAIN.replace("vadd.f32 %v6, %v4", "vadd.f32 %v3, %v4")
    assert digest([trees(turned)]) == digest([trees(CHAIN)])
    assert digest([trees(pairs)]) != digest([trees(CHAIN)])


def test_long_chains_of_other_lengths_differ() -> None:
    def chain(length: int) -> str:
        lines = ["%v0 = vld [vmem:[%s0]]"]
        lines += [f"%v{i + 1} = vadd.f32 %v{i}, %v0" for i in range(length)]
        return "\n".join(lines)

    assert digest([trees(chain(500))]) == digest([trees(chain(500))])
    assert digest([trees(chain(500))]) != digest([trees(chain(501))])


def test_only_the_steps_along_the_batch_are_masked() -> None:
    def text(steps: str, scalars: int = 4) -> str:
        return (
            f"f(%a {{llo.type = memref<{scalars}xi32, #xir.tiled<(128),[1]>, "
            f"#xir.memory_space<smem, tc>>}}) iteration_bounds = array<i64: {steps}>"
        )

    one = normalised(text("1, 2, 8, 4"), (0, 2))
    assert one == normalised(text("64, 2, 1, 4", 9), (0, 2))
    assert one != normalised(text("1, 3, 8, 4"), (0, 2))
    assert one != normalised(text("1, 2, 8, 5"), (0, 2))
    with pytest.raises(BatchInvariantError, match="iteration_bounds"):
        normalised("nothing", (0,))


CALL = '  ROOT %k = f32[8,4]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"\n'


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("", []),
        ("  %d = f32[8,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}", ["dot"]),
        ("  %c = f32[8,4]{1,0:T(8,128)} convolution(%a, %b)", ["convolution"]),
        ("  %r = f32[4]{0} reduce(%s, %z), dimensions={1}, to_apply=%add", []),
        ("  %r = f32[4]{0} reduce(%w, %z), dimensions={1}, to_apply=%add", ["reduce"]),
        ("  %r = f32[4]{0} reduce(%unknown, %z), dimensions={1}, to_apply=%add", ["reduce"]),
        ("  %p = bf16[4]{0} all-reduce(%w), channel_id=1", ["all-reduce"]),
        (CALL, ["2 kernels"]),
    ],
)
def test_arithmetic_beside_the_kernel_is_seen(line: str, found: list[str]) -> None:
    shapes = "  %s = f32[4,1]{1,0} slice(%q)\n  %w = f32[4,9]{1,0} slice(%q)\n"
    assert foreign_arithmetic(shapes + CALL + line + "\n") == found


def test_an_operator_of_two_kernels() -> None:
    assert foreign_arithmetic(CALL + CALL, kernels=2) == []
    assert foreign_arithmetic(CALL, kernels=2) == ["1 kernels"]


def test_an_unknown_generation(tmp_path) -> None:
    with pytest.raises(ConfigurationError, match="unknown TPU generation 'v99'; known: v4, v5e"):
        Compiler("v99", tmp_path)
    command = [sys.executable, "-m", "batch_invariant_tpu.compile_check", "--generation", "v99"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (1, 2)  # 1 where libtpu is missing, which is said first
    assert "unknown TPU generation v99" in done.stderr or "libtpu" in done.stderr
