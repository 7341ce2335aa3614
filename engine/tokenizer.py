"""Text to token ids and back.

tokenizer.json, or vocab.json + merges.txt ─┐
tokenizer_config.json: the leading token,   ├─▶ one tokenizer, whole in its own JSON
names of the special tokens                ─┘
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from engine.errors import ModelLoadError
from engine.model_config import ConfigFields

# A word's first piece in vocabularies made by SentencePiece.
_SPACE_MARK: Final = "▁"
_SPECIAL_NAMES: Final = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """A model's tokenizer; safe to use from several threads.

    All of its behaviour, special tokens added around a text included, is in the JSON of `to_json`:
    `tokenizers.Tokenizer.from_str` of it encodes and decodes the same.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eos_token_ids: tuple[int, ...] = ()) -> None:
        # A folder's file may ask for truncation or padding, which would change prompts unasked.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.eos_token_ids = eos_token_ids

    @classmethod
    def from_folder(cls, path: Path | str) -> Tokenizer:
        """Read `tokenizer.json`, or build what it would say from `vocab.json` and `merges.txt`.

        Raises:
            ModelLoadError: neither is there, or one is broken.
        """
        folder = Path(path)
        config = read_tokenizer_config(folder)
        file = folder / "tokenizer.json"
        backend = _read_json(file) if file.is_file() else _build_from_vocabulary(folder, config)
        _add_leading_token(backend, config)
        eos = _special_id(backend, config, "eos_token")
        return cls(backend, () if eos is None else (eos,))

    @property
    def vocab_size(self) -> int:
        """Ids that have a token, added ones included; the model's own vocabulary may be larger."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def id_to_token_text(self, token_id: int) -> str:
        """Return one token as the text it adds: special ones by name, bytes that are no character as U+FFFD.

        An id without a token is the empty string.
        """
        text = self.decode([token_id], skip_special_tokens=False)
        token = self._backend.id_to_token(token_id)
        # Decoders of such vocabularies drop the space at the beginning of a text.
        if token is not None and token.startswith(_SPACE_MARK) and not text.startswith(" "):
            return f" {text}"
        return text

    def to_json(self) -> str:
        return str(self._backend.to_str())


def read_tokenizer_config(folder: Path) -> ConfigFields:
    """The fields of `tokenizer_config.json`; none where there is no such file."""
    path = folder / "tokenizer_config.json"
    return ConfigFields.from_file(path) if path.is_file() else ConfigFields(str(path), {})


def _read_json(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for whatever is wrong with a file
        raise ModelLoadError(str(path), f"is not a tokenizer: {error}") from error


def _build_from_vocabulary(folder: Path, config: ConfigFields) -> tokenizers.Tokenizer:
    """Build the byte-level BPE of GPT-2 and OPT from its two files."""
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if not (vocabulary.is_file() and merges.is_file()):
        raise ModelLoadError(str(folder), "tokenizer.json is missing, and so is vocab.json or merges.txt")
    try:
        model = models.BPE.from_file(str(vocabulary), str(merges))
    except Exception as error:  # as above
        raise ModelLoadError(str(vocabulary), f"with {merges.name} is no byte-level BPE: {error}") from error
    backend = tokenizers.Tokenizer(model)
    has_prefix_space = config.boolean("add_prefix_space", default=False)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=has_prefix_space)
    backend.decoder = decoders.ByteLevel()
    found = (read_special_token(config, name) for name in _SPECIAL_NAMES)
    names = sorted({name for name in found if name is not None})
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return backend


def _add_leading_token(backend: tokenizers.Tokenizer, config: ConfigFields) -> None:
    """Put the beginning-of-text token in front where the config asks for it and the tokenizer does not."""
    if not config.boolean("add_bos_token", default=False):
        return
    token_id = _special_id(backend, config, "bos_token")
    if token_id is None:
        raise config.invalid("bos_token", "must name a token, for add_bos_token is true")
    if backend.encode("").ids[:1] == [token_id]:
        return
    token = str(read_special_token(config, "bos_token"))
    template = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A $B", special_tokens=[(token, token_id)]
    )
    before = backend.post_processor
    backend.post_processor = template if before is None else processors.Sequence([before, template])


def read_special_token(config: ConfigFields, name: str) -> str | None:
    """Return a special token's text, spelt as a string or as an object with `content`."""
    if not config.has(name):
        return None
    is_object = isinstance(config.raw[name], dict)
    return config.nested(name).text("content") if is_object else config.text(name)


def _special_id(backend: tokenizers.Tokenizer, config: ConfigFields, name: str) -> int | None:
    token = read_special_token(config, name)
    return None if token is None else backend.token_to_id(token)
