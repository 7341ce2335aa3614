"""Model folders in Hugging Face layout with random weights, written by `transformers` itself."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

ModelKind = Literal[
    "opt",
    "opt-350m-like",
    "llama",
    "llama3-rope",
    "mistral",
    "qwen2",
    "qwen2-window",
    "qwen3",
    "gpt2",
    "gemma3",
]
MODEL_KINDS: tuple[ModelKind, ...] = get_args(ModelKind)

_VOCAB_SIZE = 384
_MAX_POSITIONS = 256


@dataclass(frozen=True, slots=True)
class _Recipe:
    """`special_tokens` get the ids 0, 1, ...; `bos` is put in front of every text."""

    config: str
    fields: Mapping[str, Any]
    special_tokens: tuple[str, ...]
    eos: str
    bos: str | None = None


_OPT_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
_LLAMA_TOKENS = ("<unk>", "<s>", "</s>")
_END_OF_TEXT = ("<|endoftext|>",)

_OPT_SHAPE = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "ffn_dim": 80,
    "word_embed_proj_dim": 48,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
_LLAMA_SHAPE = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 80,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN_SHAPE = _LLAMA_SHAPE | {"bos_token_id": None, "eos_token_id": 0}
_GEMMA_SHAPE = _LLAMA_SHAPE | {
    "query_pre_attn_scalar": 20,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "pad_token_id": 0,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

_RECIPES: dict[ModelKind, _Recipe] = {
    "opt": _Recipe("OPTConfig", _OPT_SHAPE, _OPT_TOKENS, "</s>", "</s>"),
    "opt-350m-like": _Recipe(
        "OPTConfig",
        _OPT_SHAPE | {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
        _OPT_TOKENS,
        "</s>",
        "</s>",
    ),
    "llama": _Recipe("LlamaConfig", _LLAMA_SHAPE, _LLAMA_TOKENS, "</s>", "<s>"),
    "llama3-rope": _Recipe(
        "LlamaConfig",
        _LLAMA_SHAPE | {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True, "attention_bias": True},
        _LLAMA_TOKENS,
        "</s>",
        "<s>",
    ),
    "mistral": _Recipe("MistralConfig", _LLAMA_SHAPE | {"sliding_window": 7}, _LLAMA_TOKENS, "</s>", "<s>"),
    "qwen2": _Recipe(
        "Qwen2Config", _QWEN_SHAPE | {"tie_word_embeddings": True}, _END_OF_TEXT, "<|endoftext|>"
    ),
    "qwen2-window": _Recipe(
        "Qwen2Config",
        _QWEN_SHAPE | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
        _END_OF_TEXT,
        "<|endoftext|>",
    ),
    "qwen3": _Recipe("Qwen3Config", _QWEN_SHAPE, _END_OF_TEXT, "<|endoftext|>"),
    "gemma3": _Recipe("Gemma3TextConfig", _GEMMA_SHAPE, _LLAMA_TOKENS, "</s>", "<s>"),
    "gpt2": _Recipe(
        "GPT2Config",
        {"n_embd": 48, "n_layer": 3, "n_head": 3, "bos_token_id": 0, "eos_token_id": 0},
        _END_OF_TEXT,
        "<|endoftext|>",
    ),
}


def make_model_folder(
    kind: ModelKind,
    path: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **config_fields: Any,
) -> Path:
    """Write config.json, generation_config.json, safetensors and a trained tokenizer into `path`.

    The weights are spread so that greedy decoding wanders instead of repeating one token. The same arguments
    give the same folder.
    """
    recipe = _RECIPES[kind]
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = _train_tokenizer(recipe)
    fields = {"vocab_size": _VOCAB_SIZE, "max_position_embeddings": _MAX_POSITIONS, **recipe.fields}
    config = getattr(transformers, recipe.config)(**(fields | config_fields))
    model = transformers.AutoModelForCausalLM.from_config(config)
    _spread_weights(model, seed)
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    tokenizer.save(str(path / "tokenizer.json"))
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=recipe.eos, bos_token=recipe.bos
    )
    wrapped.save_pretrained(path)
    return path


def write_text(num_words: int, seed: int = 0) -> str:
    """Return words of a small made-up language, the same for the same seed."""
    rng = random.Random(seed)
    syllables = [first + second for first in "bdfgklmnprst" for second in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(200)]
    return " ".join(rng.choices(words, k=num_words))


def _train_tokenizer(recipe: _Recipe) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE,
        special_tokens=list(recipe.special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([write_text(400)], trainer)
    if recipe.bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{recipe.bos} $A",
            pair=f"{recipe.bos} $A $B",
            special_tokens=[(recipe.bos, recipe.special_tokens.index(recipe.bos))],
        )
    return tokenizer


@torch.no_grad()
def _spread_weights(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 2:
            gain = 1.0 if "embed" in name or ".wte." in name or ".wpe." in name else 3.0
            parameter.copy_(noise * gain * parameter.shape[1] ** -0.5)
        else:
            parameter.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))
