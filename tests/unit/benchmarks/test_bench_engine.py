"""The engine's benchmark on a model that takes no time: what it prints, draws and refuses, never how fast."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import bench_engine
from benchmarks.chart import Panel, draw
from benchmarks.workload import WorkloadError, load_workload, make_workload
from tests.support.model_folders import make_model_folder

SVG = "{http://www.w3.org/2000/svg}"
FEW = [
    {"id": "a", "prompt_ids": [5, 6, 7], "max_new_tokens": 4},
    {"id": "b", "prompt_ids": [8], "max_new_tokens": 2},
    {"id": "c", "prompt_ids": [9, 10], "max_new_tokens": 3},
]

Run = Callable[..., None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    def run_with(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["throughline bench engine", *map(str, arguments)])
        bench_engine.main()

    return run_with


def workload(path: Path, requests: object) -> Path:
    path.write_text(json.dumps({"requests": requests}), encoding="utf-8")
    return path


def test_bench_engine_prints_rates_and_draws_them_by_batch_size(
    folder: Path, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    file, chart = workload(tmp_path / "few.json", FEW), tmp_path / "chart.svg"
    few = ("--repeats", 1, "--threads", 1, "--batch-sizes", 2, "--chart", chart, "--chart-sizes", 1, 3, 64)

    run("--model", folder, "--workload", file, *few)

    printed = capsys.readouterr().out
    for name in ("engine, int8", "engine, plain-torch ops", "transformers, batches of 2"):
        assert name in printed
    assert "9 output tokens, bfloat16, 1 threads" in printed
    assert "by size of the batch" in printed
    assert "█" in printed
    texts = [text.text for text in ElementTree.parse(chart).iter(f"{SVG}text")]
    assert {"output tokens per second", "ms a token", "engine", "requests in the batch", "1", "3"} <= set(
        texts
    )
    assert "64" not in texts, "the workload has no 64 requests"


def test_bench_engine_compares_only_those_that_are_named(
    folder: Path, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    file = workload(tmp_path / "few.json", FEW)

    run(
        "--model",
        folder,
        "--workload",
        file,
        "--repeats",
        1,
        "--threads",
        1,
        "--contestants",
        "int8",
        "engine",
    )

    printed = capsys.readouterr().out
    assert "ratio to the first" in printed
    assert "transformers, batches" not in printed
    assert "plain-torch" not in printed


def test_bench_engine_names_what_is_wrong_and_measures_nothing(
    folder: Path, tmp_path: Path, run: Run
) -> None:
    file = workload(tmp_path / "few.json", [{**FEW[0], "prompt_ids": [5, 384]}])

    with pytest.raises(SystemExit, match=r"error: .*nowhere: there is no such folder"):
        run("--model", tmp_path / "nowhere")
    with pytest.raises(SystemExit, match=r"error: .*few.json: is no JSON file"):
        run("--model", folder, "--workload", tmp_path / "no" / "few.json")
    with pytest.raises(SystemExit, match=r"error: prompt_token_ids=384: must be whole numbers from 0 to 383"):
        run("--model", folder, "--workload", file, "--repeats", 1, "--threads", 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": 5}, r"requests\[0\]\.id must be a string"),
        ({"prompt_ids": []}, r"requests\[0\]\.prompt_ids must be"),
        ({"prompt_ids": ["a"]}, r"requests\[0\]\.prompt_ids must be"),
        ({"max_new_tokens": 0}, r"requests\[0\]\.max_new_tokens must be"),
        ({"max_new_tokens": None}, r"requests\[0\]\.max_new_tokens must be"),
        ({"id": "b"}, "the id 'b' comes 2 times"),
    ],
)
def test_workload_is_refused_by_file_field_and_rule(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    file = workload(tmp_path / "few.json", [{**FEW[0], **change}, *FEW[1:]])

    with pytest.raises(WorkloadError, match=rf"few\.json: {message}"):
        load_workload(file)


@pytest.mark.parametrize("requests", [None, [], {}, [5]])
def test_workload_without_requests_is_refused(tmp_path: Path, requests: object) -> None:
    with pytest.raises(WorkloadError, match=r"few\.json: requests"):
        load_workload(workload(tmp_path / "few.json", requests))


def test_workload_that_is_made_fits_the_vocabulary_and_is_the_same_each_time() -> None:
    made = make_workload(vocab_size=50)

    assert made == make_workload(vocab_size=50)
    assert {token_id for request in made for token_id in request.prompt_ids} == set(range(10, 50))


def test_chart_puts_larger_values_higher_and_doubled_sizes_at_equal_steps() -> None:
    lines = {"a<b": [(1.0, 10.0), (2.0, 30.0), (4.0, 20.0)], "other": [(1.0, 5.0), (4.0, 40.0)]}

    root = ElementTree.fromstring(draw([Panel("rates", lines)], "size"))

    first, second = (
        [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
        for line in root.iter(f"{SVG}polyline")
    )
    steps = [after[0] - before[0] for before, after in pairwise(first)]
    assert steps[0] == pytest.approx(steps[1], abs=0.2)
    assert first[0][1] > first[2][1] > first[1][1] > second[1][1]
    assert {line.attrib["stroke"] for line in root.iter(f"{SVG}polyline")} == {"#0072b2", "#d55e00"}
    assert "a<b" in {text.text for text in root.iter(f"{SVG}text")}
