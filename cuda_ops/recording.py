"""What a function does on the CPU, taken down once and done again without Python and torch's dispatcher.

    record ─▶ our kernels' calls, with their arguments ─▶ replay: one call into the library for a run of them
           └▶ everything else of torch's               ─▶ replay: the same op on the same memory

A hundred short ops a decode step cost more at the dispatcher and in Python than in their kernels where the
batch is small. A recording reads and writes where it did when it was made: only what that memory holds may
change in between.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Final, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from cuda_ops.errors import NotRecordableError, RecordedCallError
from cuda_ops.native import loaded_library
from cuda_ops.registry import NAMESPACE

_ON_THE_HOST: Final = frozenset(
    {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal"}
)
"""What a function does next may follow from what these say, so it cannot be done again blindly."""


Result = TypeVar("Result")


class Arena:
    """Memory of what recorded functions make, shared by recordings that are never replayed at the same time.

    It grows to what the largest of them needs at once, and is held until no tensor and no recording is left.
    """

    def __init__(self) -> None:
        """Raises KernelsUnavailableError where the native kernels cannot be loaded."""
        library = loaded_library()
        self.handle: int = library.throughline_cpu_arena_new()
        weakref.finalize(self, library.throughline_cpu_arena_free, self.handle)

    def empty(self, shape: Iterable[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor, whose memory the arena takes back when it is gone.

        Raises:
            torch.OutOfMemoryError: there is no room.
        """
        sizes = tuple(shape)
        num_bytes = math.prod(sizes) * dtype.itemsize
        if num_bytes == 0:
            return torch.empty(sizes, dtype=dtype)
        library = loaded_library()
        address = library.throughline_cpu_arena_take(self.handle, num_bytes)
        if not address:
            raise torch.OutOfMemoryError(f"{num_bytes} bytes could not be had")
        memory = (ctypes.c_char * num_bytes).from_address(address)
        weakref.finalize(memory, _give_back, self, address)
        return torch.frombuffer(memory, dtype=dtype).view(sizes)


def _give_back(arena: Arena, address: int) -> None:
    loaded_library().throughline_cpu_arena_give(arena.handle, address)


def borrow(tensor: Tensor) -> Tensor:
    """The same memory without holding it."""
    num_elements = 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    if tensor.numel() == 0:
        return tensor
    memory = (ctypes.c_char * (num_elements * tensor.dtype.itemsize)).from_address(tensor.data_ptr())
    return torch.frombuffer(memory, dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride())


class Recording(Generic[Result]):
    """Attributes:
    result: What the function returned, and every replay fills anew; tensors in the arena are borrowed, so
        they hold until the next replay of any recording over it.
    """

    def __init__(self, calls: _Calls, arena: Arena, result: Result) -> None:
        self._calls = calls
        self._arena = arena
        self.result = result

    def replay(self) -> None:
        """Do it again on what the memory holds now.

        Raises:
            RecordedCallError: a table or slot leads outside the cache.
        """
        self._calls.replay(torch.get_num_threads())


def record(run: Callable[[], Result], arena: Arena) -> Recording[Result]:
    """Run a function once, for real, and take down what it does; our kernels must be in use.

    Tensors that it reads and did not make must stay where they are.

    Raises:
        NotRecordableError: what it does follows from numbers that it computes.
    """
    calls = _Calls(arena)
    with _Recorder(calls, arena):
        made = run()
    calls.finish()
    result: Result = tree_map_only(Tensor, calls.borrowed, made)
    return Recording(calls, arena, result)


class _Calls:
    """Runs of kernel calls in the library, and torch's own ops between them."""

    def __init__(self, arena: Arena) -> None:
        self._library = loaded_library()
        self.handle: int = self._library.throughline_cpu_recording_new(arena.handle)
        weakref.finalize(self, self._library.throughline_cpu_recording_free, self.handle)
        self._made: set[int] = set()
        self._parts: list[tuple[int, int] | Callable[[], object]] = []
        self._first = 0

    def call_ours(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, bool]:
        """Returns what it returned, and whether its kernels' calls are all there is to it."""
        size = self._size()
        self._library.throughline_cpu_record(self.handle)
        try:
            result = function(*args, **kwargs)
        finally:
            self._library.throughline_cpu_record(None)
        return result, bool(self._library.throughline_cpu_recording_keeps(self.handle, size))

    def add(self, function: Callable[[], object]) -> None:
        self.finish()
        self._parts.append(function)

    def finish(self) -> None:
        """Close the run of kernel calls."""
        if (size := self._size()) > self._first:
            self._parts.append((self._first, size))
        self._first = size

    def note_made(self, tensors: Iterable[Tensor]) -> None:
        """These lie in the arena, or in tensors that do."""
        self._made.update(_storage_of(tensor) for tensor in tensors)

    def borrowed(self, tensor: Tensor) -> Tensor:
        """What a replay may keep of a tensor: the memory alone where that is the arena's."""
        return borrow(tensor) if _storage_of(tensor) in self._made else tensor

    def replay(self, num_threads: int) -> None:
        for part in self._parts:
            if callable(part):
                part()
                continue
            problem: bytes | None = self._library.throughline_cpu_replay(self.handle, *part, num_threads)
            if problem is not None:
                raise RecordedCallError(problem.decode(errors="replace"))

    def _size(self) -> int:
        size: int = self._library.throughline_cpu_recording_size(self.handle)
        return size


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, calls: _Calls, arena: Arena) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls = calls
        self._arena = arena

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """What torch would import for that, 75 MB, is not for an engine: nothing here is compiled by it."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.empty.memory_format:
            return self._make(args[0], kwargs.get("dtype") or torch.get_default_dtype())
        if func.name().partition(".")[0] in _ON_THE_HOST:
            raise NotRecordableError(func.name())
        is_ours = func.namespace == NAMESPACE
        calls = self._calls
        result, is_whole = (
            calls.call_ours(func, *args, **kwargs) if is_ours else (func(*args, **kwargs), False)
        )
        read, made = _tensors((args, kwargs)), _tensors(result)
        if is_whole:
            calls.note_made(made)
            return result
        if not func._schema.is_mutable:
            known = {_storage_of(tensor) for tensor in read}
            if made and all(_storage_of(tensor) in known for tensor in made):
                return result  # views, which name memory and do nothing
            result = tree_map_only(Tensor, self._keep, result)
        self._repeat(func, args, kwargs, result)
        return result

    def _make(self, shape: Iterable[int], dtype: torch.dtype) -> Tensor:
        made = self._arena.empty(shape, dtype)
        self._calls.note_made([made])
        return made

    def _keep(self, tensor: Tensor) -> Tensor:
        """Move what torch has made to where a replay can put it again."""
        kept = self._make(tensor.shape, tensor.dtype)
        return kept.copy_(tensor)

    def _repeat(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        borrowed = self._calls.borrowed
        own_args, own_kwargs = tree_map_only(Tensor, borrowed, (args, kwargs))
        if func._schema.is_mutable:
            self._calls.add(lambda: func(*own_args, **own_kwargs))
            return
        targets = [borrowed(tensor) for tensor in _tensors(result)]

        def again() -> None:
            for target, tensor in zip(targets, _tensors(func(*own_args, **own_kwargs)), strict=True):
                target.copy_(tensor)

        self._calls.add(again)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_flatten(values)[0] if isinstance(value, Tensor)]


def _storage_of(tensor: Tensor) -> int:
    """What tensors that share memory have in common; one in oneDNN's own layout shares none."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)
