from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from cli.settings import PROJECT_FOLDER

# Stands in for an interpreter: has the right version, makes a "venv" whose python logs what it is asked.
INTERPRETER = """#!/bin/sh
case "$1" in
  -c) exit 0 ;;
  -m) [ "$2" = venv ] && mkdir -p "$3/bin" && cp "$0" "$3/bin/python" &&
        cp "$(dirname "$0")/uv" "$3/bin/uv" && exit 0
      echo "pip $*" >>"$LOG"; [ -z "${PIP_FAILS:-}" ] ;;
esac
"""
UV = """#!/bin/sh
echo "uv $*" >>"$LOG"
[ -z "${UV_FAILS:-}" ]
"""


class Checkout:
    """A folder, with a space in its name, that holds what the script reads."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "my checkout"
        (self.path / "scripts").mkdir(parents=True)
        for name in ("pyproject.toml", "constraints.txt", "scripts/bootstrap.sh"):
            shutil.copy(PROJECT_FOLDER / name, self.path / name)
        self._log = folder / "log"
        for name, text in (("python", INTERPRETER), ("uv", UV)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        self._environ = {
            "PATH": os.environ["PATH"],
            "PYTHON": str(folder / "python"),
            "LOG": str(self._log),
            "PIP_FIND_LINKS": "/wheels",
        }

    def bootstrap(self, *extras: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", str(self.path / "scripts/bootstrap.sh"), *extras], env={**self._environ, **variables},
            capture_output=True, text=True, check=False, timeout=30, cwd="/",
        )  # fmt: skip

    def take_log(self) -> list[str]:
        """Return what was asked of pip and uv since the last time."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        self._log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_bootstrap_installs_once_and_then_costs_nothing(checkout: Checkout) -> None:
    assert checkout.bootstrap().returncode == 0
    assert any(".[embedded,worker,test]" in line for line in checkout.take_log())

    assert checkout.bootstrap().returncode == 0
    assert checkout.take_log() == []


def test_bootstrap_adds_an_extra_and_keeps_it(checkout: Checkout) -> None:
    checkout.bootstrap()
    checkout.bootstrap("check")
    assert any(".[embedded,worker,test,check]" in line for line in checkout.take_log())

    checkout.bootstrap()
    checkout.bootstrap("check")
    assert checkout.take_log() == []


def test_bootstrap_installs_again_when_a_dependency_changed(checkout: Checkout) -> None:
    checkout.bootstrap()
    checkout.take_log()

    with (checkout.path / "constraints.txt").open("a") as constraints:
        constraints.write("tzdata==2026.6\n")

    checkout.bootstrap()
    assert checkout.take_log() != []


def test_bootstrap_falls_back_to_pip_when_uv_fails(checkout: Checkout) -> None:
    ended = checkout.bootstrap(UV_FAILS="yes")

    log = checkout.take_log()
    assert ended.returncode == 0
    assert log[-1].startswith("pip -m pip install")
    assert "-c constraints.txt -e .[embedded,worker,test]" in log[-1]


def test_bootstrap_fails_and_tries_again_next_time_when_nothing_could_install(checkout: Checkout) -> None:
    assert checkout.bootstrap(PIP_FAILS="yes").returncode != 0
    checkout.take_log()

    assert checkout.bootstrap().returncode == 0
    assert checkout.take_log() != []


def test_bootstrap_asks_for_the_torch_that_was_named(checkout: Checkout) -> None:
    checkout.bootstrap(TORCH_BACKEND="cu130")

    assert "--torch-backend cu130" in checkout.take_log()[-1]


def test_bootstrap_tries_torch_without_cuda_where_there_is_no_gpu(checkout: Checkout) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has a GPU")

    checkout.bootstrap(PIP_FIND_LINKS="", UV_FAILS="yes")

    backends = ["--torch-backend cpu" in line for line in checkout.take_log() if line.startswith("uv")]
    assert backends == [True, False]


def test_bootstrap_names_the_versions_it_needs_when_the_interpreter_is_none_of_them(
    checkout: Checkout,
) -> None:
    ended = checkout.bootstrap(PYTHON="/bin/false")

    assert ended.returncode == 1
    assert "Python 3.11, 3.12 or 3.13 is needed, and /bin/false is none of them" in ended.stderr
