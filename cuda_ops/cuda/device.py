"""Kernels on a GPU: loaded and launched through cuda-core, on torch's current stream."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from cuda_ops.cuda.compiler import Compiler
from cuda_ops.cuda.launcher import Argument, Counters, LaunchShape, Variant
from cuda_ops.errors import KernelsUnavailableError

# What any kernel may have without asking; more has to be allowed for a kernel on a device.
_FREE_SHARED_BYTES: Final = 48 * 1024
_OLDEST_MAJOR: Final = 8


class CudaLauncher:
    """Launches on one device, which must be the calling thread's current one.

    Attributes:
        num_multiprocessors: of the device.
        arch: its architecture, as the compiler calls it.
        counters: on the device, of its current stream.
    """

    def __init__(
        self, device: int, compiler: Compiler, num_multiprocessors: int, current_stream: Callable[[int], int]
    ) -> None:
        """Take what launches need.

        Args:
            device: its number.
            compiler: for the device's architecture.
            num_multiprocessors: of the device.
            current_stream: gives the handle of torch's stream on a device. Asked at every launch: a stream
                kept from before would keep a captured graph empty.

        Raises:
            KernelsUnavailableError: cuda-core is not there.
        """
        self.num_multiprocessors = num_multiprocessors
        self.arch = compiler.arch
        self.counters = Counters()
        self._device = device
        self._compiler = compiler
        self._current_stream = current_stream
        self._core = import_core()
        self._kernels: dict[tuple[Variant, int], Any] = {}
        # Wrapping a stream costs ten times a launch, making a configuration half of one.
        self._stream = functools.cache(self._core.Stream.from_handle)
        self._config = functools.lru_cache(maxsize=4096)(self._make_config)

    def launch(self, variant: Variant, shape: LaunchShape, arguments: tuple[Argument, ...]) -> None:
        """See `Launcher.launch`."""
        kernel = self._kernels.get((variant, shape.shared_bytes)) or self._load(variant, shape.shared_bytes)
        self._core.launch(
            self._stream(self._current_stream(self._device)),
            self._config(shape),
            kernel,
            *(_as_native(argument) for argument in arguments),
        )

    def _load(self, variant: Variant, shared_bytes: int) -> Any:
        code = self._core.ObjectCode.from_cubin(self._compiler.compile(variant).code, name=str(variant))
        kernel = code.get_kernel(variant.entry)
        if shared_bytes > _FREE_SHARED_BYTES:
            _allow_shared_bytes(kernel, shared_bytes, self._device)
        self._kernels[variant, shared_bytes] = kernel
        return kernel

    def _make_config(self, shape: LaunchShape) -> Any:
        return self._core.LaunchConfig(grid=shape.blocks, block=shape.threads, shmem_size=shape.shared_bytes)


def launcher_of_current_device(cache: Path | None) -> CudaLauncher:
    """Make a launcher for torch's current device; the caller has seen that there is one.

    Raises:
        KernelsUnavailableError: a package is missing, or the device is older than the kernels.
    """
    device = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(device)
    return CudaLauncher(
        device,
        Compiler(_arch(properties.major, properties.minor), cache),
        properties.multi_processor_count,
        torch._C._cuda_getCurrentRawStream,
    )


def import_core() -> Any:
    """Import cuda-core, which loads and launches.

    Raises:
        KernelsUnavailableError: it is not there, or has no driver to talk to.
    """
    try:
        import cuda.core
    except (ImportError, RuntimeError) as error:
        raise KernelsUnavailableError(
            "cuda-core 0.6 or newer is needed to launch kernels; `pip install 'throughline[cuda]'`"
        ) from error
    return cuda.core


def _arch(major: int, minor: int) -> str:
    """Name the architecture; Hopper's has instructions that later ones lack, hence its letter."""
    if major < _OLDEST_MAJOR:
        raise KernelsUnavailableError(
            f"the device has compute capability {major}.{minor}, the kernels need {_OLDEST_MAJOR}.0"
        )
    return "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"


def _allow_shared_bytes(kernel: Any, shared_bytes: int, device: int) -> None:
    from cuda.bindings import driver

    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (result,) = driver.cuKernelSetAttribute(attribute, shared_bytes, kernel.handle, device)
    if result != driver.CUresult.CUDA_SUCCESS:
        raise KernelsUnavailableError(f"the device has no {shared_bytes} bytes of shared memory: {result!r}")


def _as_native(argument: Argument) -> Any:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return 0 if argument is None else argument
