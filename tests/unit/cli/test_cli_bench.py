from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli.__main__ import _throughline
from cli.commands import bench
from cli.errors import NoBenchmarksError


@pytest.fixture(autouse=True)
def own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark reads the process's arguments, and finds itself by the process's path."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_bench_lists_what_there_is_when_nothing_is_named() -> None:
    listed = CliRunner().invoke(_throughline, ["bench"]).output.split()

    assert {"tracing", "engine"} <= set(listed)


def test_bench_hands_its_options_on_when_one_is_named() -> None:
    result = CliRunner().invoke(_throughline, ["bench", "tracing", "--ways", "100"])

    assert result.exit_code == 2
    assert "throughline bench tracing: error: --ways must hold off" in result.output


def test_bench_is_refused_with_the_names_when_there_is_no_such_benchmark() -> None:
    result = CliRunner().invoke(_throughline, ["bench", "speed"])

    assert result.exit_code == 2
    assert "'speed' is no benchmark; there are accuracy, decode, engine" in result.output


def test_bench_is_refused_when_there_is_no_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "PROJECT_FOLDER", tmp_path)

    result = CliRunner().invoke(_throughline, ["bench", "tracing"])

    assert isinstance(result.exception, NoBenchmarksError)
    assert "from a checkout" in str(result.exception)
