"""GPU kernels against what the device reaches in the same run, and against torch's and FlashInfer's."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Generic, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

import cuda_ops
from benchmarks.measure import positive
from cuda_ops.cuda.quantised import MOST_ROWS
from cuda_ops.float8 import round_to_float8
from cuda_ops.native import use_cuda_kernels
from cuda_ops.quantised import QuantisedWeight, lay_out_codes

BLOCK_SIZE = 16
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
HIDDEN, INTERMEDIATE, VOCAB_SIZE = 4096, 14336, 128_256
# More than the 60 MB of an H200's second level cache: a step's inputs were evicted since the last one.
COLD_BYTES = 256 * 2**20

T = TypeVar("T")
Unit = Literal["GB/s", "TFLOP/s"]


@dataclass(frozen=True, slots=True)
class Case:
    """Attributes:
    work: bytes that must move, or floating point operations.
    ways: by name; the first is ours.
    num_copies: of its inputs, which calls take in turn, so that none is in a cache.
    """

    name: str
    unit: Unit
    work: float
    ways: dict[str, Callable[[], object]]
    num_copies: int = 1


@dataclass(frozen=True, slots=True)
class Pages:
    """A paged cache with every sequence's blocks spread at random."""

    keys: Tensor
    values: Tensor
    tables: Tensor
    lengths: Tensor

    @classmethod
    def random(cls, num_sequences: int, context_len: int, dtype: torch.dtype = torch.bfloat16) -> Pages:
        blocks_each = -(-context_len // BLOCK_SIZE)
        num_blocks = num_sequences * blocks_each
        shape = (num_blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        keys, values = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(dtype) for _ in range(2))
        tables = torch.randperm(num_blocks, device="cuda").to(torch.int32).view(num_sequences, blocks_each)
        lengths = torch.full((num_sequences,), context_len, dtype=torch.int32, device="cuda")
        return cls(keys, values, tables, lengths)


class Turns(Generic[T]):
    """Things to take one after the other, for ever."""

    def __init__(self, things: Iterable[T]) -> None:
        self._things = itertools.cycle(tuple(things))

    def next(self) -> T:
        return next(self._things)


def seconds_of(call: Callable[[], object], rounds: int, num_copies: int = 1) -> float:
    """Median time of a call on the device, without the host's part of it: the calls are in one graph."""
    calls = max(5, num_copies)
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / calls)
    return statistics.median(times)


def rotated(num_bytes: float) -> int:
    """How many copies of inputs, used in turn, keep each cold."""
    return max(1, math.ceil(COLD_BYTES / num_bytes))


def measure_limits(rounds: int) -> dict[Unit, float]:
    """What the device reaches in a plain copy (read and write) and in a large product."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.numel() / seconds_of(lambda: target.copy_(source), rounds)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    multiplied = 2 * 8192**3 / seconds_of(lambda: torch.mm(a, b), rounds)
    return {"GB/s": copied / 1e9, "TFLOP/s": multiplied / 1e12}


def decode_case(num_sequences: int, context_len: int) -> Case:
    work = 4.0 * num_sequences * context_len * KV_HEADS * HEAD_DIM
    num_copies = rotated(work)
    copies = [Pages.random(num_sequences, context_len) for _ in range(num_copies)]
    query = torch.randn(num_sequences, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    out, scale = torch.empty_like(query), HEAD_DIM**-0.5
    paged, contiguous = Turns(copies), Turns([gather(pages, context_len) for pages in copies])

    def ours() -> None:
        pages = paged.next()
        cuda_ops.paged_attention_decode(
            out, query, pages.keys, pages.values, pages.tables, pages.lengths,
            max_context_len=context_len, scale=scale,
        )  # fmt: skip

    def plain() -> Tensor:
        keys, values = contiguous.next()
        return F.scaled_dot_product_attention(query.unsqueeze(2), keys, values, scale=scale, enable_gqa=True)

    ways: dict[str, Callable[[], object]] = {"ours": ours, "SDPA, keys contiguous": plain}
    if importlib.util.find_spec("flashinfer") is not None:
        theirs = Turns([flashinfer_decode(pages, query, context_len) for pages in copies])
        ways["FlashInfer"] = lambda: theirs.next()()
    return Case(f"decode, {num_sequences} x {context_len}", "GB/s", work, ways, num_copies)


def float8_case(num_sequences: int, context_len: int) -> Case:
    """Decode over a cache of float8, half the bytes; against ours over bfloat16 by what that moves."""
    work = 2.0 * num_sequences * context_len * KV_HEADS * HEAD_DIM
    num_copies = rotated(work)
    query = torch.randn(num_sequences, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    out, scale = torch.empty_like(query), HEAD_DIM**-0.5

    def over(dtype: torch.dtype) -> Callable[[], object]:
        paged = Turns([Pages.random(num_sequences, context_len, dtype) for _ in range(num_copies)])

        def decode() -> None:
            pages = paged.next()
            cuda_ops.paged_attention_decode(
                out, query, pages.keys, pages.values, pages.tables, pages.lengths,
                max_context_len=context_len, scale=scale,
            )  # fmt: skip

        return decode

    ways = {"ours": over(torch.float8_e4m3fn), "ours, bfloat16": over(torch.bfloat16)}
    return Case(f"decode over float8, {num_sequences} x {context_len}", "GB/s", work, ways, num_copies)


def gather(pages: Pages, context_len: int) -> tuple[Tensor, Tensor]:
    """Keys and values, each `[num_sequences, KV_HEADS, context_len, HEAD_DIM]`."""
    keys, values = (
        cache[pages.tables.long()].transpose(1, 2).flatten(2, 3)[:, :, :context_len].contiguous()
        for cache in (pages.keys, pages.values)
    )
    return keys, values


def flashinfer_decode(pages: Pages, query: Tensor, context_len: int) -> Callable[[], object]:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    num_sequences, blocks_each = pages.tables.shape
    workspace = torch.empty(128 * 2**20, dtype=torch.uint8, device="cuda")
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, kv_layout="HND", use_tensor_cores=True)
    starts = torch.arange(num_sequences + 1, dtype=torch.int32, device="cuda") * blocks_each
    last = torch.full((num_sequences,), (context_len - 1) % BLOCK_SIZE + 1, dtype=torch.int32, device="cuda")
    wrapper.plan(
        starts, pages.tables.flatten(), last, HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE,
        q_data_type=query.dtype, kv_data_type=query.dtype,
    )  # fmt: skip
    return lambda: wrapper.run(query, (pages.keys, pages.values))


def prefill_case(num_new: int, num_old: int) -> Case:
    context_len = num_old + num_new
    pages = Pages.random(1, context_len)
    query = torch.randn(num_new, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    out, scale = torch.empty_like(query), HEAD_DIM**-0.5
    starts = torch.tensor([0, num_new], dtype=torch.int32, device="cuda")

    def ours() -> None:
        cuda_ops.paged_attention_prefill(
            out, query, pages.keys, pages.values, starts, pages.lengths, pages.tables, scale=scale
        )

    ways: dict[str, Callable[[], object]] = {"ours": ours}
    if num_old == 0:
        heads = query.transpose(0, 1).unsqueeze(0)
        keys, values = gather(pages, context_len)
        ways["SDPA, keys contiguous"] = lambda: F.scaled_dot_product_attention(
            heads, keys, values, is_causal=True, scale=scale, enable_gqa=True
        )
    pairs = num_new * num_old + num_new * (num_new + 1) / 2
    return Case(f"prefill, {num_new} after {num_old}", "TFLOP/s", 4.0 * pairs * HEADS * HEAD_DIM, ways)


def row_cases(num_tokens: int) -> Iterator[Case]:
    weight = torch.randn(HIDDEN, device="cuda", dtype=torch.bfloat16)
    work = 8.0 * num_tokens * HIDDEN
    num_copies = rotated(work)
    rows, residuals = (Turns(random_rows(num_tokens, HIDDEN, num_copies)) for _ in range(2))
    yield Case(
        f"add_rms_norm, {num_tokens}", "GB/s", work,
        {
            "ours": lambda: cuda_ops.add_rms_norm(rows.next(), residuals.next(), weight, 1e-5),
            "torch add and norm": lambda: F.rms_norm(
                residuals.next().add_(rows.next()), (HIDDEN,), weight, 1e-5
            ),
        },
        num_copies,
    )  # fmt: skip
    yield Case(
        f"add_rms_norm, float8 out, {num_tokens}", "GB/s", 7.0 * num_tokens * HIDDEN,
        {
            "ours": lambda: cuda_ops.add_rms_norm_quantised(
                rows.next(), residuals.next(), weight, 1e-5, torch.float8_e4m3fn
            ),
            "ours, torch quantises": lambda: plain_quantise(
                cuda_ops.add_rms_norm(rows.next(), residuals.next(), weight, 1e-5)
            ),
        },
        num_copies,
    )  # fmt: skip
    work = 6.0 * num_tokens * INTERMEDIATE
    num_copies = rotated(work)
    gates = Turns(random_rows(num_tokens, 2 * INTERMEDIATE, num_copies))
    yield Case(
        f"silu_and_mul, {num_tokens}", "GB/s", work,
        {"ours": lambda: cuda_ops.silu_and_mul(gates.next()), "torch": lambda: plain_gate(gates.next())},
        num_copies,
    )  # fmt: skip


def rotary_case(num_tokens: int) -> Case:
    """Queries in place, keys and values into the cache, against the same by one op after the other."""
    heads = HEADS + 2 * KV_HEADS
    work = 4.0 * num_tokens * heads * HEAD_DIM
    num_copies = rotated(work)
    shape = (num_tokens // BLOCK_SIZE, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    projected = Turns(
        torch.randn(num_copies, num_tokens, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16).unbind()
    )
    keys, values = (torch.zeros(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    slots = torch.randperm(num_tokens, device="cuda")
    angles = torch.randn(num_tokens, HEAD_DIM // 2, device="cuda")
    cos_sin, weight = torch.cat((angles.cos(), angles.sin()), -1), torch.ones_like(keys[0, 0, 0])

    def fused() -> None:
        query, key, value = projected.next().split((HEADS, KV_HEADS, KV_HEADS), dim=1)
        cuda_ops.rotary_write_kv(
            query, key, value, cos_sin, keys, values, slots,
            query_weight=weight, key_weight=weight, eps=1e-6,
        )  # fmt: skip

    def one_by_one() -> None:
        query, key, value = projected.next().split((HEADS, KV_HEADS, KV_HEADS), dim=1)
        query, key = cuda_ops.rms_norm(query, weight, 1e-6), cuda_ops.rms_norm(key, weight, 1e-6)
        cuda_ops.rotary_embedding(query, key, cos_sin)
        cuda_ops.write_kv(key, value, keys, values, slots)

    ways: dict[str, Callable[[], object]] = {"ours": fused, "norms, rotation, write": one_by_one}
    return Case(f"rotary_write_kv, {num_tokens}", "GB/s", work, ways, num_copies)


def quantised_cases(bits: int) -> Iterator[Case]:
    """Against one reading of the codes. The last case has a row too many for the kernel that reads codes."""
    size = INTERMEDIATE * HIDDEN * bits / 8
    num_copies = rotated(size)
    weights = Turns([random_codes(bits) for _ in range(num_copies)])
    plain = Turns(random_rows(INTERMEDIATE, HIDDEN, rotated(2.0 * INTERMEDIATE * HIDDEN)))
    for num_rows in (1, 16, 64, 128, MOST_ROWS, MOST_ROWS + 1):
        (x,) = random_rows(num_rows, HIDDEN, 1)
        yield Case(
            f"w{bits}a16, {num_rows} x {HIDDEN} to {INTERMEDIATE}", "GB/s", size,
            {
                "ours": partial(lambda x: cuda_ops.quantised_linear(x, weights.next()), x),
                "torch, weight in bfloat16": partial(lambda x: F.linear(x, plain.next()), x),
            },
            num_copies,
        )  # fmt: skip


def float8_linear_case(num_rows: int) -> Case:
    """The rounding of the rows is part of ours."""
    weight = torch.randn(INTERMEDIATE, HIDDEN, device="cuda").bfloat16()
    rounded = round_to_float8(weight)
    (x,) = random_rows(num_rows, HIDDEN, 1)
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: cuda_ops.float8_linear(x, rounded),
        "torch, weight in bfloat16": lambda: F.linear(x, weight),
    }
    return Case(
        f"fp8, {num_rows} x {HIDDEN} to {INTERMEDIATE}", "TFLOP/s", 2.0 * num_rows * weight.numel(), ways
    )


def random_codes(bits: int) -> QuantisedWeight:
    """As AWQ has them, in groups of 128 with zeros; of 8 bits as `int8` does."""
    codes = torch.randint(0, 1 << bits, (INTERMEDIATE, HIDDEN), device="cuda", dtype=torch.uint8)
    group_size = 128 if bits == 4 else 0
    shape = (HIDDEN // 128 if group_size else 1, INTERMEDIATE)
    scales = torch.rand(shape, device="cuda", dtype=torch.float16)
    zeros = torch.randint(0, 16, shape, device="cuda", dtype=torch.uint8) if group_size else None
    return lay_out_codes(codes, scales, zeros, bits=bits, group_size=group_size)


def sampling_cases(num_rows: int) -> Iterator[Case]:
    """Against one reading of the logits, whatever a way takes."""
    size = 4.0 * num_rows * VOCAB_SIZE
    num_copies = rotated(size)
    logits = Turns([torch.randn(num_rows, VOCAB_SIZE, device="cuda") * 4 for _ in range(num_copies)])
    rows = torch.arange(num_rows, device="cuda")
    numbers = torch.stack((rows, rows * 0, rows + 100, rows * 0), 1)

    def ours(top_p: float, num_top: int = 0) -> Callable[[], object]:
        controls = torch.tensor([[0.8, top_p, 0.0, 1.0, 0.0, 0.0]], device="cuda").repeat(num_rows, 1)
        return lambda: cuda_ops.sample_tokens(
            logits.next(), numbers, controls, truncates=top_p < 1.0, scores=num_top > 0, num_top=num_top
        )

    yield Case(
        f"sample, {num_rows}", "GB/s", size,
        {"ours": ours(1.0), "torch softmax and race": lambda: plain_race(logits.next())},
        num_copies,
    )  # fmt: skip
    yield Case(
        f"sample, top_p, {num_rows}", "GB/s", size,
        {"ours": ours(0.9), "torch sort": lambda: plain_nucleus(logits.next())},
        num_copies,
    )  # fmt: skip
    yield Case(
        f"sample, 20 logprobs, {num_rows}", "GB/s", size,
        {"ours": ours(1.0, 20), "torch race and topk": lambda: plain_scores(logits.next())},
        num_copies,
    )  # fmt: skip


def random_rows(num_tokens: int, size: int, num_copies: int) -> list[Tensor]:
    return [torch.randn(num_tokens, size, device="cuda").bfloat16() for _ in range(num_copies)]


def plain_quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    scales = x.abs().amax(1, keepdim=True).float() / 448
    return (x / scales).to(torch.float8_e4m3fn), scales


def plain_gate(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def plain_race(logits: Tensor) -> Tensor:
    probabilities = torch.softmax(logits / 0.8, -1)
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)


def plain_scores(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    chosen, logprobs = plain_race(logits), torch.log_softmax(logits, -1)
    values, ids = logprobs.topk(20)
    return logprobs.gather(1, chosen[:, None]), values, ids


def plain_nucleus(logits: Tensor) -> Tensor:
    values, order = torch.softmax(logits / 0.8, -1).sort(dim=-1, descending=True)
    values = values * (values.cumsum(-1) - values < 0.9)
    return order.gather(1, (values / torch.empty_like(values).exponential_()).argmax(-1, keepdim=True))


def cases(*, is_short: bool) -> Iterator[Case]:
    for num_sequences in (8, 64) if is_short else (1, 8, 32, 64, 256):
        for context_len in (1024, 8192) if is_short else (128, 1024, 4096, 8192):
            if num_sequences * context_len <= 2**20:
                yield decode_case(num_sequences, context_len)
    for num_sequences, context_len in ((8, 8192), (64, 1024), (64, 8192)):
        yield float8_case(num_sequences, context_len)
    for num_new, num_old in ((2048, 0), (2048, 6144), (8192, 0)):
        yield prefill_case(num_new, num_old)
    for num_tokens in (64, 8192):
        yield from row_cases(num_tokens)
        yield rotary_case(num_tokens)
    for bits in (4, 8):
        yield from quantised_cases(bits)
    if torch.cuda.get_device_capability() >= (8, 9):
        for num_rows in (64, 8192):
            yield float8_linear_case(num_rows)
    for num_rows in (8, 64):
        yield from sampling_cases(num_rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rounds", type=positive, default=20, help="timings of each, of which the median counts"
    )
    parser.add_argument("--short", action="store_true", help="fewer shapes of decode")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, f"torch {torch.__version__} sees no CUDA device: nothing to measure\n")
    in_use = use_cuda_kernels("native")
    torch.manual_seed(0)
    limits = measure_limits(options.rounds)
    device = f"{torch.cuda.get_device_name()}, {in_use.level}, torch {torch.__version__}"
    print(f"{device}, bfloat16; medians of {options.rounds}")
    print(f"copy {limits['GB/s']:.0f} GB/s, product of 8192 squared {limits['TFLOP/s']:.0f} TFLOP/s\n")
    print("| kernel | way | µs | rate | of the limit |\n|---|---|---|---|---|")
    for case in cases(is_short=options.short):
        for way, call in case.ways.items():
            seconds = seconds_of(call, options.rounds, case.num_copies)
            rate = case.work / seconds / (1e9 if case.unit == "GB/s" else 1e12)
            share = rate / limits[case.unit]
            print(
                f"| {case.name} | {way} | {seconds * 1e6:.1f} | {rate:.0f} {case.unit} | {share:.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
