from __future__ import annotations

from pathlib import Path

import pytest

from cli.settings import ServeOptions, environment, served_names, with_project_importable


def test_environment_keeps_what_no_option_names() -> None:
    base = {"HOME": "/home/me", "THROUGHLINE_DTYPE": "bfloat16"}

    made = environment(ServeOptions(device="cpu"), base)

    assert made["HOME"] == "/home/me"
    assert (made["THROUGHLINE_DTYPE"], made["THROUGHLINE_DEVICE"]) == ("bfloat16", "cpu")
    assert "THROUGHLINE_REDIS_URL" not in made
    assert "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT" not in made


def test_option_beats_the_variable() -> None:
    made = environment(ServeOptions(redis_url="unix:///new"), {"THROUGHLINE_REDIS_URL": "redis://old"})

    assert made["THROUGHLINE_REDIS_URL"] == "unix:///new"


def test_step_tracing_reaches_the_worker_and_can_be_turned_off_by_option() -> None:
    variables = {"THROUGHLINE_TRACE_STEPS": "0.5"}

    made = environment(ServeOptions(trace_steps=0.0, trace_slow_steps_seconds=0.25), variables)

    assert made["THROUGHLINE_TRACE_STEPS"] == "0.0"
    assert made["THROUGHLINE_TRACE_SLOW_STEPS_SECONDS"] == "0.25"
    assert environment(ServeOptions(), variables)["THROUGHLINE_TRACE_STEPS"] == "0.5"
    assert "THROUGHLINE_TRACE_SLOW_STEPS_SECONDS" not in environment(ServeOptions(), variables)


def test_speculation_and_batch_invariance_reach_the_worker_only_where_they_are_asked_for() -> None:
    made = environment(ServeOptions(speculative_tokens=0, is_batch_invariant=True), {})

    assert made["THROUGHLINE_SPECULATIVE_TOKENS"] == "0"
    assert made["THROUGHLINE_BATCH_INVARIANT"] == "true"
    names = {"THROUGHLINE_SPECULATIVE_TOKENS", "THROUGHLINE_BATCH_INVARIANT"}
    assert not names & set(environment(ServeOptions(), {}))


@pytest.mark.parametrize(
    ("options", "base", "names"),
    [
        (ServeOptions(), {}, ("throughline-tiny", "facebook/opt-125m")),
        (ServeOptions(served_model_names=("a", "b")), {"THROUGHLINE_SERVED_MODEL_NAMES": "c"}, ("a", "b")),
        (ServeOptions(), {"THROUGHLINE_SERVED_MODEL_NAMES": "c, d,"}, ("c", "d")),
        (ServeOptions(model="org/name"), {}, ("org/name",)),
        (ServeOptions(), {"THROUGHLINE_MODEL": "org/name"}, ("org/name",)),
    ],
)
def test_served_names_come_from_option_then_variable_then_model(
    options: ServeOptions, base: dict[str, str], names: tuple[str, ...]
) -> None:
    assert served_names(options, base) == names


def test_model_folder_is_served_by_its_name_and_handed_down_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "opt-125m").mkdir()
    monkeypatch.chdir(tmp_path)

    made = environment(ServeOptions(model="./opt-125m"), {})

    assert made["THROUGHLINE_MODEL"] == str(tmp_path / "opt-125m")
    assert made["THROUGHLINE_SERVED_MODEL_NAMES"] == "opt-125m"


@pytest.mark.parametrize(
    ("base", "threads"),
    [({}, "1"), ({"THROUGHLINE_NUM_THREADS": "4"}, "4"), ({"OMP_NUM_THREADS": "2"}, None)],
)
def test_builtin_model_runs_on_one_thread_unless_somebody_says_otherwise(
    base: dict[str, str], threads: str | None
) -> None:
    assert environment(ServeOptions(), base).get("THROUGHLINE_NUM_THREADS") == threads


def test_other_models_keep_torchs_own_number_of_threads() -> None:
    assert "THROUGHLINE_NUM_THREADS" not in environment(ServeOptions(model="org/name"), {})


def test_project_stands_before_what_was_on_the_path() -> None:
    first, second = with_project_importable({"PYTHONPATH": "/theirs"})["PYTHONPATH"].split(":")

    assert (Path(first) / "cli" / "settings.py").is_file()
    assert second == "/theirs"
