"""Tokens between the device that chose them and the host that reads them."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.sequence import TokenLogprob


@dataclass(frozen=True, slots=True)
class SampledToken:
    """Attributes:
    entry: `None` unless the request's parameters need log-probabilities.
    is_sound: Whether its logits were numbers; of a row with a NaN or an infinity any token may come.
    """

    token_id: int
    entry: TokenLogprob | None
    is_sound: bool = True


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Log-probabilities by the model's own distribution, of some of the rows that were chosen for.

    Attributes:
        rows: Which these are, ascending.
        logprobs: `[len(rows)]` float32, of the chosen tokens.
        top_ids: `[len(rows), num_top]` int64, the most probable tokens, best first.
        top_logprobs: Like `top_ids`, float32.
    """

    rows: SequenceOf[int]
    logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor

    def entries(self, token_ids: SequenceOf[int], num_tops: SequenceOf[int]) -> list[TokenLogprob]:
        """One for each of `rows`: of its chosen token, and with so many of the most probable ones."""
        columns = (self.logprobs.tolist(), self.top_ids.tolist(), self.top_logprobs.tolist())
        return [
            TokenLogprob(token_id, logprob, tuple(zip(ids[:num_top], values[:num_top], strict=True)))
            for token_id, num_top, logprob, ids, values in zip(token_ids, num_tops, *columns, strict=True)
        ]


class ChosenTokens:
    """Tokens chosen on the device, on their way to the host.

    Attributes:
        ids: `[num_rows]` int64 on the device.
    """

    def __init__(self, ids: Tensor, are_sound: Tensor, scores: TokenScores | None = None) -> None:
        """`scores`: on the device, of all rows whose log-probabilities will be read."""
        self.ids = ids
        self._facts = _to_host(torch.stack((ids, are_sound.to(ids.dtype))))
        self._scores = None if scores is None else _scores_to_host(scores)
        # torch has no types for its events.
        self._arrived = torch.cuda.Event() if ids.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        if self._arrived is not None:
            self._arrived.record()

    def read(self, num_tops: SequenceOf[int | None]) -> list[SampledToken]:
        """The tokens, and whether each one's logits were numbers. Waits for the device to come so far.

        Args:
            num_tops: For each row how many of the most probable tokens are wanted beside the chosen one's
                log-probability; None where neither is.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        token_ids, are_sound = self._facts.tolist()
        entries: dict[int, TokenLogprob] = {}
        if self._scores is not None:
            rows = self._scores.rows
            made = self._scores.entries(
                [token_ids[row] for row in rows], [num_tops[row] or 0 for row in rows]
            )
            entries = {row: entry for row, entry in zip(rows, made, strict=True) if num_tops[row] is not None}
        return [
            SampledToken(token_id, entries.get(row), bool(is_sound))
            for row, (token_id, is_sound) in enumerate(zip(token_ids, are_sound, strict=True))
        ]


def _scores_to_host(scores: TokenScores) -> TokenScores:
    return TokenScores(
        scores.rows, _to_host(scores.logprobs), _to_host(scores.top_ids), _to_host(scores.top_logprobs)
    )


def _to_host(values: Tensor) -> Tensor:
    """A copy, which from a GPU is there once the stream has come so far."""
    on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.device.type == "cuda")
    return on_host.copy_(values, non_blocking=True)
