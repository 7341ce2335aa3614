"""What the engine needs to know of a model, and how `config.json` is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ModelLoadError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What every decoder-only model has, whatever its family.

    Attributes:
        architecture: the class name in `config.json`'s `architectures`.
        num_kv_heads: heads that are cached; query heads are a multiple of them.
        ffn_size: width inside the feed-forward block.
        max_position_embeddings: the longest context the model was made for, in tokens.
        eos_token_ids: any of them ends a sequence; empty when the model names none.
        bos_token_id: None when the model names none.
        tie_word_embeddings: the output projection is the input embedding.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    tie_word_embeddings: bool


@dataclass(frozen=True, slots=True)
class ConfigFields:
    """A JSON object of a model folder, read field by field; a wrong field becomes a `ModelLoadError`.

    A field that is `null` counts as absent, as `transformers` treats it.
    """

    source: str
    raw: Mapping[str, Any]

    @classmethod
    def from_file(cls, path: Path) -> ConfigFields:
        """Read a JSON file.

        Raises:
            ModelLoadError: it is missing, not JSON or not an object.
        """
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ModelLoadError(str(path), "the file is missing") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ModelLoadError(str(path), f"cannot be read: {error}") from error
        except json.JSONDecodeError as error:
            raise ModelLoadError(str(path), f"is not valid JSON: {error}") from error
        if not isinstance(raw, dict):
            raise ModelLoadError(str(path), f"must hold a JSON object, not a {type(raw).__name__}")
        return cls(str(path), raw)

    def has(self, name: str) -> bool:
        return self.raw.get(name) is not None

    def integer(self, name: str, default: int | None = None) -> int:
        """Return a whole number of at least 1."""
        value = self._value(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.invalid(name, "must be a whole number of at least 1")
        return value

    def count(self, name: str, default: int) -> int:
        """Return a whole number of at least 0."""
        value = self._value(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.invalid(name, "must be a whole number of at least 0")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Return a number above 0."""
        value = self._value(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self.invalid(name, "must be a number above 0")
        return float(value)

    def boolean(self, name: str, *, default: bool) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.invalid(name, "must be true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self.invalid(name, "must be a string")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a list of strings; empty when absent."""
        value = self._value(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.invalid(name, "must be a list of strings")
        return tuple(value)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """Return a token id or a list of them; empty when absent."""
        value = self._value(name, [])
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in ids):
            raise self.invalid(name, "must be a token id or a list of token ids")
        return tuple(ids)

    def optional_token_id(self, name: str) -> int | None:
        """Return a token id, or None when absent."""
        ids = self.token_ids(name)
        if len(ids) > 1:
            raise self.invalid(name, "must be one token id")
        return ids[0] if ids else None

    def nested(self, name: str) -> ConfigFields:
        """Return an object inside this one; empty when absent."""
        value = self._value(name, {})
        if not isinstance(value, dict):
            raise self.invalid(name, "must be an object")
        return ConfigFields(f"{self.source}: {name}", value)

    def invalid(self, name: str, rule: str) -> ModelLoadError:
        return ModelLoadError(self.source, f"{name}={self.raw.get(name)!r}: {rule}")

    def _value(self, name: str, default: object) -> Any:
        value = self.raw.get(name)
        if value is not None:
            return value
        if default is None:
            raise ModelLoadError(self.source, f"{name} is missing")
        return default
