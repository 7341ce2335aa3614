from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from tests.support.model_folders import make_model_folder


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def opt_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder("opt", tmp_path_factory.mktemp("opt"))


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def opt_reference(opt_folder: Path) -> transformers.PreTrainedModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(opt_folder)
    assert isinstance(model, transformers.PreTrainedModel)
    return model.eval()
