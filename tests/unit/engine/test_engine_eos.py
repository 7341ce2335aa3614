from __future__ import annotations

import json
from pathlib import Path

from engine.config import EngineConfig
from engine.core import Engine
from tests.support.model_folders import make_model_folder


def test_engine_ends_on_the_tokens_of_generation_config(tmp_path: Path) -> None:
    """Chat models list more ends there than in config.json; without them they run on to max_tokens."""
    make_model_folder("llama", tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    told = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**told, "eos_token_id": [2, 7]}), encoding="utf-8")

    engine = Engine.from_config(EngineConfig(model=str(tmp_path / "model"), num_threads=1))

    assert set(engine.model_info.eos_token_ids) == {2, 7}
