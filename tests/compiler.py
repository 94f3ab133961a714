"""A marker for tests in which Inductor compiles C++, with a compiler that we do not bring."""

from __future__ import annotations

import pytest
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler


def _missing() -> bool:
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return True
    return False


needs_compiler = pytest.mark.skipif(
    _missing(), reason="Inductor finds no C++ compiler here: install g++ or clang, or set CXX"
)
