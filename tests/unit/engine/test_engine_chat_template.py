from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from engine.chat_template import read_chat_template
from engine.errors import ModelLoadError

SOURCE = "{{ bos_token }}{{ messages[0].content }}\n"


@pytest.fixture
def folder(llama_folder: Path, tmp_path: Path) -> Path:
    """Files of a tokenizer, without weights."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llama_folder / name, tmp_path)
    return tmp_path


def configure(folder: Path, **fields: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("is_file", [True, False])
def test_chat_template_is_read_as_transformers_reads_it(folder: Path, is_file: bool) -> None:
    configure(folder, chat_template="other" if is_file else SOURCE)
    if is_file:
        (folder / "chat_template.jinja").write_text(SOURCE)

    template = read_chat_template(folder)

    reference = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert template is not None
    assert template.source == reference.chat_template == SOURCE
    assert (
        template.special_tokens == reference.special_tokens_map == {"bos_token": "<s>", "eos_token": "</s>"}
    )


def test_chat_template_is_the_default_one_of_several(folder: Path) -> None:
    configure(
        folder, chat_template=[{"name": "rag", "template": "x"}, {"name": "default", "template": SOURCE}]
    )

    template = read_chat_template(folder)

    assert template is not None
    assert template.source == SOURCE


def test_chat_template_is_none_where_the_model_has_none(folder: Path) -> None:
    assert read_chat_template(folder) is None


@pytest.mark.parametrize("broken", [7, [{"name": "rag", "template": "x"}]])
def test_chat_template_that_is_none_is_refused_by_name(folder: Path, broken: object) -> None:
    configure(folder, chat_template=broken)

    with pytest.raises(ModelLoadError, match="chat_template"):
        read_chat_template(folder)
