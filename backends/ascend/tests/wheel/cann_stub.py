"""Stub libraries that let the real torch_npu be imported where CANN is not installed.

The C symbols that the wheel needs and nobody provides are read with nm. Each gets a function, and
the libraries that the wheel links against are made of all of them. Device memory is host memory,
copies are memcpy; every other function returns 0. Nothing computes: an operator of torch_npu that
would launch a kernel returns garbage or raises.

For one wheel and one machine: CPython, Linux, gcc and nm. torch must be importable.
"""

from __future__ import annotations

import subprocess
from importlib.util import find_spec
from pathlib import Path

LIBRARIES = ("ascendcl", "hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel")
_LOOKED_UP = (
    *("aclrtSetDeviceSatMode", "aclSetCompileopt"),
    *("aclrtSetOpExecuteTimeOut", "aclopCompileAndExecuteV2"),
)
"""Found by name at run time, so that no table of symbols lists them."""

_ALLOCATE = "*p = aligned_alloc(512, (n + 511) / 512 * 512); return *p ? 0 : 1;"
_COPY = "memcpy(d, s, n); return 0;"
_NEW = "*s = malloc(64); return 0;"
_SIGNATURES = {
    "aclrtGetSocName": ("const char*", "void", 'return "Ascend910B3";'),
    "aclGetRecentErrMsg": ("const char*", "void", 'return "stub";'),
    "aclrtGetDeviceCount": ("int", "uint32_t* c", "*c = 1; return 0;"),
    "aclrtGetDevice": ("int", "int32_t* d", "*d = 0; return 0;"),
    "aclrtMalloc": ("int", "void** p, size_t n, int k", _ALLOCATE),
    "aclrtMallocAlign32": ("int", "void** p, size_t n, int k", _ALLOCATE),
    "aclrtMallocHost": ("int", "void** p, size_t n", _ALLOCATE),
    "aclrtFree": ("int", "void* p", "free(p); return 0;"),
    "aclrtFreeHost": ("int", "void* p", "free(p); return 0;"),
    "aclrtMemcpy": ("int", "void* d, size_t m, const void* s, size_t n, int k", _COPY),
    "aclrtMemcpyAsync": (
        "int",
        "void* d, size_t m, const void* s, size_t n, int k, void* t",
        _COPY,
    ),
    "aclrtMemset": ("int", "void* d, size_t m, int v, size_t n", "memset(d, v, n); return 0;"),
    "aclrtGetMemInfo": (
        "int",
        "int a, size_t* f, size_t* t",
        "*f = 8ull << 30; *t = 16ull << 30; return 0;",
    ),
    "aclrtCreateStream": ("int", "void** s", _NEW),
    "aclrtCreateStreamWithConfig": ("int", "void** s, uint32_t p, uint32_t f", _NEW),
    "aclrtCreateEventExWithFlag": ("int", "void** s, uint32_t f", _NEW),
    "aclrtGetCurrentContext": ("int", "void** c", "static int x; *c = &x; return 0;"),
    "aclrtGetSysParamOpt": ("int", "int o, int64_t* v", "*v = options[o & 7]; return 0;"),
    "aclrtSetSysParamOpt": ("int", "int o, int64_t v", "options[o & 7] = v; return 0;"),
}


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _symbols(library: Path | str, which: str) -> list[list[str]]:
    return [line.split() for line in _run("nm", "-D", which, str(library)).splitlines() if line]


def build(out: Path) -> int:
    """Writes the libraries into `out`; returns how many functions they have."""
    origins = {}
    for package in ("torch", "torch_npu"):
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise SystemExit(f"{package} is not installed here: nothing to make stubs for")
        origins[package] = Path(spec.origin).parent
    own = [*origins["torch_npu"].glob("lib/*.so"), *origins["torch_npu"].glob("_C*.so")]
    system = [_run("gcc", f"-print-file-name={n}").strip() for n in ("libc.so.6", "libm.so.6")]
    have = [*own, *origins["torch"].glob("lib/*.so*"), *system]
    provided = {
        row[-1].split("@")[0] for library in have for row in _symbols(library, "--defined-only")
    }
    needed = {
        row[-1]
        for library in own
        for row in _symbols(library, "--undefined-only")
        if row[-2] == "U" and "@" not in row[-1]
    } - provided
    plain = sorted(name for name in needed if not name.startswith(("Py", "_Py", "_Z")))
    names = list(dict.fromkeys((*_SIGNATURES, *plain, *_LOOKED_UP)))
    lines = [f"#include <{h}.h>" for h in ("stdint", "string", "stdlib")]
    lines.append("static int64_t options[8];")
    for name in names:
        returns, arguments, body = _SIGNATURES.get(name, ("int", "void", "return 0;"))
        lines.append(f"{returns} {name}({arguments}) {{ {body} }}")
    out.mkdir(parents=True, exist_ok=True)
    source = out / "stub.c"
    source.write_text("\n".join(lines) + "\n")
    first = out / f"lib{LIBRARIES[0]}.so"
    _run("gcc", "-shared", "-fPIC", "-w", "-o", str(first), str(source))
    for library in LIBRARIES[1:]:
        (out / f"lib{library}.so").write_bytes(first.read_bytes())
    return len(names)
