"""CUDA C++ to machine code by NVRTC, the compiler in torch's own dependencies; results are kept on disk.

Needs neither a toolkit nor, to compile, a driver or a GPU. Kernels include nothing but our own headers, so
what is compiled is known from the files in `kernels/`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cuda_ops.cuda.launcher import Variant
from cuda_ops.errors import KernelCompileError, KernelsUnavailableError

KERNEL_FOLDER: Final = Path(__file__).parent / "kernels"
CACHE_VARIABLE: Final = "THROUGHLINE_KERNEL_CACHE"

_OPTIONS: Final = ("--std=c++17", "--ptxas-options=-v")


@dataclass(frozen=True, slots=True)
class Compiled:
    """Attributes:
    code: a cubin.
    log: what the compiler said: registers, spills, shared memory.
    """

    code: bytes
    log: str


class Compiler:
    """Compiles variants for one architecture.

    Attributes:
        arch: as NVRTC calls it, e.g. `sm_90a`.
        version: of NVRTC, major and minor.
    """

    def __init__(self, arch: str, cache: Path | None) -> None:
        """Find NVRTC; `cache` is a folder, made when first needed, and None keeps nothing.

        Raises:
            KernelsUnavailableError: NVRTC or its Python binding is not there.
        """
        self.arch = arch
        self._cache = cache
        self._nvrtc = _import_nvrtc()
        self.version = self._find_version()

    def compile(self, variant: Variant) -> Compiled:
        """Compile, or read what was compiled before from the same sources with the same compiler.

        Raises:
            KernelCompileError: the compiler refused.
        """
        source = (KERNEL_FOLDER / f"{variant.source}.cu").read_text(encoding="utf-8")
        headers = {
            path.name: path.read_text(encoding="utf-8") for path in sorted(KERNEL_FOLDER.glob("*.cuh"))
        }
        options = (f"--gpu-architecture={self.arch}", *_OPTIONS, *variant.macros)
        if self._cache is None:
            return self._run(variant, source, headers, options)
        parts = (
            str(self.version),
            *options,
            source,
            *(text for header in headers.items() for text in header),
        )
        path = self._cache / f"{variant.source}-{_digest(parts)}.cubin"
        if (kept := _read(path)) is not None:
            return kept
        compiled = self._run(variant, source, headers, options)
        # A cache that cannot be written costs the next process a second.
        with contextlib.suppress(OSError):
            _write(path, compiled)
        return compiled

    def _run(
        self, variant: Variant, source: str, headers: Mapping[str, str], options: tuple[str, ...]
    ) -> Compiled:
        nvrtc = self._nvrtc
        program = self._call(
            nvrtc.nvrtcCreateProgram,
            source.encode(),
            f"{variant.source}.cu".encode(),
            len(headers),
            [text.encode() for text in headers.values()],
            [name.encode() for name in headers],
        )
        try:
            (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
            log = b" " * self._call(nvrtc.nvrtcGetProgramLogSize, program)
            self._call(nvrtc.nvrtcGetProgramLog, program, log)
            text = log.decode(errors="replace").rstrip("\0 \n")
            if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
                raise KernelCompileError(str(variant), self.arch, text)
            code = b" " * self._call(nvrtc.nvrtcGetCUBINSize, program)
            self._call(nvrtc.nvrtcGetCUBIN, program, code)
            return Compiled(code, text)
        finally:
            nvrtc.nvrtcDestroyProgram(program)

    def _find_version(self) -> tuple[int, int]:
        try:
            result, major, minor = self._nvrtc.nvrtcVersion()
        # The binding's own errors for a library it cannot find have changed with its versions.
        except Exception as error:
            raise KernelsUnavailableError(
                "NVRTC is not there; `pip install nvidia-cuda-nvrtc`, or a torch built for CUDA, brings it"
            ) from error
        if result != self._nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise KernelsUnavailableError(f"NVRTC does not work: {result!r}")
        return major, minor

    def _call(self, function: Any, *arguments: Any) -> Any:
        result, *values = function(*arguments)
        if result != self._nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise KernelsUnavailableError(f"NVRTC does not work: {result!r}")
        return values[0] if values else None


def cache_folder(environ: Mapping[str, str]) -> Path | None:
    """Where compiled kernels are kept: `THROUGHLINE_KERNEL_CACHE`, or the user's cache folder, if any."""
    if named := environ.get(CACHE_VARIABLE):
        return Path(named)
    base = environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "throughline" / "kernels"
    except RuntimeError:
        # A container's user without a home; a folder that others can write to is no place for code.
        return None


def _import_nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise KernelsUnavailableError("cuda-bindings is not installed; `pip install cuda-core`") from error
    return nvrtc


def _digest(parts: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part.encode()).digest())
    return digest.hexdigest()[:32]


def _read(path: Path) -> Compiled | None:
    try:
        return Compiled(path.read_bytes(), path.with_suffix(".log").read_text(encoding="utf-8"))
    except OSError:
        return None


def _write(path: Path, compiled: Compiled) -> None:
    """Put both files in place whole, the code last: a reader that finds it finds the log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, content in ((path.with_suffix(".log"), compiled.log.encode()), (path, compiled.code)):
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        os.replace(file.name, target)
