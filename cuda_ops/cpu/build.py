"""Compile the CPU kernels: `python cuda_ops/cpu/build.py`, seconds once, nothing the second time.

Imports nothing but the standard library, so that `make` need not load torch to find that all is built. The
result stands in `build/` beside the sources under a name that holds a digest of them: an older one is never
loaded by newer code. torch's version is not part of it, since every later torch offers the stable ABI of 2.11
too. Where no compiler is, the ops stay in plain torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).parent
SOURCES: Final = (
    "kernels.h",
    "vector.h",
    "decode.h",
    "prefill.h",
    "rows.h",
    "linear.h",
    "lookup.h",
    "threads.h",
    "sharing.h",
    "recording.h",
    "checks.h",
    "level.cpp",
    "library.cpp",
    "recording.cpp",
)
TORCH_TARGET: Final = "0x020b000000000000"
"""2.11, the oldest torch that has all we call."""

_COMPILERS: Final = ("g++", "c++")
_COMMON: Final = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
# Two warnings that mean nothing here: vectors wider than the baseline's registers would be passed in another
# way (none is, all is inlined), and GCC's own AVX-512 headers begin with a value that they never read.
_LEVEL: Final = ("-O3", "-fno-math-errno", "-Wno-psabi", "-Wno-maybe-uninitialized")
_V4: Final = ("-march=x86-64-v4", "-mprefer-vector-width=512")
_LEVELS: Final[Mapping[str, Mapping[str, Sequence[str]]]] = {
    "x86_64": {
        "x86_64_v4_bf16_vnni": (*_V4, "-mavx512bf16", "-mavx512vnni"),
        "x86_64_v4": _V4,
        "x86_64_v3": ("-march=x86-64-v3",),
        "baseline": (),
    },
}
_ANY_MACHINE: Final[Mapping[str, Sequence[str]]] = {"baseline": ()}


class BuildError(Exception):
    """Says in one line why there is nothing to load; `output` is what the compiler said, if it was asked."""

    def __init__(self, problem: str, output: str = "") -> None:
        super().__init__(problem)
        self.output = output


@dataclass(frozen=True, slots=True)
class Toolchain:
    """Attributes:
    compiler: a C++ compiler's path.
    torch: the folder of torch's package, with `include` and `lib`.
    """

    compiler: str
    torch: Path

    @classmethod
    def find(cls, environ: Mapping[str, str]) -> Toolchain:
        """Raises BuildError: no compiler, or no torch."""
        named = environ.get("CXX")
        compiler = next(filter(None, map(shutil.which, [named] if named else _COMPILERS)), None)
        if compiler is None:
            raise BuildError(f"no C++ compiler: none of {named or ', '.join(_COMPILERS)} is there")
        torch = importlib.util.find_spec("torch")
        if torch is None or torch.origin is None:
            raise BuildError("torch is not installed")
        return cls(compiler, Path(torch.origin).parent)


def library_path(folder: Path = FOLDER) -> Path:
    """Name the library that these sources make, whether it is there or not."""
    digest = hashlib.sha256(platform.machine().encode())
    for name in (*SOURCES, "build.py"):
        digest.update((folder / name).read_bytes())
    return folder / "build" / f"throughline_cpu-{digest.hexdigest()[:16]}.so"


def failure_path(library: Path) -> Path:
    """Where a failed build leaves its reason, so that it is not tried again with the same sources."""
    return library.with_suffix(".failed")


def build(toolchain: Toolchain, folder: Path = FOLDER) -> Path:
    """Compile all translation units at once, link them, and put the library in place in one move.

    Raises:
        BuildError: the compiler or the linker refused.
    """
    library = library_path(folder)
    library.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        commands, objects = _compile_commands(toolchain, folder, Path(scratch))
        _run_all(commands)
        linked = Path(scratch) / library.name
        libraries = toolchain.torch / "lib"
        _run_all(
            [[toolchain.compiler, "-shared", "-o", linked, *objects, f"-L{libraries}", "-ltorch_cpu", "-s"]]
        )
        os.replace(linked, library)
    for old in library.parent.glob("throughline_cpu-*"):
        if old != library:
            old.unlink(missing_ok=True)
    return library


def _compile_commands(
    toolchain: Toolchain, folder: Path, scratch: Path
) -> tuple[list[list[str | Path]], list[Path]]:
    include = str(toolchain.torch / "include")
    with_torch = ["-O2", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-isystem", include]
    units: dict[str, list[str | Path]] = {
        name: [*with_torch, folder / f"{name}.cpp"] for name in ("library", "recording")
    }
    for level, flags in _LEVELS.get(platform.machine(), _ANY_MACHINE).items():
        units[level] = [*_LEVEL, *flags, f"-DTHROUGHLINE_LEVEL={level}", folder / "level.cpp"]
    objects = [scratch / f"{unit}.o" for unit in units]
    commands = [
        [toolchain.compiler, *_COMMON, *arguments, "-c", "-o", target]
        for arguments, target in zip(units.values(), objects, strict=True)
    ]
    return commands, objects


def _run_all(commands: Sequence[Sequence[str | Path]]) -> None:
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    outputs = [process.communicate()[0] for process in running]
    for process, output in zip(running, outputs, strict=True):
        if process.returncode:
            raise BuildError("the C++ compiler refused the sources", output)


def main(environ: Mapping[str, str], folder: Path = FOLDER) -> int:
    """Build unless that was done, or failed, before; 0 says that a library is there."""
    library = library_path(folder)
    if library.exists():
        return 0
    failure = failure_path(library)
    if failure.exists():
        _say(f"CPU kernels could not be built earlier, see {failure}; remove it to try again")
        return 1
    started = time.monotonic()
    try:
        build(Toolchain.find(environ), folder)
    except BuildError as error:
        if error.output:
            failure.write_text(f"{error}\n{error.output}", encoding="utf-8")
        _say(f"CPU kernels are not built, plain torch takes their place: {error}\n{error.output}".rstrip())
        return 1
    except OSError as error:
        _say(f"CPU kernels are not built, plain torch takes their place: {error}")
        return 1
    _say(f"built the CPU kernels in {time.monotonic() - started:.0f} s")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(os.environ))
