"""Engine tokens/s against `transformers` generate, in one run, on one model folder and one workload.

    throughline bench engine --make-model FOLDER         write OPT-125M's shape, random weights, once
    throughline bench engine --model FOLDER              the table
    throughline bench engine --model FOLDER --workload FILE --chart chart.svg
    throughline bench engine --device cuda               on a GPU, `engine_on_gpu.py`

A workload file is {"requests": [{"id", "prompt_ids", "max_new_tokens"}, ...]}; without one, 64 requests with
prompts of 16 to 128 tokens and 64 new tokens are made from a fixed seed. All requests are there from the
start; decoding is greedy and ignores end-of-sequence, so the number of output tokens is fixed.

The contestants take turns, so that a busy spell of the machine hits them all. Tokens per CPU second of this
process, with `--threads 1` (no spinning at barriers), hardly depend on what else runs; the wall clock with
more threads says more on a quiet machine. OMP_WAIT_POLICY=PASSIVE keeps threads from spinning.

With --chart the workload's first 1, 2, 4 ... requests also run as one batch each: tokens a second, and
milliseconds that a request takes for each of its tokens, against the size of the batch.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks import engine_on_gpu
from benchmarks.chart import Panel, draw
from benchmarks.measure import positive
from benchmarks.workload import BenchRequest, WorkloadError, load_workload, make_workload
from cuda_ops.native import KernelChoice, use_kernels
from engine.config import Dtype, EngineConfig, Kernels
from engine.core import Engine
from engine.errors import EngineError
from engine.hub import find_folder
from engine.sampling import SamplingParams
from workers.engines.loading import show_loading

PAD_TOKEN_ID = 1
NUM_WARM_UP_REQUESTS = 8
NUM_WARM_UP_TOKENS = 4
_BAR_WIDTH = 30

Contestant = Callable[[list[BenchRequest]], list[list[int]]]


def main() -> None:
    arguments = _parse_arguments()
    if arguments.device is not None:
        engine_on_gpu.bench(arguments.device, _byte_tokenizer)
        return
    if arguments.make_model is not None:
        make_opt_125m(arguments.make_model)
        return
    try:
        _bench(arguments)
    except (EngineError, WorkloadError) as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: error: {error}") from error


def _bench(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    requests = load_workload(arguments.workload) if arguments.workload else None
    folder = find_folder(arguments.model)
    if requests is None:
        requests = make_workload(vocab_size=transformers.AutoConfig.from_pretrained(folder).vocab_size)
    contestants = _contestants(arguments, folder)
    timings = measure(contestants, requests, arguments.repeats)
    _print(timings, sum(request.max_new_tokens for request in requests), arguments)
    if arguments.chart is not None:
        lines = sweep(_for_chart(contestants), requests, arguments.chart_sizes, arguments.repeats)
        _print_sweep(lines)
        arguments.chart.write_text(_draw_sweep(lines), encoding="utf-8")
        print(f"chart: {arguments.chart}")


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
    contestants: Mapping[str, Contestant], requests: list[BenchRequest], repeats: int
) -> dict[str, list[Timing]]:
    """Time each repeat. The order turns by one each time, so that none always follows the same one."""
    few = [
        BenchRequest(request.request_id, request.prompt_ids, min(NUM_WARM_UP_TOKENS, request.max_new_tokens))
        for request in requests[:NUM_WARM_UP_REQUESTS]
    ]
    for run in contestants.values():
        run(few)
    timings: dict[str, list[Timing]] = {name: [] for name in contestants}
    for repeat in range(repeats):
        for name in _turned(list(contestants), repeat):
            timings[name].append(_time(name, contestants[name], requests))
    return timings


def _turned(names: list[str], repeat: int) -> list[str]:
    return names[repeat % len(names) :] + names[: repeat % len(names)]


def _time(name: str, run: Contestant, requests: list[BenchRequest]) -> Timing:
    wall, cpu = time.perf_counter(), time.process_time()
    outputs = run(requests)
    timing = Timing(time.perf_counter() - wall, time.process_time() - cpu)
    if [len(output) for output in outputs] != [request.max_new_tokens for request in requests]:
        raise SystemExit(f"{name}: an output has not the length asked for, so its time means nothing")
    return timing


@dataclass(frozen=True, slots=True)
class Point:
    """Of one batch that runs from its prompts to its end.

    Attributes:
        token_milliseconds: That the batch takes for each token of its longest request.
    """

    batch_size: int
    tokens_per_second: float
    token_milliseconds: float


def sweep(
    contestants: Mapping[str, Contestant], requests: list[BenchRequest], sizes: list[int], repeats: int
) -> dict[str, list[Point]]:
    """The median of the repeats for each contestant and size; sizes above the workload's are left out."""
    lines: dict[str, list[Point]] = {name: [] for name in contestants}
    for size in sorted({size for size in sizes if size <= len(requests)}):
        batch = requests[:size]
        num_tokens = sum(request.max_new_tokens for request in batch)
        longest = max(request.max_new_tokens for request in batch)
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for repeat in range(repeats):
            for name in _turned(list(contestants), repeat):
                seconds[name].append(_time(name, contestants[name], batch).wall_seconds)
        for name, values in seconds.items():
            median = statistics.median(values)
            lines[name].append(Point(size, num_tokens / median, 1000 * median / longest))
    return lines


def _for_chart(contestants: Mapping[str, Contestant]) -> dict[str, Contestant]:
    """Without the engine's slow twin, and of `transformers` the one that takes the batch whole."""
    left_out = ["engine, plain-torch ops", *[name for name in contestants if name.startswith("tr")][:-1]]
    return {name: run for name, run in contestants.items() if name not in left_out} or dict(contestants)


def _contestants(arguments: argparse.Namespace, folder: Path) -> dict[str, Contestant]:
    dtype: Dtype = arguments.dtype
    makers: dict[str, Callable[[], dict[str, Contestant]]] = {
        "engine": lambda: {"engine": _engine(arguments, folder, dtype=dtype)},
        "int8": lambda: {"engine, int8": _engine(arguments, folder, dtype="int8")},
        "reference": lambda: {
            "engine, plain-torch ops": _engine(arguments, folder, dtype=dtype, kernels="reference")
        },
        "invariant": lambda: {
            "engine, batch-invariant": _engine(arguments, folder, dtype=dtype, is_batch_invariant=True)
        },
        "transformers": lambda: _transformers(arguments, folder),
    }
    contestants: dict[str, Contestant] = {}
    for name in dict.fromkeys(arguments.contestants):
        contestants |= makers[name]()
    return contestants


def _transformers(arguments: argparse.Namespace, folder: Path) -> dict[str, Contestant]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, arguments.dtype)
    ).eval()
    return {
        f"transformers, batches of {batch_size}": _padded(model, batch_size)
        for batch_size in sorted(arguments.batch_sizes)
    }


def _engine(
    arguments: argparse.Namespace,
    folder: Path,
    *,
    dtype: Dtype,
    kernels: Kernels = "auto",
    is_batch_invariant: bool = False,
) -> Contestant:
    config = EngineConfig(
        model=str(folder),
        dtype=dtype,
        is_batch_invariant=is_batch_invariant,
        num_threads=arguments.threads,
        max_num_sequences=arguments.max_num_sequences,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        kernels=kernels,
        # The rounds' prompts are the same: remembered ones would cost nothing from the second round on.
        keeps_prefixes=False,
    )
    with show_loading() as loading:
        engine = Engine.from_config(config, loading=loading)
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
    peers = [median for name, median in medians.items() if name.startswith("transformers")]
    best_peer = max(peers, default=next(iter(medians.values())))
    to_whom = "ratio to best transformers" if peers else "ratio to the first"
    table = Table("contestant", measure_name, "slowest", "fastest", to_whom)
    for name, values in rates.items():
        cells = (medians[name], min(values), max(values))
        table.add_row(name, *(f"{cell:.0f}" for cell in cells), f"{medians[name] / best_peer:.2f}")
    return table


def _print_sweep(lines: dict[str, list[Point]]) -> None:
    """The chart, as far as a terminal has one: bars."""
    most = max(point.tokens_per_second for points in lines.values() for point in points)
    table = Table("batch", "contestant", "tokens per second", "", "ms a token", title="by size of the batch")
    for size in [point.batch_size for point in next(iter(lines.values()))]:
        for name, points in lines.items():
            point = next(point for point in points if point.batch_size == size)
            bar = "█" * max(1, round(_BAR_WIDTH * point.tokens_per_second / most))
            cells = (f"{point.tokens_per_second:.0f}", bar, f"{point.token_milliseconds:.1f}")
            table.add_row(str(size), name, *cells)
        table.add_section()
    Console(width=110).print(table)


def _draw_sweep(lines: dict[str, list[Point]]) -> str:
    rates = {name: [(p.batch_size, p.tokens_per_second) for p in points] for name, points in lines.items()}
    waits = {name: [(p.batch_size, p.token_milliseconds) for p in points] for name, points in lines.items()}
    return draw(
        [Panel("output tokens per second", rates), Panel("ms a token", waits)], "requests in the batch"
    )


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="a model folder, or a hub name")
    what.add_argument(
        "--device",
        metavar="cuda",
        help="a GPU: models of known shapes with weights drawn there, steps against their bytes, and"
        " transformers' continuous batching; takes no other option",
    )
    what.add_argument(
        "--make-model", type=Path, metavar="FOLDER", help="write an OPT-125M shape here and stop"
    )
    parser.add_argument("--workload", type=Path, metavar="FILE", help="what to run (see above)")
    parser.add_argument(
        "--contestants",
        nargs="+",
        choices=("engine", "int8", "reference", "invariant", "transformers"),
        default=["engine", "int8", "reference", "transformers"],
        help="who runs: the engine in --dtype, in int8, with plain-torch ops, with the switch for batch"
        " invariance; transformers. By default all but the switch",
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=positive, default=2, help="of torch, by default 2")
    parser.add_argument("--repeats", type=positive, default=5, help="rounds, by default 5")
    parser.add_argument(
        "--batch-sizes",
        type=positive,
        nargs="+",
        default=[16, 64],
        metavar="N",
        help="of the batches `transformers` gets, by default 16 and 64; the engine makes its own",
    )
    parser.add_argument("--chart", type=Path, metavar="FILE.svg", help="draw rates by size of the batch")
    parser.add_argument(
        "--chart-sizes",
        type=positive,
        nargs="+",
        default=[1, 2, 4, 8, 16, 32, 64],
        metavar="N",
        help="sizes in the chart, by default 1 2 4 8 16 32 64; those above the workload's are left out",
    )
    parser.add_argument("--max-num-sequences", type=positive, default=256)
    parser.add_argument("--max-num-batched-tokens", type=positive, default=2048)
    return parser.parse_args()


if __name__ == "__main__":
    main()
