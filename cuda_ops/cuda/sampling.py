"""The op that chooses tokens: one kernel for all rows, one more for those that top_k, top_p or min_p cut.

A third finds the most probable tokens where they are wanted.
"""

from __future__ import annotations

from ctypes import c_int, c_longlong
from typing import Final

import torch
from torch import Tensor

from cuda_ops import reference
from cuda_ops.cuda.elements import ELEMENTS, run_length
from cuda_ops.cuda.launcher import Launcher, LaunchShape, Variant

_THREADS: Final = 256
# Two bins of the histogram each.
_TRUNCATION_THREADS: Final = 1024
_STANDING_BYTES: Final = 20
# Enough that no multiprocessor waits for the last one, few enough that a part is worth a block.
_BLOCKS_PER_MULTIPROCESSOR: Final = 4
# Of top.cu: candidates in shared memory; each of a thread's tokens, and each part of a row, may take num_top.
_CAPACITY: Final = 2048
_MAX_VOCAB_SIZE: Final = 1 << 22
_MAX_ROWS: Final = 65535


def sample_tokens(
    launcher: Launcher,
    logits: Tensor,
    numbers: Tensor,
    controls: Tensor,
    starts: Tensor | None,
    changes: Tensor | None,
    biases: Tensor | None,
    masks: Tensor | None,
    mask_rows: Tensor | None,
    truncates: bool,
    scores: bool,
    num_top: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_rows, vocab_size = logits.shape
    if num_rows == 0 or num_rows > _MAX_ROWS or not _is_served(logits, num_top):
        return reference.sample_tokens(
            logits, numbers, controls, starts, changes, biases, masks, mask_rows, truncates, scores, num_top
        )
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    are_sound = torch.empty(num_rows, dtype=torch.bool, device=logits.device)
    tops, totals, logprobs = torch.empty((3, num_rows), dtype=torch.float32, device=logits.device).unbind()
    changed = None
    if truncates and changes is not None:
        changed = torch.empty((num_rows, vocab_size), dtype=torch.float32, device=logits.device)
    count = run_length((logits,), vocab_size, logits.stride(0))
    part_size = _part_size(launcher, num_rows, vocab_size, count)
    num_parts = -(-vocab_size // part_size)
    standings = torch.empty(
        (num_rows, num_parts, _STANDING_BYTES // 4), dtype=torch.float32, device=logits.device
    )
    arrivals = torch.zeros(num_rows, dtype=torch.int32, device=logits.device)
    variant = Variant.of(
        "sampling", "draw",
        ELEMENT=ELEMENTS[logits.dtype], COUNT=count, THREADS=_THREADS,
        CHANGES=int(changes is not None), TRUNCATES=int(truncates), SCORES=int(scores or num_top > 0),
    )  # fmt: skip
    shared_bytes = -(-part_size // 32) * 4 if changes is not None else 0
    launcher.launch(
        variant,
        LaunchShape((num_parts, num_rows, 1), _THREADS, shared_bytes),
        (
            token_ids, logprobs, are_sound, tops, totals, changed, standings, arrivals,
            logits, numbers, controls, starts, changes, biases, masks, mask_rows,
            c_longlong(logits.stride(0)), c_int(vocab_size), c_int(part_size),
            c_int(masks.shape[1] if masks is not None else 0),
        ),
    )  # fmt: skip
    if truncates:
        _launch_truncated(
            launcher, logits, changed, (token_ids, logprobs, tops, totals), (numbers, controls), scores=scores
        )
    top_ids, top_logprobs = _launch_top(launcher, logits, totals, arrivals, num_top)
    return token_ids, logprobs if scores else logprobs[:0], are_sound, top_ids, top_logprobs


def _launch_top(
    launcher: Launcher, logits: Tensor, totals: Tensor, arrivals: Tensor, num_top: int
) -> tuple[Tensor, Tensor]:
    num_rows, vocab_size = logits.shape
    top_ids = torch.empty((num_rows, num_top), dtype=torch.int64, device=logits.device)
    top_logprobs = torch.empty((num_rows, num_top), dtype=torch.float32, device=logits.device)
    if num_top == 0:
        return top_ids, top_logprobs
    count = run_length((logits,), vocab_size, logits.stride(0))
    of_thread = _CAPACITY // num_top
    part_size = min(
        max(_part_size(launcher, num_rows, vocab_size, count), -(-vocab_size // of_thread)),
        of_thread // count * count * _THREADS,
    )
    part_size = -(-part_size // count) * count
    num_parts = -(-vocab_size // part_size)
    candidates = torch.empty((num_rows, num_parts, num_top), dtype=torch.int64, device=logits.device)
    launcher.launch(
        Variant.of(
            "top", "top_logprobs",
            ELEMENT=ELEMENTS[logits.dtype], COUNT=count, THREADS=_THREADS, CAPACITY=_CAPACITY,
        ),
        LaunchShape((num_parts, num_rows, 1), _THREADS),
        (
            top_ids, top_logprobs, candidates, arrivals, logits, totals,
            c_longlong(logits.stride(0)), c_int(vocab_size), c_int(part_size), c_int(num_top),
        ),
    )  # fmt: skip
    return top_ids, top_logprobs


def _is_served(logits: Tensor, num_top: int) -> bool:
    vocab_size = logits.shape[1]
    if logits.dtype not in ELEMENTS or logits.stride(1) != 1 or vocab_size > _MAX_VOCAB_SIZE:
        return False
    # Runs of the widest element have eight.
    of_thread = _CAPACITY // max(1, num_top)
    return num_top <= _THREADS and vocab_size <= of_thread * (of_thread // 8 * 8) * _THREADS


def _launch_truncated(
    launcher: Launcher,
    logits: Tensor,
    changed: Tensor | None,
    results: tuple[Tensor, ...],
    parameters: tuple[Tensor, Tensor],
    *,
    scores: bool,
) -> None:
    raced = logits if changed is None else changed
    count = run_length((raced,), logits.shape[1], raced.stride(0))
    variant = Variant.of(
        "truncation", "draw_truncated",
        ELEMENT=ELEMENTS[raced.dtype], OWN_ELEMENT=ELEMENTS[logits.dtype], COUNT=count,
        THREADS=_TRUNCATION_THREADS, SCORES=int(scores),
    )  # fmt: skip
    launcher.launch(
        variant,
        LaunchShape((len(logits), 1, 1), _TRUNCATION_THREADS),
        (
            *results, raced, logits, *parameters, c_longlong(raced.stride(0)), c_longlong(logits.stride(0)),
            c_int(logits.shape[1]),
        ),
    )  # fmt: skip


def _part_size(launcher: Launcher, num_rows: int, vocab_size: int, count: int) -> int:
    """Tokens of a block: whole rounds of its threads, so that no part begins within a run."""
    wanted = -(-_BLOCKS_PER_MULTIPROCESSOR * launcher.num_multiprocessors // num_rows)
    a_round = _THREADS * count
    return max(1, -(-vocab_size // (wanted * a_round))) * a_round
