from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cuda_ops import native
from cuda_ops.errors import KernelsUnavailableError
from cuda_ops.native import use_kernels
from engine.config import EngineConfig
from engine.core import Engine
from engine.errors import ConfigError
from tests.support.kernels import built_levels
from tests.unit.engine.engine_factory import GREEDY, generate, make_engine, random_prompt


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    use_kernels("auto")


def greedy_tokens(folder: Path, kernels: str) -> dict[str, list[tuple[int, ...]]]:
    prompts = {str(size): random_prompt(size, seed=size) for size in (1, 3, 17, 64, 65, 130)}
    engine = make_engine(folder, kernels=kernels, num_threads=1)
    run = generate(engine, {name: (prompt, GREEDY) for name, prompt in prompts.items()})
    return {name: run.tokens(name) for name in prompts}


@pytest.mark.parametrize("model", ["opt_folder", "llama_folder"])
def test_engine_gives_the_same_greedy_tokens_with_native_kernels(
    model: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(model)
    assert built_levels()

    assert greedy_tokens(folder, "native") == greedy_tokens(folder, "reference")


def test_engine_says_which_kernels_it_took(opt_folder: Path) -> None:
    class Told:
        def __init__(self) -> None:
            self.stages: list[str] = []

        def on_stage(self, what: str) -> None:
            self.stages.append(what)

        def on_weights(self, num_bytes: int, total_bytes: int) -> None: ...

    told, config = Told(), EngineConfig(model=str(opt_folder), num_blocks=8, kernels="reference")
    Engine.from_config(config, loading=told)

    assert any(line.startswith("CPU kernels: reference in plain torch") for line in told.stages)


def test_engine_refuses_native_kernels_that_are_not_there(
    opt_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(native, "library_path", lambda: tmp_path / "nothing.so")

    with pytest.raises(ConfigError, match=r"^kernels='native': cannot be had: .* not built") as caught:
        make_engine(opt_folder, kernels="native")

    assert isinstance(caught.value.__cause__, KernelsUnavailableError)
