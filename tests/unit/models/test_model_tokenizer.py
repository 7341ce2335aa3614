from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers, processors
from tokenizers.decoders import Metaspace

from engine.errors import ModelLoadError
from engine.tokenizer import Tokenizer
from tests.support.model_folders import make_model_folder, write_text

TEXTS = [
    "",
    " ",
    "San Francisco is a",
    write_text(30, seed=5),
    "naïve 𝄞 日本語 \t\n\u0000",
    "</s> in the text",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder("opt", tmp_path_factory.mktemp("opt"))


def write_two_files(folder: Path, target: Path, **config: Any) -> Path:
    """Write the same vocabulary as GPT-2's two files, the way facebook/opt-125m is published."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (target / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = [" ".join(pair) for pair in model["merges"]]
    (target / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]))
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    return target


OPT_CONFIG = {
    "add_bos_token": True,
    "bos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
    "eos_token": "</s>",
    "unk_token": "</s>",
    "pad_token": "<pad>",
}


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_round_trips_text_and_puts_the_leading_token_first(folder: Path, text: str) -> None:
    tokenizer = Tokenizer.from_folder(folder)

    ids = tokenizer.encode(text)

    assert ids[0] == 2
    assert ids[1:] == tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text.replace("</s>", "")
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"</s>{text}"


@pytest.mark.parametrize("text", TEXTS)
def test_vocabulary_and_merges_make_the_same_tokenizer_as_transformers(
    folder: Path, tmp_path: Path, text: str
) -> None:
    two_files = write_two_files(folder, tmp_path, **OPT_CONFIG)
    oracle = transformers.GPT2Tokenizer.from_pretrained(two_files)

    tokenizer = Tokenizer.from_folder(two_files)

    assert tokenizer.encode(text) == oracle(text).input_ids
    assert tokenizer.encode(text) == Tokenizer.from_folder(folder).encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("</s>", "")
    assert tokenizer.eos_token_ids == (2,)


@pytest.mark.parametrize("text", TEXTS)
def test_json_alone_rebuilds_the_same_tokenizer(folder: Path, tmp_path: Path, text: str) -> None:
    for source in (folder, write_two_files(folder, tmp_path, **OPT_CONFIG)):
        tokenizer = Tokenizer.from_folder(source)

        rebuilt = tokenizers.Tokenizer.from_str(tokenizer.to_json())

        assert rebuilt.encode(text).ids == tokenizer.encode(text)


def test_leading_token_is_added_when_only_the_config_asks_for_it(folder: Path, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.save(str(tmp_path / "tokenizer.json"))
    plain = Tokenizer.from_folder(tmp_path).encode("ba")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "bos_token": "</s>"}))

    assert Tokenizer.from_folder(tmp_path).encode("ba") == [2, *plain]


def test_truncation_and_padding_of_the_file_are_dropped(folder: Path, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = write_text(40)

    assert Tokenizer.from_folder(tmp_path).encode(text) == Tokenizer.from_folder(folder).encode(text)


def test_token_text_joins_to_the_text_and_names_special_tokens(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    text = write_text(10)

    pieces = [tokenizer.id_to_token_text(token) for token in tokenizer.encode(text)]

    assert pieces[0] == "</s>"
    assert "".join(pieces[1:]) == text
    assert tokenizer.id_to_token_text(10**6) == ""


def test_token_text_keeps_the_space_that_a_sentencepiece_decoder_drops() -> None:
    vocabulary = {"<unk>": 0, "▁the": 1, "n": 2}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = Metaspace()

    assert Tokenizer(backend).id_to_token_text(1) == " the"
    assert Tokenizer(backend).id_to_token_text(2) == "n"


def test_vocabulary_that_does_not_fit_its_merges_is_refused(folder: Path, tmp_path: Path) -> None:
    two_files = write_two_files(folder, tmp_path)
    (two_files / "vocab.json").write_text('{"a": 0}')

    with pytest.raises(ModelLoadError, match=r"vocab\.json: with merges\.txt is no byte-level BPE"):
        Tokenizer.from_folder(two_files)


def test_leading_token_that_has_no_name_is_refused(folder: Path, tmp_path: Path) -> None:
    two_files = write_two_files(folder, tmp_path, add_bos_token=True)

    with pytest.raises(ModelLoadError, match="bos_token=None: must name a token"):
        Tokenizer.from_folder(two_files)
