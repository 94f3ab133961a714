"""Builds the native CPU library with the compiler inside the `ziglang` wheel, so that a machine
without a compiler can install from source. Run as a script, it rebuilds in place."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ModuleNotFoundError:  # run as a script in an environment without hatchling
    BuildHookInterface = object  # type: ignore[assignment,misc]

NATIVE = Path(__file__).parent / "core" / "batch_invariant" / "cpu" / "native"
BASELINE = frozenset({"cpu_features.cpp"})  # runs before the CPU is known to be good enough

# Contraction off: an expression is fused only where the source says fma, so bits do not follow the
# compiler's mood. glibc 2.17 is the oldest that the manylinux wheels of torch run on.
FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fomit-frame-pointer", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-exceptions", "-fno-rtti"),
    *("-fno-sanitize=undefined", "-fno-stack-protector", "-Wall", "-Wextra", "-Werror"),
]
LINUX = "linux-gnu.2.17"
MACOS = "macos.11.0"

# library name -> (zig target, CPU of the kernels, CPU of BASELINE); native.py looks for these names
LIBRARIES: dict[tuple[str, str], dict[str, tuple[str, str, str]]] = {
    ("linux", "x86_64"): {
        "libbi_x86_64_v3.so": (f"x86_64-{LINUX}", "x86_64_v3", "x86_64"),
        "libbi_x86_64_v4.so": (f"x86_64-{LINUX}", "x86_64_v4", "x86_64"),
    },
    ("linux", "aarch64"): {"libbi_aarch64.so": (f"aarch64-{LINUX}", "generic", "generic")},
    ("darwin", "arm64"): {"libbi_aarch64.dylib": (f"aarch64-{MACOS}", "apple_m1", "apple_m1")},
    ("darwin", "x86_64"): {"libbi_x86_64_v3.dylib": (f"x86_64-{MACOS}", "x86_64_v3", "x86_64")},
}


def host() -> tuple[str, str]:
    """The (system, machine) pair of this interpreter, as LIBRARIES spells it."""
    return sys.platform, platform.machine()


def _environment() -> dict[str, str]:
    """This process's, with a folder for zig's cache where there is no home to keep it in."""
    found = dict(os.environ)
    if not any(found.get(name) for name in ("HOME", "XDG_CACHE_HOME", "ZIG_GLOBAL_CACHE_DIR")):
        found["ZIG_GLOBAL_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / "batch-invariant-zig")
    return found


def _run(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "ziglang", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
    if done.returncode:
        raise RuntimeError(
            f"the native library does not build: {' '.join(command)} gave exit status "
            f"{done.returncode}\n{done.stdout}{done.stderr}"
        )


def build(system_machine: tuple[str, str] | None = None, folder: Path | None = None) -> list[Path]:
    """Compiles every library of a platform (default: this one) into `folder`; returns the paths."""
    target = system_machine or host()
    libraries = LIBRARIES.get(target)
    if libraries is None:
        known = ", ".join("/".join(pair) for pair in LIBRARIES)
        raise RuntimeError(f"no native library for {'/'.join(target)}; known platforms: {known}")
    out = folder or NATIVE
    sources = sorted(NATIVE.glob("*.cpp"))
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = []
        objects: dict[str, list[str]] = {}
        for name, (zig_target, cpu, baseline) in libraries.items():
            for source in sources:
                made = str(Path(scratch) / f"{name}.{source.stem}.o")
                objects.setdefault(name, []).append(made)
                mcpu = baseline if source.name in BASELINE else cpu
                arguments = ["c++", "-target", zig_target, f"-mcpu={mcpu}", *FLAGS]
                jobs.append(pool.submit(_run, [*arguments, "-c", str(source), "-o", made]))
        for job in jobs:
            job.result()
        made_libraries = []
        for name, (zig_target, _, baseline) in libraries.items():
            # Linked beside its final place and moved there: a process that has the old file mapped
            # keeps it, and an interrupted build leaves no half-written library.
            part = out / f"{name}.part"
            link = ["c++", "-target", zig_target, f"-mcpu={baseline}", "-nostdlib++", "-shared"]
            _run([*link, "-s", *objects[name], "-o", str(part)])
            part.replace(out / name)
            made_libraries.append(out / name)
    return made_libraries


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg,misc,unused-ignore]
    """Adds the compiled libraries to a wheel or an editable install and tags it by platform."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Builds into the source tree; on a platform without kernels the wheel stays pure Python,
        and the CPU backend says so when it is asked for."""
        if host() not in LIBRARIES:
            return
        libraries = build()
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform_tag()}"
        build_data["artifacts"] += [str(path.relative_to(self.root)) for path in libraries]


def _platform_tag() -> str:
    tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    if tag.startswith("linux_"):
        return tag.replace("linux_", "manylinux_2_17_", 1)
    return tag


if __name__ == "__main__":
    for path in build():
        sys.stdout.write(f"{path} {path.stat().st_size} bytes\n")
