from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.sampling import SamplingParams
from tests.support.model_folders import make_model_folder
from workers.engines.inline_runtime import InlineRuntime
from workers.engines.protocol import EngineRequest, Refused
from workers.errors import EngineStartError


def request(id: str, *, length: int = 5, **params: object) -> EngineRequest:
    sampling = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, **params)  # type: ignore[arg-type]
    return EngineRequest(id, tuple(range(10, 10 + length)), sampling)


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InlineRuntime]:
    folder = tmp_path_factory.mktemp("inline") / "llama"
    make_model_folder("llama", folder)
    runtime = InlineRuntime(EngineConfig(model=str(folder), num_threads=1, max_model_len=64))
    runtime.start()
    yield runtime
    runtime.stop()


def test_generation_resolves_in_the_order_of_its_requests(runtime: InlineRuntime) -> None:
    generation = runtime.submit((request("b", length=40), request("a")))

    outputs = generation.future.result(timeout=60)

    assert [output.request_id for output in outputs] == ["b", "a"]
    assert [output.usage.completion_tokens for output in outputs] == [4, 4]


def test_refusal_names_the_rule_and_leaves_the_engine_alone(runtime: InlineRuntime) -> None:
    refused = runtime.submit((request("long", length=200),))
    served = runtime.submit((request("short"),))

    (refusal,) = refused.future.result(timeout=60)
    assert isinstance(refusal, Refused)
    assert refusal.reason == "invalid_request"
    assert served.future.result(timeout=60)


def test_aborted_generation_leaves_no_trace_of_its_requests(runtime: InlineRuntime) -> None:
    first = runtime.submit((request("again"),))
    runtime.abort(first)

    second = runtime.submit((request("again"),))

    assert second.future.result(timeout=60)[0].request_id == "again"


def test_start_fails_in_one_line_when_the_folder_is_missing(tmp_path: Path) -> None:
    runtime = InlineRuntime(EngineConfig(model=str(tmp_path / "nothing")))

    with pytest.raises(EngineStartError) as error:
        runtime.start()

    assert "\n" not in str(error.value)
    assert "nothing" in str(error.value)
