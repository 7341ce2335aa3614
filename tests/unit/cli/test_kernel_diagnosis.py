from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.diagnosis import Finding, Subject, check_kernels, check_model
from cuda_ops import native
from cuda_ops.native import use_kernels
from tests.support.coded_folders import CodedFormat, write_coded_folder
from tests.support.kernels import built_levels
from tests.support.model_folders import make_model_folder


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


def test_doctor_says_what_becomes_of_stored_codes_and_refuses_those_that_are_not_served(
    tmp_path: Path,
) -> None:
    plain = make_model_folder(
        "llama", tmp_path / "plain", hidden_size=64, num_attention_heads=4, intermediate_size=64
    )
    coded, _ = write_coded_folder(plain, CodedFormat("awq"), tmp_path)
    (found,) = check_model(Subject({}, model=str(coded)))
    config = (coded / "config.json").read_text()
    (coded / "config.json").write_text(config.replace('"gemm"', '"gemv"'))
    (refused,) = check_model(Subject({}, model=str(coded)))

    assert found.state == "ok"
    assert "awq, 4 bits, groups of 32: on a GPU they stay so with --dtype bfloat16, int8" in found.detail
    assert refused.state == "missing"
    assert "version='gemv': must be gemm" in refused.detail
