"""Building: once, never against a wish, and without a compiler the reference stays."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cuda_ops import native
from cuda_ops.cpu import build
from cuda_ops.errors import KernelsUnavailableError


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    """Nothing here runs an op."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (*build.SOURCES, "build.py"):
        shutil.copy(build.FOLDER / name, tmp_path / name)
    return tmp_path


def make_compiler(folder: Path, script: str) -> dict[str, str]:
    """Put a stand-in compiler there; each call leaves a line in `calls`."""
    compiler = folder / "compiler"
    compiler.write_text(f'#!/bin/sh\necho call >>"{folder}/calls"\n{script}\n')
    compiler.chmod(0o755)
    return {"CXX": str(compiler)}


def num_calls(folder: Path) -> int:
    calls = folder / "calls"
    return len(calls.read_text().splitlines()) if calls.exists() else 0


WRITES_ITS_OUTPUT = 'while [ "$1" != -o ]; do shift; done; : >"$2"'


def test_build_compiles_once_and_again_when_a_source_changed(folder: Path) -> None:
    environ = make_compiler(folder, WRITES_ITS_OUTPUT)
    assert build.main(environ, folder) == 0
    first, calls = build.library_path(folder), num_calls(folder)
    assert first.exists()

    assert build.main(environ, folder) == 0
    assert num_calls(folder) == calls

    (folder / "vector.h").write_text("// changed\n")
    assert build.main(environ, folder) == 0
    assert build.library_path(folder).exists()
    assert not first.exists()


def test_build_without_a_compiler_says_so_and_leaves_no_library(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build.main({"CXX": "no-such-compiler"}, folder) == 1

    assert "no C++ compiler: none of no-such-compiler is there" in capsys.readouterr().err
    assert not build.library_path(folder).exists()
    assert not build.failure_path(build.library_path(folder)).exists()


def test_build_keeps_what_a_failing_compiler_said_and_does_not_try_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environ = make_compiler(folder, "echo 'error: no such header'; exit 1")
    assert build.main(environ, folder) == 1
    calls = num_calls(folder)

    assert build.main(environ, folder) == 1

    assert num_calls(folder) == calls
    assert "error: no such header" in build.failure_path(build.library_path(folder)).read_text()
    assert "earlier" in capsys.readouterr().err


def test_build_says_what_hindered_it_when_nothing_can_be_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "build").write_text("in the way")

    assert build.main(make_compiler(folder, WRITES_ITS_OUTPUT), folder) == 1

    assert "plain torch takes their place" in capsys.readouterr().err


def test_kernels_fall_back_to_the_reference_when_nothing_was_built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(native, "library_path", lambda: tmp_path / "throughline_cpu-0.so")

    in_use = native.use_kernels("auto")

    assert in_use.level is None
    assert "make setup" in in_use.reason
    with pytest.raises(KernelsUnavailableError, match="not built"):
        native.use_kernels("native")


def test_kernels_that_torch_cannot_load_are_told_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "throughline_cpu-0.so"
    library.write_text("no library")
    monkeypatch.setattr(native, "library_path", lambda: library)

    assert "2.11 or newer" in native.use_kernels("auto").reason
