from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.diagnosis import Finding, Subject, check_kernels
from cuda_ops import native
from cuda_ops.native import use_kernels
from tests.support.kernels import built_levels


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    use_kernels("reference")


def finding(choice: str) -> Finding:
    return check_kernels(Subject({"THROUGHLINE_KERNELS": choice}))[0]


def test_doctor_names_the_level_of_the_kernels_that_are_built() -> None:
    best = built_levels()[0]

    assert finding("native") == Finding("kernels cpu", "ok", f"native, {best}")


def test_doctor_notes_that_the_reference_runs_when_nothing_was_built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(native, "library_path", lambda: tmp_path / "nothing.so")

    assert finding("").state == "note"
    assert "make setup" in finding("").detail
    assert finding("native").state == "missing"
    assert finding("reference").state == "ok"


def test_doctor_names_a_choice_that_does_not_exist() -> None:
    assert finding("fast").state == "missing"
    assert "THROUGHLINE_KERNELS='fast' must be one of auto, native, reference" in finding("fast").detail
