"""A CUDA driver that only takes notes; for a process of its own, since cuda-core looks for a driver once."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent / "emulator" / "driver.c"


class Config(ctypes.Structure):
    _fields_ = [
        ("blocks", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
    ]


class Launch(ctypes.Structure):
    _fields_ = [("config", Config), ("kernel", ctypes.c_void_p), ("arguments", ctypes.c_uint64 * 16)]


def build_driver(compiler: str) -> Path:
    """Compile it, unless that was done from this source."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    built = SOURCE.parent / "build" / f"driver-{digest}" / "libcuda.so.1"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent) as scratch:
            fresh = Path(scratch) / built.name
            options = ["-x", "c", "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1"]
            subprocess.run([compiler, *options, str(SOURCE), "-o", str(fresh)], check=True)
            os.replace(fresh, built)
    return built


class StandInDriver:
    """Attributes are what was launched so far."""

    def __init__(self, built: Path) -> None:
        """Load it where the real one would be looked for: whoever asks for libcuda.so.1 gets it."""
        self._library = ctypes.CDLL(str(built), mode=ctypes.RTLD_GLOBAL)
        self._library.stand_in_latest.restype = ctypes.POINTER(Launch)

    def expect(self, num_arguments: int) -> None:
        self._library.stand_in_expect(num_arguments)

    @property
    def latest(self) -> Launch:
        launch: Launch = self._library.stand_in_latest().contents
        return launch

    @property
    def num_launches(self) -> int:
        return int(self._library.stand_in_num_launches())

    @property
    def num_libraries(self) -> int:
        return int(self._library.stand_in_num_libraries())

    @property
    def allowed_shared_bytes(self) -> int:
        return int(self._library.stand_in_allowed_shared_bytes())
