"""From a model's name or folder to a model that runs.

name or path ─▶ folder ─▶ config.json ─▶ family ─▶ tensors ─▶ model
                      └─▶ generation_config.json, tokenizer
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import torch

from engine.checkpoint import Checkpoint, WeightLayout
from engine.hub import find_folder
from engine.memory import freed_memory_goes_back
from engine.model_config import ConfigFields, ModelConfig
from engine.models import CausalLM
from engine.models.registry import find_family
from engine.quantisation import FIELD, Method, read_quantisation
from engine.shard import WHOLE, Shard
from engine.tokenizer import Tokenizer

_KEPT: Final = {True: "kept so", False: "widened"}


class LoadObserver(Protocol):
    """Told how the loading of a model goes, by the thread that loads."""

    def on_stage(self, what: str) -> None:
        """What happens next, in a few words."""

    def on_weights(self, num_bytes: int, total_bytes: int) -> None:
        """So many of the weights' bytes are in; at the end all of them."""


@dataclass(slots=True)
class _WeightCount:
    """Adds up what is read of the weights, for an observer."""

    observer: LoadObserver
    total_bytes: int
    num_bytes: int = 0

    def __call__(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self.observer.on_weights(self.num_bytes, self.total_bytes)

    def finish(self) -> None:
        """Heads of the files and tensors that are not used were not read."""
        self.observer.on_weights(self.total_bytes, self.total_bytes)


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """What the folder says of generating.

    Attributes:
        eos_token_ids: those of `generation_config.json`, else of `config.json`, else the tokenizer's; any of
            them ends a sequence.
    """

    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Attributes:
    num_parameters: Of the whole model, tied weights counted once.
    """

    model: CausalLM
    config: ModelConfig
    tokenizer: Tokenizer
    generation_config: GenerationConfig
    num_parameters: int = 0


def load_model(
    name_or_path: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    layout: WeightLayout = "dense",
    observer: LoadObserver | None = None,
    shard: Shard = WHOLE,
    keeps: Container[Method] = (),
) -> LoadedModel:
    """Load a model in Hugging Face layout.

    The tokenizer is read before the weights, so that a folder without one fails at once.

    Args:
        name_or_path: a folder, or a hub name where there is no such folder.
        dtype: of weights and activations; checkpoints in float16, bfloat16 and float32 are converted.
        device: where the model will run.
        layout: of the dense layers.
        observer: of the loading.
        shard: which share of the weights is read.
        keeps: methods by which weights may be stored and stay so; others become what they stand for, in
            `dtype` and `layout`.

    Raises:
        ModelLoadError: one line that names the file and what is wrong with it.
    """
    observer = observer if observer is not None else _Nobody()
    observer.on_stage(f"finding {name_or_path}")
    folder = find_folder(name_or_path)
    fields = ConfigFields.from_file(folder / "config.json")
    architecture, family = find_family(fields)
    quantisation = read_quantisation(fields)
    if quantisation is not None and not family.takes_codes:
        raise fields.invalid(FIELD, f"{architecture} is served with plain weights only")
    tokenizer = Tokenizer.from_folder(folder)
    _check_vocabulary(fields, tokenizer)
    keeps_codes = quantisation is not None and quantisation.method in keeps
    stored = "" if quantisation is None else f" ({quantisation}, {_KEPT[keeps_codes]})"
    observer.on_stage(f"loading the weights of {architecture}{stored}")
    checkpoint = Checkpoint.open(
        folder,
        name_prefix=family.name_prefix,
        dtype=dtype,
        device=device,
        layout=layout,
        shard=shard,
        quantisation=quantisation,
        keeps_codes=keeps_codes,
    )
    count = _WeightCount(observer, checkpoint.num_bytes)
    checkpoint.on_read = count
    with freed_memory_goes_back():
        model = family.load(fields, architecture, checkpoint)
    count.finish()
    eos = _read_eos(folder) or model.config.eos_token_ids or tokenizer.eos_token_ids
    return LoadedModel(model, model.config, tokenizer, GenerationConfig(eos), checkpoint.num_elements)


def _read_eos(folder: Path) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    return ConfigFields.from_file(path).token_ids("eos_token_id") if path.is_file() else ()


def _check_vocabulary(fields: ConfigFields, tokenizer: Tokenizer) -> None:
    # A larger model vocabulary is common: it is padded to a round number.
    if tokenizer.vocab_size > fields.integer("vocab_size"):
        raise fields.invalid("vocab_size", f"must be at least the tokenizer's {tokenizer.vocab_size} tokens")


class _Nobody:
    def on_stage(self, what: str) -> None: ...

    def on_weights(self, num_bytes: int, total_bytes: int) -> None: ...
