"""Engine tokens/s against `transformers` generate, in one run, on one model folder and one workload.

    python -m benchmarks.bench_engine --make-model FOLDER        # OPT-125M's shape, random weights, once
    python -m benchmarks.bench_engine --model FOLDER [--workload FILE] [--repeats 5]

A workload file is {"name", "requests": [{"id", "prompt_ids", "max_new_tokens"}]}; without one, 64 requests
with prompts of 16 to 128 tokens and 64 new tokens are made from a fixed seed. All requests are there from
the start; decoding is greedy and ignores end-of-sequence, so the number of output tokens is fixed.

The contestants take turns, so that a busy spell of the machine hits them all. Tokens per CPU second of this
process, with `--threads 1` (no spinning at barriers), hardly depend on what else runs; the wall clock with
more threads says more on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from cuda_ops.native import KernelChoice, use_kernels
from engine.config import Dtype, EngineConfig, Kernels
from engine.core import Engine
from engine.sampling import SamplingParams

PAD_TOKEN_ID = 1
NUM_WARM_UP_REQUESTS = 8
NUM_WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class BenchRequest:
    request_id: str
    prompt_ids: list[int]
    max_new_tokens: int


Contestant = Callable[[list[BenchRequest]], list[list[int]]]


def main() -> None:
    arguments = _parse_arguments()
    if arguments.make_model is not None:
        make_opt_125m(arguments.make_model)
        return
    torch.set_num_threads(arguments.threads)
    requests = load_workload(arguments.workload) if arguments.workload else make_workload()
    contestants = _contestants(arguments)
    timings = measure(contestants, requests, arguments.repeats)
    _print(timings, sum(request.max_new_tokens for request in requests), arguments)


def make_workload(num_requests: int = 64, seed: int = 0) -> list[BenchRequest]:
    generator = random.Random(seed)
    return [
        BenchRequest(
            str(index), [generator.randrange(10, 30000) for _ in range(generator.randint(16, 128))], 64
        )
        for index in range(num_requests)
    ]


def load_workload(path: Path) -> list[BenchRequest]:
    raw = json.loads(path.read_text(encoding="utf-8"))
    return [
        BenchRequest(request["id"], request["prompt_ids"], request["max_new_tokens"])
        for request in raw["requests"]
    ]


def make_opt_125m(folder: Path) -> None:
    """Write a folder of OPT-125M's shape: shapes and speed are real, the weights and tokens mean nothing."""
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=50272,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        ffn_dim=3072,
        word_embed_proj_dim=768,
        max_position_embeddings=2048,
        bos_token_id=2,
        pad_token_id=PAD_TOKEN_ID,
        eos_token_id=2,
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    _byte_tokenizer(config.vocab_size).save(str(folder / "tokenizer.json"))


def _byte_tokenizer(vocab_size: int) -> Tokenizer:
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"Ġword{index}" for index in range(vocab_size - len(tokens))]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@dataclass(frozen=True, slots=True)
class Timing:
    wall_seconds: float
    cpu_seconds: float


def measure(
    contestants: dict[str, Contestant], requests: list[BenchRequest], repeats: int
) -> dict[str, list[Timing]]:
    """Time each repeat. The order turns by one each time, so that none always follows the same one."""
    few = [
        BenchRequest(request.request_id, request.prompt_ids, NUM_WARM_UP_TOKENS)
        for request in requests[:NUM_WARM_UP_REQUESTS]
    ]
    for run in contestants.values():
        run(few)
    timings: dict[str, list[Timing]] = {name: [] for name in contestants}
    names = list(contestants)
    for repeat in range(repeats):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            wall, cpu = time.perf_counter(), time.process_time()
            outputs = contestants[name](requests)
            timings[name].append(Timing(time.perf_counter() - wall, time.process_time() - cpu))
            _check_lengths(name, outputs, requests)
    return timings


def _check_lengths(name: str, outputs: list[list[int]], requests: list[BenchRequest]) -> None:
    if [len(output) for output in outputs] != [request.max_new_tokens for request in requests]:
        raise SystemExit(f"{name}: an output has not the length asked for, so its time means nothing")


def _contestants(arguments: argparse.Namespace) -> dict[str, Contestant]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=getattr(torch, arguments.dtype)
    ).eval()
    contestants: dict[str, Contestant] = {
        "engine": _engine(arguments, arguments.dtype, "auto"),
        "engine, int8": _engine(arguments, "int8", "auto"),
        "engine, plain-torch ops": _engine(arguments, arguments.dtype, "reference"),
    }
    for batch_size in arguments.batch_sizes:
        contestants[f"transformers, batches of {batch_size}"] = _padded(model, batch_size)
    return contestants


def _engine(arguments: argparse.Namespace, dtype: Dtype, kernels: Kernels) -> Contestant:
    engine = Engine.from_config(
        EngineConfig(
            model=str(arguments.model),
            dtype=dtype,
            num_threads=arguments.threads,
            max_num_sequences=arguments.max_num_sequences,
            max_num_batched_tokens=arguments.max_num_batched_tokens,
            kernels=kernels,
            # The rounds' prompts are the same: remembered ones would cost nothing from the second round on.
            keeps_prefixes=False,
        )
    )
    return lambda requests: run_engine(engine, requests, kernels)


def run_engine(engine: Engine, requests: list[BenchRequest], kernels: KernelChoice) -> list[list[int]]:
    use_kernels(kernels)
    outputs: dict[str, list[int]] = {}
    for request in requests:
        params = SamplingParams(max_tokens=request.max_new_tokens, temperature=0.0, ignore_eos=True)
        engine.add_request(request.request_id, request.prompt_ids, params)
    while engine.has_work():
        for output in engine.step().finished:
            outputs[output.request_id] = list(output.completions[0].token_ids)
    return [outputs[request.request_id] for request in requests]


def _padded(model: transformers.PreTrainedModel, batch_size: int) -> Contestant:
    return lambda requests: run_padded(model, requests, batch_size)


@torch.inference_mode()
def run_padded(
    model: transformers.PreTrainedModel, requests: list[BenchRequest], batch_size: int
) -> list[list[int]]:
    """`generate` over batches padded on the left, of requests sorted by length, which suits it best."""
    order = sorted(range(len(requests)), key=lambda index: len(requests[index].prompt_ids))
    outputs: list[list[int]] = [[] for _ in requests]
    for first in range(0, len(order), batch_size):
        members = order[first : first + batch_size]
        width = max(len(requests[index].prompt_ids) for index in members)
        num_new = max(requests[index].max_new_tokens for index in members)
        ids = torch.full((len(members), width), PAD_TOKEN_ID)
        mask = torch.zeros((len(members), width), dtype=torch.long)
        for row, index in enumerate(members):
            prompt = requests[index].prompt_ids
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        generated = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=transformers.GenerationConfig(
                do_sample=False,
                max_new_tokens=num_new,
                min_new_tokens=num_new,
                pad_token_id=PAD_TOKEN_ID,
                eos_token_id=None,
            ),
        )
        for row, index in enumerate(members):
            outputs[index] = generated[row, width : width + requests[index].max_new_tokens].tolist()
    return outputs


def _print(timings: dict[str, list[Timing]], num_tokens: int, arguments: argparse.Namespace) -> None:
    console = Console(width=110)
    wall = {name: [num_tokens / timing.wall_seconds for timing in runs] for name, runs in timings.items()}
    cpu = {name: [num_tokens / timing.cpu_seconds for timing in runs] for name, runs in timings.items()}
    console.print(_table("tokens per second", wall))
    console.print(_table("tokens per CPU second", cpu))
    kernels = use_kernels("auto").level or "in plain torch only"
    console.print(
        f"{num_tokens} output tokens, {arguments.dtype}, {arguments.threads} threads, kernels {kernels},"
        f" {arguments.repeats} repeats, load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores,"
        f" torch {torch.__version__}, transformers {transformers.__version__}"
    )


def _table(measure_name: str, rates: dict[str, list[float]]) -> Table:
    medians = {name: statistics.median(values) for name, values in rates.items()}
    best_peer = max(median for name, median in medians.items() if not name.startswith("engine"))
    table = Table("contestant", measure_name, "slowest", "fastest", "ratio to best transformers")
    for name, values in rates.items():
        cells = (medians[name], min(values), max(values))
        table.add_row(name, *(f"{cell:.0f}" for cell in cells), f"{medians[name] / best_peer:.2f}")
    return table


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=Path, help="model folder")
    what.add_argument(
        "--make-model", type=Path, metavar="FOLDER", help="write an OPT-125M shape here and stop"
    )
    parser.add_argument("--workload", type=Path, help="workload file")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--max-num-sequences", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    return parser.parse_args()


if __name__ == "__main__":
    main()
