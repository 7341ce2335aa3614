"""The built-in model: a small Llama-shaped folder, so that the demo and the tests need no download."""

from __future__ import annotations

from pathlib import Path

NAME = "throughline-tiny"


def path() -> Path:
    """The Hugging Face folder: config.json, model.safetensors, tokenizer.json and what belongs to them."""
    return Path(__file__).resolve().parent
