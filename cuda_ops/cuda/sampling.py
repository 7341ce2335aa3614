"""The op that chooses tokens: one kernel for all rows, one more for those that top_k, top_p or min_p cut."""

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
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, vocab_size = logits.shape
    is_served = logits.dtype in ELEMENTS and logits.stride(1) == 1 and vocab_size <= _MAX_VOCAB_SIZE
    if num_rows == 0 or num_rows > _MAX_ROWS or not is_served:
        return reference.sample_tokens(
            logits, numbers, controls, starts, changes, biases, masks, mask_rows, truncates, scores
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
        CHANGES=int(changes is not None), TRUNCATES=int(truncates), SCORES=int(scores),
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
    return token_ids, logprobs if scores else logprobs[:0], are_sound


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
