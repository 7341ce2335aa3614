from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from engine.config import EngineConfig
from engine.core import Engine
from tests.support.model_folders import make_model_folder
from workers.engines.loading import show_loading


def _load(folder: Path, *, is_terminal: bool) -> str:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=is_terminal, width=120)
    with show_loading(console) as loading:
        Engine.from_config(EngineConfig(model=str(folder), num_blocks=8, num_threads=1), loading=loading)
        assert loading.progress.tasks[0].finished
    return screen.getvalue()


def test_loading_draws_stage_and_bytes_on_a_terminal_and_nothing_elsewhere(tmp_path: Path) -> None:
    folder = make_model_folder("llama", tmp_path)

    assert _load(folder, is_terminal=False) == ""
    drawn = _load(folder, is_terminal=True)
    assert "loading the weights of LlamaForCausalLM" in drawn
    assert " kB" in drawn
