"""Which steps are drawn, and what the drawn ones say of the requests: over the real engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import floor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import Sampler, SamplingResult
from opentelemetry.trace import SpanContext, Tracer

from engine.config import EngineConfig
from engine.sampling import SamplingParams
from engine.stats import StepStats
from jobs.errors import SettingsError
from jobs.settings import read_settings
from telemetry import names
from tests.support.model_folders import make_model_folder
from tests.support.processes import wait_until
from workers.engines.inline_runtime import InlineRuntime
from workers.engines.protocol import EngineRequest, Progress, Refused, StepSampling
from workers.engines.runtime import Generation
from workers.engines.steps import UNTRACED, StepTracer
from workers.settings import WorkerSettings

EVERY_STEP = StepSampling(ratio=1.0)


@given(ratio=st.floats(0, 1), num_steps=st.integers(1, 2_000))
def test_sampling_chooses_its_part_of_any_number_of_steps(ratio: float, num_steps: int) -> None:
    sampling = StepSampling(ratio)

    chosen = [number for number in range(1, num_steps + 1) if sampling.chooses(number, 0.1)]

    assert len(chosen) == floor(num_steps * ratio)


@pytest.mark.parametrize(
    ("ratio", "chosen"), [(0.0, []), (0.25, [4, 8]), (0.3, [4, 7, 10]), (1.0, [*range(1, 11)])]
)
def test_sampling_spaces_the_chosen_steps_evenly(ratio: float, chosen: list[int]) -> None:
    sampling = StepSampling(ratio)

    assert [number for number in range(1, 11) if sampling.chooses(number, 9.0)] == chosen


def test_sampling_chooses_each_step_longer_than_the_threshold() -> None:
    sampling = StepSampling(ratio=0.5, slow_seconds=0.2)

    assert sampling.chooses(1, 0.21)
    assert not sampling.chooses(1, 0.2)
    assert sampling.chooses(2, 0.1)
    assert not StepSampling(ratio=0.5).chooses(1, 1e9)


@pytest.mark.parametrize(
    ("steps", "slow", "sampling"),
    [
        (None, None, None),
        ("0", None, None),
        ("0.01", None, StepSampling(0.01)),
        ("0", "0.5", StepSampling(0.0, 0.5)),
        ("1", "2", StepSampling(1.0, 2.0)),
    ],
)
def test_settings_turn_step_tracing_on_only_when_asked(
    monkeypatch: pytest.MonkeyPatch, steps: str | None, slow: str | None, sampling: StepSampling | None
) -> None:
    for name, value in (("TRACE_STEPS", steps), ("TRACE_SLOW_STEPS_SECONDS", slow)):
        if value is not None:
            monkeypatch.setenv(f"THROUGHLINE_{name}", value)

    assert read_settings(WorkerSettings).step_sampling == sampling


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("TRACE_STEPS", "1.5", "less than or equal to 1"),
        ("TRACE_STEPS", "-0.1", "greater than or equal to 0"),
        ("TRACE_STEPS", "nan", "finite"),
        ("TRACE_STEPS", "all", "valid number"),
        ("TRACE_SLOW_STEPS_SECONDS", "0", "greater than 0"),
        ("TRACE_SLOW_STEPS_SECONDS", "inf", "finite"),
    ],
)
def test_bad_setting_is_refused_with_variable_value_and_rule(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, rule: str
) -> None:
    monkeypatch.setenv(f"THROUGHLINE_{name}", value)

    with pytest.raises(SettingsError) as refused:
        read_settings(WorkerSettings)

    assert f"THROUGHLINE_{name}='{value}'" in str(refused.value)
    assert rule in str(refused.value)


@dataclass
class Lab:
    runtime: InlineRuntime
    steps: StepTracer
    tracer: Tracer
    exporter: InMemorySpanExporter

    def submit(self, *ids: str, length: int = 5, max_tokens: int = 6) -> tuple[Generation, SpanContext]:
        """Inside a span of its own, as an attempt does inside its process span."""
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        requests = tuple(
            EngineRequest(id, (10 + len(id) + index, *range(20, 19 + length)), sampling)
            for index, id in enumerate(ids)
        )
        with self.tracer.start_as_current_span("process q") as span:
            return self.runtime.submit(requests), span.get_span_context()

    def drawn(self) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.name == "engine.step"]

    def total(self, key: str) -> int:
        return sum(int(str((span.attributes or {})[key])) for span in self.drawn())

    def links(self, role: str) -> Counter[int]:
        """How many steps link to each span."""
        return Counter(
            link.context.span_id
            for span in self.drawn()
            for link in span.links
            if dict(link.attributes or {})[names.LINK_ROLE] == role
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steps") / "llama"
    make_model_folder("llama", folder)
    return folder


@contextmanager
def laboratory(folder: Path, sampling: StepSampling | None, **config: int) -> Iterator[Lab]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    steps = StepTracer(sampling, tracer)
    engine = EngineConfig(
        model=str(folder), num_threads=1, max_model_len=64, block_size=4, keeps_prefixes=False, **config
    )
    runtime = InlineRuntime(engine, steps=steps)
    runtime.start()
    try:
        yield Lab(runtime, steps, tracer, exporter)
    finally:
        runtime.stop()


def test_each_request_joins_one_step_and_leaves_one_and_the_steps_add_up(folder: Path) -> None:
    with laboratory(folder, EVERY_STEP) as lab:
        submitted = [lab.submit(f"r{number}", length=5 + number) for number in range(4)]
        outputs = [generation.future.result(60)[0] for generation, _ in submitted]

    wanted = Counter(span.span_id for _, span in submitted)
    assert lab.links(names.LINK_JOINED) == wanted
    assert lab.links(names.LINK_LEFT) == wanted
    assert lab.total(names.STEP_PREFILL_TOKENS) == sum(o.usage.prompt_tokens for o in outputs) == 26
    assert lab.total(names.STEP_DECODE_TOKENS) == sum(o.usage.completion_tokens - 1 for o in outputs) == 20
    assert lab.total(names.STEP_BATCH_SIZE) == sum(o.phases.num_steps for o in outputs)
    assert len(lab.steps) == 0


def test_preempted_request_joins_again_and_each_prefill_knows_its_step(folder: Path) -> None:
    with laboratory(folder, EVERY_STEP, num_blocks=12) as lab:
        submitted = [lab.submit(f"r{number}", max_tokens=28) for number in range(3)]
        outputs = [generation.future.result(60)[0] for generation, _ in submitted]
        by_id = {span.context.span_id: span for span in lab.drawn() if span.context}

    assert sum(output.phases.num_preemptions for output in outputs) > 0
    for (generation, span), output in zip(submitted, outputs, strict=True):
        prefills = [interval.start for interval in output.phases.intervals if interval.name == "prefill"]
        admitted_by = generation.traced[output.request_id].admitted_by
        assert list(admitted_by) == prefills
        assert (
            len(prefills) == 1 + output.phases.num_preemptions == lab.links(names.LINK_JOINED)[span.span_id]
        )
        for step in admitted_by.values():
            assert span.span_id in {link.context.span_id for link in by_id[step.span_id].links}
    assert lab.links(names.LINK_LEFT) == Counter(span.span_id for _, span in submitted)
    assert lab.total(names.STEP_PREEMPTED) == sum(output.phases.num_preemptions for output in outputs)


def test_prompts_of_one_job_share_a_link_and_are_counted(folder: Path) -> None:
    with laboratory(folder, EVERY_STEP) as lab:
        generation, span = lab.submit("a", "b", "c")
        generation.future.result(60)

    assert lab.links(names.LINK_JOINED) == Counter({span.span_id: 1})
    assert lab.total(names.STEP_JOINED) == lab.total(names.STEP_LEFT) == 3


def test_aborted_request_is_seen_to_leave_after_its_attempt_is_over(folder: Path) -> None:
    with laboratory(folder, EVERY_STEP) as lab:
        generation, span = lab.submit("long", max_tokens=50)
        lab.runtime.abort(generation)
        wait_until(lambda: len(lab.steps) == 0, timeout_seconds=30, what="the engine let it go")

        assert lab.links(names.LINK_LEFT) == Counter({span.span_id: 1})


def test_refused_request_is_forgotten_and_joins_nothing(folder: Path) -> None:
    with laboratory(folder, EVERY_STEP) as lab:
        generation, _ = lab.submit("too-long", length=200)
        assert isinstance(generation.future.result(60)[0], Refused)

        assert len(lab.steps) == 0
        assert not lab.links(names.LINK_JOINED)


def test_sampled_steps_alone_are_drawn(folder: Path) -> None:
    with laboratory(folder, StepSampling(ratio=0.25)) as lab:
        generation, _ = lab.submit("r", max_tokens=20)
        (output,) = generation.future.result(60)

    assert output.phases.num_steps == 20
    assert len(lab.drawn()) == 5
    assert generation.traced["r"].admitted_by == {}  # the first step, which admitted it, is not sampled


def test_no_step_is_drawn_or_remembered_when_off(folder: Path) -> None:
    with laboratory(folder, None) as lab:
        generation, _ = lab.submit("r")
        generation.future.result(60)

    assert not lab.drawn()
    assert generation.traced == {}
    assert len(lab.steps) == len(UNTRACED) == 0


class Broken(Sampler):
    """As a sampler of an operator's own may be."""

    def should_sample(self, *_: Any, **__: Any) -> SamplingResult:
        raise RuntimeError("no decision")

    def get_description(self) -> str:
        return "Broken"


def test_broken_tracing_keeps_no_future_waiting(caplog: pytest.LogCaptureFixture) -> None:
    steps = StepTracer(EVERY_STEP, TracerProvider(Broken(), shutdown_on_exit=False).get_tracer("test"))
    steps.enter([EngineRequest("a", (1,), SamplingParams())])
    stats = StepStats(0.0, 0.1, 1, 5, 0, 1, 0, 1, 64, 0, ("a",), ())

    steps.progressed(Progress((), refused=(Refused("a", "invalid_request", "too long"),), steps=(stats,)))

    assert len(steps) == 0
    assert "not drawn" in caplog.text


def test_lost_engine_takes_its_requests_along() -> None:
    steps = StepTracer(EVERY_STEP)
    sampling = SamplingParams()
    traced = steps.enter(EngineRequest(id, (1,), sampling) for id in ("a", "b"))

    steps.leave_all()

    assert set(traced) == {"a", "b"}
    assert len(steps) == 0
