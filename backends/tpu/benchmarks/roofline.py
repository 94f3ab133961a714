"""What the kernels can cost at least, beside XLA's own operators: a table, by arithmetic alone.

    python backends/tpu/benchmarks/roofline.py --generation v6e --kernel 'sum 4096'

Nothing is run. Both programs are compiled for the generation by libtpu. A time is the larger of
arithmetic over peak rate and bytes over peak bandwidth. least: of the operator, each argument read
and each result written once (`memory_analysis`). ours: of what the kernel's blocks read, write and
multiply, padding included. XLA: of XLA's own operator by its `cost_analysis`, which counts what a
fusion reads again, and so may be too much. temporary: what the compiled programs hold beside
arguments and results. A dash: jax could not read XLA's own program.
"""

import argparse
import contextlib
import tempfile
from pathlib import Path

from batch_invariant_tpu.compile_check.compiler import TOPOLOGIES, Compiler, dump_folder

# One chip, bfloat16: 10^12 operations a second and 10^9 bytes a second, as Google publishes them.
PEAKS = {
    "v4": (275, 1228),
    "v5e": (197, 819),
    "v5p": (459, 2765),
    "v6e": (918, 1640),
    "tpu7x": (2307, 7380),
}
NAMES = (
    "matmul 4096x4096",
    "matmul 14336x4096",
    "rms_norm 4096",
    "layer_norm 4096",
    "softmax 4096",
    "log_softmax 128256",
    "logsumexp 4096",
    "sum 4096",
    "mean 128256",
    "cumsum 4096",
    "silu of 1024",
    "attention, causal prefill",
    "attention, decode",
)
BATCHES = (1, 256, 4096)


def ours(name: str, m: int, generation: str) -> tuple[float, float]:
    """Operations and bytes of the kernel's blocks, in bfloat16."""
    from batch_invariant_tpu.jax.attention import ROWS
    from batch_invariant_tpu.jax.blocks import matmul_block, round_up, row_block
    from batch_invariant_tpu.jax.rows import SEGMENT

    if name.startswith("matmul"):
        k, n = map(int, name.split()[1].split("x"))
        bm, _, bn = matmul_block(k, n, "bfloat16", generation)
        rows = round_up(m, bm)
        return 2.0 * rows * k * n, 2.0 * (rows * k * (n / bn) + k * n * (rows / bm) + rows * n)
    if name.startswith("attention"):
        keys, size = 1024, 128
        # Decode: m sequences, 4 query rows for each of 2 key heads; prefill: 2 sequences of m.
        decode = name.endswith("decode")
        programs, rows = (2 * m, 4) if decode else (4, 4 * m)
        blocks = round_up(rows, ROWS) // ROWS
        scores = 2.0 * ROWS * keys * size
        each = 2.0 * (2 * keys * size + 2 * ROWS * size) + 4.0 * ROWS * 128
        return programs * blocks * 4 * scores, programs * blocks * each  # weights in three parts
    if name.startswith("cumsum"):
        # Turned and widened to fp32 before, turned and rounded after.
        elements = float(round_up(m, 128) * 4096)
        return elements, 20 * elements
    if name.endswith("of 1024"):
        elements = float(round_up(m, row_block(1024)) * 1024)
        return elements, 4 * elements
    n = int(name.split()[1])
    rows = round_up(m, row_block(min(n, SEGMENT)))
    width = n if n <= SEGMENT else round_up(n, SEGMENT)
    if name.startswith(("logsumexp", "sum", "mean")):
        return 4.0 * rows * width, 2.0 * rows * (width + 128)
    reads = 1 if n <= SEGMENT else 3
    return 8.0 * rows * width, 2.0 * rows * width * (reads + 1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--generation", action="append", default=[], choices=tuple(TOPOLOGIES))
    parser.add_argument("--kernel", action="append", default=[], choices=NAMES)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        dumps = dump_folder(Path(scratch))
        import jax

        from batch_invariant_tpu.compile_check.cases import cases

        print("| generation | kernel | M | least, us | ours | XLA | temporary, ours / XLA, KB |")
        print("|---|---|---|---|---|---|---|")
        for generation in args.generation or ("v5e", "v6e", "tpu7x"):
            compiler = Compiler(generation, dumps)
            flops, bandwidth = PEAKS[generation]

            def bound(operations: float, moved: float, f: int = flops, b: int = bandwidth) -> float:
                return max(operations / (f * 1e6), moved / (b * 1e3))

            for case in cases(generation, "bfloat16", False):
                if case.name not in (args.kernel or NAMES):
                    continue
                for m in BATCHES[:2] if case.name == "attention, decode" else BATCHES:
                    shapes = case.shapes(m)
                    mine, plain = compiler.compile(case.fn, shapes), None
                    # jax 0.10.2 cannot print some programs of XLA's own, and says so.
                    with contextlib.suppress(jax.errors.JaxRuntimeError):
                        plain = compiler.compile(case.plain, shapes)
                    here = bound(*ours(case.name, m, generation))
                    memory = mine.memory
                    passed = memory["argument_size_in_bytes"] + memory["output_size_in_bytes"]
                    least = bound(case.flops(m), passed)
                    there, held = "-", "-"
                    if plain is not None:
                        cost = plain.cost
                        there = f"{bound(cost.get('flops', 0.0), cost['bytes accessed']):.1f}"
                        held = str(plain.memory["temp_size_in_bytes"] >> 10)
                    temporary = memory["temp_size_in_bytes"] >> 10
                    print(
                        f"| {generation} | {case.name} | {m} | {least:.1f} | {here:.1f} | "
                        f"{there} | {temporary} / {held} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
