"""What a call does, operator by operator: name, module, source line, shapes and data flow.

Tensors are shown to an observer while they are there, and not kept.
"""

from __future__ import annotations

import functools
import linecache
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from batch_invariant.places import running_line
from batch_invariant.proof.user.rows import leaves, plain

# They return memory as it was found: its bits say nothing.
_UNWRITTEN = ("empty", "new_empty", "resize_", "_resize")


@dataclass(frozen=True)
class Place:
    """Where an operator was called: the innermost nn.Module, and the line of code.

    module: its name within the outermost module, "" for that one itself. module_class: "" where no
    module was running. file and line: the innermost frame that is neither torch's nor ours.
    """

    module: str
    module_class: str
    file: str
    line: int

    @property
    def text(self) -> str:
        """The line of code, where it can be read."""
        return linecache.getline(self.file, self.line).strip()

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "text": self.text}

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" + (f"  {self.text}" if self.text else "")


@dataclass(frozen=True)
class Spec:
    """The shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    readable: bool

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


@dataclass(frozen=True)
class Call:
    """One operator that ran; sources: the indices of the calls that last wrote to its inputs."""

    op: str
    place: Place
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    sources: frozenset[int]
    numbers: tuple[str, ...]
    """its arguments that are floating-point numbers"""
    computes: bool
    """False for views and for memory that nobody has written yet."""

    @property
    def token(self) -> tuple[str, Place]:
        return self.op, self.place


Observer = Callable[[int, list[torch.Tensor]], None]


def _nothing(index: int, tensors: list[torch.Tensor]) -> None:
    pass


@dataclass
class _Modules:
    """The nn.Modules that are running, innermost last."""

    thread: int = field(default_factory=threading.get_ident)
    running: list[torch.nn.Module] = field(default_factory=list)
    names: dict[torch.nn.Module, dict[torch.nn.Module, str]] = field(default_factory=dict)

    def enter(self, module: torch.nn.Module, args: Any) -> None:
        if threading.get_ident() == self.thread:
            self.running.append(module)

    def leave(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == self.thread and module in self.running:
            while self.running.pop() is not module:
                pass

    def current(self) -> tuple[str, str]:
        if not self.running:
            return "", ""
        root, module = self.running[0], self.running[-1]
        if root not in self.names:
            self.names[root] = {part: name for name, part in root.named_modules()}
        kind = type(module).__name__
        return self.names[root].get(module, kind), kind


class Recorder(TorchDispatchMode):
    """Records every operator that is dispatched inside; everything is undone on leaving.

    before and after: shown the index of a call and the tensors that it gets, and those that it
    returns or writes to.
    """

    def __init__(self, before: Observer = _nothing, after: Observer = _nothing) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self._before, self._after = before, after
        self._modules = _Modules()
        self._handles: list[Any] = []
        self._writers: dict[int, int] = {}

    def __enter__(self) -> Recorder:
        self._handles = [
            torch_module.register_module_forward_pre_hook(self._modules.enter),
            torch_module.register_module_forward_hook(self._modules.leave, always_call=True),
        ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)  # type: ignore[no-untyped-call]
        finally:
            for handle in self._handles:
                handle.remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        index = len(self.calls)
        inputs = _tensors((args, kwargs))
        specs = tuple(map(_spec, inputs))
        self._before(index, inputs)
        result = func(*args, **kwargs)
        outputs = _tensors(result)
        for value in _written(func, args, kwargs):
            if not any(value is known for known in outputs):
                outputs.append(value)
        self._after(index, outputs)
        self.calls.append(
            Call(
                op=str(func),
                place=Place(*self._modules.current(), *running_line()),
                inputs=specs,
                outputs=tuple(map(_spec, outputs)),
                sources=self._flow(index, inputs, outputs),
                numbers=tuple(
                    repr(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, float)
                ),
                computes=not _moves_nothing(func),
            )
        )
        return result

    def _flow(
        self, index: int, inputs: list[torch.Tensor], outputs: list[torch.Tensor]
    ) -> frozenset[int]:
        """The last calls that wrote to the inputs' memory. What is written in place is an input as
        well, so that earlier writers are found through the last one."""
        keys = map(_storage, inputs)
        sources = frozenset(self._writers[key] for key in keys if key in self._writers)
        self._writers.update(dict.fromkeys(map(_storage, outputs), index))
        return sources

    def leading_to(self, result: Any, paths: Collection[str]) -> set[int]:
        """The indices of the calls from which data flows to those paths of a result."""
        found: set[int] = set()
        keys = [_storage(value) for path, value in leaves(result) if path in paths]
        waiting = [self._writers[key] for key in keys if key in self._writers]
        while waiting:
            index = waiting.pop()
            if index not in found:
                found.add(index)
                waiting += self.calls[index].sources
        return found


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _spec(value: torch.Tensor) -> Spec:
    return Spec(tuple(value.shape), value.dtype, plain(value))


def _storage(value: torch.Tensor) -> int:
    return int(value.untyped_storage()._cdata) if plain(value) else -id(value)


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """The arguments that an operator writes to, as its schema says."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            yield from _tensors(value)


@functools.cache
def _moves_nothing(func: Any) -> bool:
    name = func._schema.name.split("::")[-1]
    return bool(func.is_view) or name == "_unsafe_view" or name.startswith(_UNWRITTEN)
