"""The chat template of a model's folder, as text; what renders it is not the engine's business."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ModelLoadError
from engine.model_config import ConfigFields
from engine.tokenizer import read_special_token, read_tokenizer_config

_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """Attributes:
    source: Jinja.
    special_tokens: What the template may call by name, such as `bos_token`.
    """

    source: str
    special_tokens: Mapping[str, str]


def read_chat_template(path: Path | str) -> ChatTemplate | None:
    """Read `chat_template.jinja`, else what `tokenizer_config.json` holds; None where the model has none.

    Of several templates with names, the one called `default`.

    Raises:
        ModelLoadError: a file is broken, or none of several templates is the default.
    """
    folder = Path(path)
    config = read_tokenizer_config(folder)
    file = folder / "chat_template.jinja"
    source = _read_text(file) if file.is_file() else _configured(config)
    if source is None:
        return None
    tokens = {name: read_special_token(config, name) for name in _TOKEN_NAMES}
    return ChatTemplate(source, {name: token for name, token in tokens.items() if token is not None})


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(str(path), f"cannot be read: {error}") from error


def _configured(config: ConfigFields) -> str | None:
    if not config.has("chat_template"):
        return None
    templates = config.raw["chat_template"]
    if not isinstance(templates, list):
        return config.text("chat_template")
    for entry in templates:
        if (
            isinstance(entry, dict)
            and entry.get("name") == "default"
            and isinstance(entry.get("template"), str)
        ):
            return str(entry["template"])
    raise ModelLoadError(config.source, "chat_template has several templates, none called default")
