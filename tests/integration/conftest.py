from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.model_folders import make_model_folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama's shape with random weights, for whoever only reads it."""
    folder = tmp_path_factory.mktemp("model") / "llama"
    make_model_folder("llama", folder)
    return folder
