"""What bfloat16, int8 and a cache in float8 cost in accuracy, against the same model in float32.

    python -m benchmarks accuracy [--model FOLDER ...] [--tokens 256] [--texts 8]

Without folders: the built-in model, which was trained, and random weights in the shapes of four families.
Each text is what the float32 model writes itself, at temperature 1, after one random token; every dtype then
reads all of them, and its logits are compared at every position, so that one early difference does not hide
the rest.

Errors are in units of the float32 logits' standard deviation over the vocabulary. Greedy agreement is the
share of positions with the same largest logit; random weights have many near ties, trained ones few.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.measure import positive
from cuda_ops.native import use_kernels
from engine.attention import AttentionMetadata
from engine.builtin import path as builtin_path
from engine.checkpoint import WeightLayout
from engine.config import EngineConfig
from engine.core import Engine
from engine.models import CausalLM
from engine.sampling import SamplingParams
from engine.weights import load_model

BLOCK_SIZE: Final = 16
WAYS: Final[Mapping[str, tuple[torch.dtype, WeightLayout, torch.dtype]]] = {
    "bfloat16": (torch.bfloat16, "packed", torch.bfloat16),
    "bfloat16, fp8 cache": (torch.bfloat16, "packed", torch.float8_e4m3fn),
    "float32, fp8 cache": (torch.float32, "dense", torch.float8_e4m3fn),
    "int8": (torch.bfloat16, "int8", torch.bfloat16),
}
"""Of activations, weights and cache."""
_SIZES: Final = {"vocab_size": 8192, "tie_word_embeddings": True}
_LLAMA_SIZES: Final = _SIZES | {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 1024,
}  # fmt: skip
RANDOM_MODELS: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
    "OPT, random": (
        "OPTConfig",
        _SIZES | {"hidden_size": 512, "ffn_dim": 2048, "num_hidden_layers": 8, "num_attention_heads": 8,
                  "word_embed_proj_dim": 512, "max_position_embeddings": 1024},
    ),
    "Llama, random": ("LlamaConfig", _LLAMA_SIZES),
    "Qwen3, random": ("Qwen3Config", _LLAMA_SIZES),
    "GPT-2, random": (
        "GPT2Config", _SIZES | {"n_embd": 512, "n_layer": 8, "n_head": 8, "n_positions": 1024}
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cost:
    """Over all positions of all texts.

    Attributes:
        largest_error: of any logit, in standard deviations of its position's logits.
        mean_error: the same, on average.
        divergence: mean Kullback-Leibler divergence from float32, in nats.
        agreement: share of positions with the same largest logit.
    """

    largest_error: float
    mean_error: float
    divergence: float
    agreement: float


def main() -> None:
    arguments = _parse_arguments()
    torch.manual_seed(0)
    level = use_kernels("auto").level
    table = Table("model", "dtype", "largest error", "mean error", "divergence, nats", "greedy agreement")
    with tempfile.TemporaryDirectory() as scratch:
        folders = {str(folder): folder for folder in arguments.model} or _default_folders(Path(scratch))
        for name, folder in folders.items():
            for dtype, cost in measure(folder, arguments.texts, arguments.tokens).items():
                errors = (f"{value:.4f}" for value in (cost.largest_error, cost.mean_error, cost.divergence))
                table.add_row(name, dtype, *errors, f"{cost.agreement:.2%}")
    console = Console(width=110)
    console.print(table)
    console.print(
        f"{arguments.texts} texts of {arguments.tokens} tokens, kernels {level or 'in plain torch only'}"
    )


def measure(folder: Path, num_texts: int, num_tokens: int) -> dict[str, Cost]:
    texts = write_texts(folder, num_texts, num_tokens)
    exact = torch.cat(list(read_texts(folder, texts, torch.float32, "dense", torch.float32)))
    return {
        name: compare(exact, torch.cat(list(read_texts(folder, texts, *way)))) for name, way in WAYS.items()
    }


def write_texts(folder: Path, num_texts: int, num_tokens: int) -> list[list[int]]:
    """Let the float32 model write; each text begins with a token of its own."""
    engine = Engine.from_config(EngineConfig(model=str(folder), dtype="float32", kv_cache_bytes=1 << 28))
    starts = torch.randint(10, engine.model_info.vocab_size, (num_texts,)).tolist()
    for seed, start in enumerate(starts):
        params = SamplingParams(max_tokens=num_tokens - 1, temperature=1.0, seed=seed, ignore_eos=True)
        engine.add_request(str(seed), [start], params)
    texts: dict[str, list[int]] = {}
    while engine.has_work():
        for output in engine.step().finished:
            texts[output.request_id] = list(output.completions[0].token_ids)
    return [[start, *texts[str(seed)]] for seed, start in enumerate(starts)]


@torch.inference_mode()
def read_texts(
    folder: Path,
    texts: list[list[int]],
    dtype: torch.dtype,
    layout: WeightLayout,
    cache_dtype: torch.dtype,
) -> Iterator[Tensor]:
    """Yield each text's logits, `[num_tokens, vocab_size]` float32."""
    model = load_model(str(folder), dtype=dtype, device=torch.device("cpu"), layout=layout).model
    for text in texts:
        yield _read(model, text, cache_dtype)


def _read(model: CausalLM, text: list[int], cache_dtype: torch.dtype) -> Tensor:
    size, config = len(text), model.config
    num_blocks = -(-size // BLOCK_SIZE)
    shape = (num_blocks, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
    cache = [
        (torch.zeros(shape, dtype=cache_dtype), torch.zeros(shape, dtype=cache_dtype))
        for _ in range(config.num_layers)
    ]
    metadata = AttentionMetadata(
        query_start=torch.tensor([0, size], dtype=torch.int32),
        context_lens=torch.tensor([size], dtype=torch.int32),
        block_tables=torch.arange(num_blocks, dtype=torch.int32).unsqueeze(0),
        slot_mapping=torch.arange(size),
        max_query_len=size,
        max_context_len=size,
        num_decode_sequences=0,
    )
    return model.compute_logits(model.forward(torch.tensor(text), torch.arange(size), cache, metadata))


def compare(exact: Tensor, rounded: Tensor) -> Cost:
    errors = (rounded - exact).abs() / exact.std(dim=1, keepdim=True)
    divergence = torch.nn.functional.kl_div(
        rounded.log_softmax(1), exact.log_softmax(1), reduction="batchmean", log_target=True
    )
    agreement = (rounded.argmax(1) == exact.argmax(1)).float().mean()
    return Cost(float(errors.max()), float(errors.mean()), float(divergence), float(agreement))


def _default_folders(scratch: Path) -> dict[str, Path]:
    folders = {"built-in, trained": Path(builtin_path())}
    for name, (config, fields) in RANDOM_MODELS.items():
        folder = scratch / config
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**fields))
        model.save_pretrained(folder)
        # Any tokenizer serves: texts are token ids.
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_bytes((Path(builtin_path()) / file).read_bytes())
        folders[name] = folder
    return folders


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, nargs="+", default=[], help="model folders")
    parser.add_argument("--tokens", type=positive, default=256, help="of each text")
    parser.add_argument("--texts", type=positive, default=8)
    return parser.parse_args()


if __name__ == "__main__":
    main()
