"""Decode steps of an engine on a GPU against the bytes they must read, and whole runs against `transformers`.

Nothing is downloaded: weights of known shapes are drawn on the device.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer as RawTokenizer
from torch import Tensor

from cuda_ops.native import use_cuda_kernels
from engine.checkpoint import Checkpoint, Region
from engine.config import EngineConfig
from engine.core import Engine
from engine.model_config import ConfigFields
from engine.models.registry import find_family
from engine.sampling import SamplingParams
from engine.tokenizer import Tokenizer
from engine.weights import GenerationConfig, LoadedModel

SHAPES: Final[Mapping[str, Mapping[str, Any]]] = {
    "llama-8b": {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
    "opt-125m": {
        "architectures": ["OPTForCausalLM"],
        "vocab_size": 50272,
        "hidden_size": 768,
        "ffn_dim": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "word_embed_proj_dim": 768,
        "max_position_embeddings": 2048,
    },
}
CONTEXT: Final = 1024
BATCHES: Final = (1, 8, 64, 256)
NUM_WARM_UP_STEPS: Final = 4
NUM_TIMED_STEPS: Final = 32
NUM_NEW: Final = 128
_SPREAD: Final = 0.02
_COPY_BYTES: Final = 1 << 30

MakeTokenizer = Callable[[int], RawTokenizer]


class DrawnCheckpoint(Checkpoint):
    """Has whatever is asked for: norms of ones, the rest drawn at random, on the device."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__({}, "drawn weights", dtype=dtype, device=device, layout="dense")
        self.num_bytes_drawn = 0

    def _read_into(self, target: Tensor, name: str) -> None:
        if "norm" in name and name.endswith("weight"):
            target.fill_(1.0)
        else:
            target.normal_(0.0, _SPREAD)
        self.num_elements += target.numel()
        self.num_bytes_drawn += target.nbytes

    def _read_regions(
        self, name: str, shape: tuple[int, ...], wanted: Sequence[tuple[Tensor, Region]]
    ) -> None:
        for target, _ in wanted:
            self._read_into(target, name)


@dataclass(frozen=True, slots=True)
class DecodeTiming:
    """Attributes:
    floor_seconds: What the weights and keys and values that a step reads take at the measured copy rate.
    """

    batch_size: int
    step_seconds: float
    floor_seconds: float


def bench(device: str, make_tokenizer: MakeTokenizer) -> None:
    """Print for each shape: steps against their floor, then tokens/s of a whole run beside `transformers`."""
    console = Console(width=110)
    kernels = use_cuda_kernels("auto")
    rate = copy_bytes_a_second(torch.device(device))
    console.print(
        f"kernels {kernels.level or kernels.reason}, copies {rate / 1e9:.0f} GB/s, torch {torch.__version__}"
    )
    for name, shape in SHAPES.items():
        engine, num_bytes = make_engine(name, shape, device, make_tokenizer)
        timings = [time_decoding(engine, shape, size, num_bytes, rate) for size in BATCHES]
        console.print(_table(name, timings))
        prompts = [[10 + (7 * row + place) % 1000 for place in range(128)] for row in range(256)]
        ours = run_engine(engine, prompts)
        console.print(f"{name}: engine {ours:.0f} tokens/s, 256 prompts of 128 tokens, {NUM_NEW} new each")
        del engine
        torch.cuda.empty_cache()
        console.print(f"{name}: {_beside(shape, prompts, device, ours)}")
        torch.cuda.empty_cache()


def copy_bytes_a_second(device: torch.device) -> float:
    """Bytes read and written by a copy that is far larger than any cache."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rates = []
    for _ in range(10):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize(device)
        rates.append(2 * _COPY_BYTES / (time.perf_counter() - start))
    return max(rates)


def make_engine(
    name: str, shape: Mapping[str, Any], device: str, make_tokenizer: MakeTokenizer
) -> tuple[Engine, int]:
    """Returns an engine and the bytes of its weights that every step reads."""
    fields = ConfigFields(name, shape)
    architecture, family = find_family(fields)
    checkpoint = DrawnCheckpoint(torch.bfloat16, torch.device(device))
    model = family.load(fields, architecture, checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        make_tokenizer(shape["vocab_size"]).save(str(Path(folder) / "tokenizer.json"))
        tokenizer = Tokenizer.from_folder(Path(folder))
    loaded = LoadedModel(model, model.config, tokenizer, GenerationConfig((2,)), checkpoint.num_elements)
    config = EngineConfig(
        model=name,
        dtype="bfloat16",
        device=device,
        max_model_len=2048,
        max_num_sequences=256,
        max_num_batched_tokens=8192,
        keeps_prefixes=False,
    )
    # Of embeddings that are not the head too a step reads its own tokens' rows, which is nothing.
    idle = 0 if model.config.tie_word_embeddings else model.config.vocab_size * model.config.hidden_size * 2
    return Engine(loaded, config), checkpoint.num_bytes_drawn - idle


def time_decoding(
    engine: Engine, shape: Mapping[str, Any], batch_size: int, weight_bytes: int, rate: float
) -> DecodeTiming:
    """Steps of so many sequences that all decode, at contexts of about `CONTEXT` tokens."""
    params = SamplingParams(max_tokens=512, temperature=0.0, ignore_eos=True)
    for row in range(batch_size):
        engine.add_request(str(row), [10 + (row + place) % 1000 for place in range(CONTEXT)], params)
    num_started = 0
    while num_started < batch_size:
        num_started += sum(len(delta.token_ids) == 1 for delta in engine.step().deltas)
    for _ in range(NUM_WARM_UP_STEPS):
        engine.step()
    start = time.perf_counter()
    for _ in range(NUM_TIMED_STEPS):
        engine.step()
    step_seconds = (time.perf_counter() - start) / NUM_TIMED_STEPS
    for row in range(batch_size):
        engine.abort(str(row))
    engine.step()
    heads = shape.get("num_key_value_heads", shape["num_attention_heads"])
    head_dim = shape["hidden_size"] // shape["num_attention_heads"]
    context_bytes = 2 * 2 * shape["num_hidden_layers"] * heads * head_dim * (CONTEXT + NUM_TIMED_STEPS)
    return DecodeTiming(batch_size, step_seconds, (weight_bytes + batch_size * context_bytes) / rate)


def run_engine(engine: Engine, prompts: list[list[int]]) -> float:
    """Output tokens a second, all prompts being there from the start."""
    params = SamplingParams(max_tokens=NUM_NEW, temperature=0.0, ignore_eos=True)
    start = time.perf_counter()
    for row, prompt in enumerate(prompts):
        engine.add_request(str(row), prompt, params)
    while engine.has_work():
        engine.step()
    return len(prompts) * NUM_NEW / (time.perf_counter() - start)


def _beside(shape: Mapping[str, Any], prompts: list[list[int]], device: str, ours: float) -> str:
    """What the continuous batching of `transformers` makes of the same, where it runs at all."""
    fields = {name: value for name, value in shape.items() if name != "architectures"}
    architecture = getattr(transformers, shape["architectures"][0])
    if not hasattr(architecture, "generate_batch"):
        return f"transformers {transformers.__version__} has no continuous batching"
    try:
        with torch.device(device):
            model = architecture(architecture.config_class(**fields)).to(torch.bfloat16).eval()
        settings = transformers.GenerationConfig(
            max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        model.generate_batch(inputs=prompts[:8], generation_config=settings)
        start = time.perf_counter()
        outputs = model.generate_batch(inputs=prompts, generation_config=settings)
        seconds = time.perf_counter() - start
    except Exception as error:  # another project's, on a device of its own kind
        return f"transformers' continuous batching failed: {type(error).__name__}: {error}"
    num_tokens = sum(len(output.generated_tokens) for output in outputs.values())
    theirs = num_tokens / seconds
    return (
        f"transformers' continuous batching {theirs:.0f} tokens/s; the engine {ours / theirs:.2f} times that"
    )


def _table(name: str, timings: list[DecodeTiming]) -> Table:
    table = Table(
        "batch",
        "tokens/s",
        "ms a step",
        "floor, ms",
        "of the floor",
        title=f"{name}, bfloat16, {CONTEXT} tokens each",
    )
    for timing in timings:
        table.add_row(
            str(timing.batch_size),
            f"{timing.batch_size / timing.step_seconds:.0f}",
            f"{1000 * timing.step_seconds:.2f}",
            f"{1000 * timing.floor_seconds:.2f}",
            f"{timing.floor_seconds / timing.step_seconds:.0%}",
        )
    return table
