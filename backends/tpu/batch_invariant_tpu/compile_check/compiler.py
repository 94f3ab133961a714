"""libtpu as a compiler for one TPU generation that is not here."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batch_invariant.errors import BatchInvariantError, ConfigurationError
from batch_invariant_tpu.compile_check.trees import digest, trees

TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
"""Generations, and the smallest topology by which every libtpu tried knows them."""

_TREES = "post-reassociate-accumulations"
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?(%[\w.-]+) = \w+\[([\d,]*)\]\S* ([\w-]+)\((.*)$")


def dump_folder(dumps: Path) -> Path:
    """Prepares an empty folder for the compiler's dumps, and this process to write them there.

    To be called before jax is imported: libtpu reads the environment once, when it is loaded.
    """
    folders = (dumps / "mosaic", dumps / "llo")
    for folder in folders:
        folder.mkdir()
    flags = (
        os.environ.get("LIBTPU_INIT_ARGS", ""),
        f"--xla_mosaic_dump_to={folders[0]}",
        f"--xla_jf_dump_to={folders[1]}",
        "--xla_jf_dump_llo_text=true",
        f"--xla_jf_dump_llo_pass_label_regex=.*{_TREES}.*",
    )
    os.environ |= {
        "JAX_PLATFORMS": "cpu",  # libtpu is then a compiler and nothing else
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no device is held, so another process may compile too
        "TPU_SKIP_MDS_QUERY": "1",  # these two only quieten it
        "TPU_WORKER_HOSTNAMES": "localhost",
        "LIBTPU_INIT_ARGS": " ".join(flag for flag in flags if flag),
    }
    return dumps


@dataclass(frozen=True)
class Compiled:
    """One program: its HLO, the final Mosaic text of each kernel, the addition trees, its costs.

    trees: a digest of those inside our kernels, or where there is none of all of them.
    """

    hlo: str
    mosaic: tuple[str, ...]
    trees: str
    cost: dict[str, float]
    memory: dict[str, int]


class Compiler:
    """Compiles for one generation. `ConfigurationError` if libtpu does not know it."""

    def __init__(self, generation: str, dumps: Path) -> None:
        from jax.experimental import topologies
        from jax.sharding import SingleDeviceSharding

        if generation not in TOPOLOGIES:
            raise ConfigurationError(
                f"unknown TPU generation {generation!r}; known: {', '.join(TOPOLOGIES)}"
            )
        try:
            described = topologies.get_topology_desc(
                platform="tpu", topology_name=TOPOLOGIES[generation]
            )
        except Exception as error:  # jax wraps whatever libtpu says
            first = (str(error).splitlines() or [""])[0]
            raise BatchInvariantError(
                f"the installed libtpu does not compile for {generation}: {first[:200]}"
            ) from error
        self.devices = described.devices
        self.generation = generation
        self._sharding = SingleDeviceSharding(self.devices[0])
        self._folders = (dumps / "mosaic", dumps / "llo")

    def compile(
        self, fn: Callable[..., Any], shapes: Sequence[tuple[tuple[int, ...], str]]
    ) -> Compiled:
        """Compiles `fn` for arrays of these shapes and dtypes on one device."""
        import jax

        args = [jax.ShapeDtypeStruct(s, d, sharding=self._sharding) for s, d in shapes]
        return self.compile_lowered(jax.jit(fn).lower(*args))

    def compile_lowered(self, lowered: Any) -> Compiled:
        """Compiles what was lowered for these devices, and removes its dumps."""
        self._sweep()
        executable = lowered.compile()
        mosaic, llo = (sorted(folder.glob("*.txt")) for folder in self._folders)
        final = [p.read_text() for p in mosaic if p.name.endswith("-post-finalize-llo.txt")]
        added = [trees(p.read_text()) for p in llo if _TREES in p.name]
        inside = [trees(p.read_text()) for p in llo if _TREES in p.name and "-bi_" in p.name]
        cost = executable.cost_analysis() or {}
        memory = executable.memory_analysis()
        sizes = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
        self._sweep()
        return Compiled(
            hlo=executable.as_text(),
            mosaic=tuple(final),
            trees=digest(inside or added),
            cost={key: cost[key] for key in ("flops", "bytes accessed") if key in cost},
            memory={size: getattr(memory, size, 0) for size in sizes},
        )

    def _sweep(self) -> None:
        for folder in self._folders:
            for path in folder.glob("*") if folder.is_dir() else ():
                path.unlink()


def normalised(mosaic: str, batch_axes: Sequence[int]) -> str:
    """A kernel's text with what must follow the batch masked, and nothing else.

    That is: how many steps the grid has along the batch, and how many scalars (a length and an
    offset for each sequence) are prefetched.
    """

    def mask(found: re.Match[str]) -> str:
        steps = found.group(2).split(", ")
        masked = ["M" if axis in batch_axes else step for axis, step in enumerate(steps)]
        return f"{found.group(1)}{', '.join(masked)}>"

    text, hits = re.subn(r"(iteration_bounds = array<i64: )([\d, ]+)>", mask, mosaic)
    if hits != 1:
        raise BatchInvariantError(f"expected one iteration_bounds in a kernel's text, found {hits}")
    return re.sub(r"memref<\d+xi32(?=, [^>]*>, #xir\.memory_space<smem)", "memref<Mxi32", text)


def fingerprint(made: Compiled, batch_axes: Sequence[int]) -> str:
    """The program's text and its trees in short; a text for each kernel, in the order of dumps.

    The text is needed too: on TPU7x the matrix unit adds up a block by itself, which no tree shows.
    """
    texts = "".join(normalised(text, batch_axes) for text in made.mosaic)
    return f"{hashlib.sha256(texts.encode()).hexdigest()[:12]} {made.trees}"


def foreign_arithmetic(hlo: str, kernels: int = 1) -> list[str]:
    """What adds across elements outside of the kernels of a program, or that they are others.

    A column that becomes a vector is written by XLA as a reduction of one element to -0.0, which
    changes no bit; only reductions of more elements count.
    """
    shapes: dict[str, list[int]] = {}
    found = set()
    for line in hlo.splitlines():
        made = _INSTRUCTION.match(line)
        if made is None:
            continue
        name, dims, opcode, rest = made.groups()
        shapes[name] = [int(d) for d in dims.split(",") if d]
        if opcode in ("convolution", "dot", "reduce-window", "all-reduce"):
            found.add(opcode)
        if opcode == "reduce":
            operand = re.match(r"%[\w.-]+", rest)
            over = re.search(r"dimensions=\{([\d,]+)\}", rest)
            known = shapes.get(operand.group()) if operand else None
            axes = over.group(1).split(",") if over else []
            if known is None or not axes or any(known[int(d)] > 1 for d in axes):
                found.add("reduce")
    calls = hlo.count('custom_call_target="tpu_custom_call"')
    return sorted(found) + ([] if calls == kernels else [f"{calls} kernels"])
