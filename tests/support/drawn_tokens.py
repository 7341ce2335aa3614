"""Parameters for drawing tokens, and whether what was drawn follows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

NINE_LOGITS: Final = torch.tensor([1.5, -0.5, 0.0, 2.0, 1.0, -3.0, 0.5, 2.5, -1.0])

Cut = tuple[float, int, float, float]
"""Temperature, top_k, top_p, min_p."""


def make_parameters(cuts: Sequence[Cut]) -> tuple[Tensor, Tensor]:
    """Numbers and controls of as many rows, each with a seed of its own."""
    numbers = [(seed_of(row), row % 3, 100 + row, top_k) for row, (_, top_k, _, _) in enumerate(cuts)]
    controls = [
        (temperature, top_p, min_p, 1.3 if row % 2 else 0.8, 0.5, -0.25)
        for row, (temperature, _, top_p, min_p) in enumerate(cuts)
    ]
    return torch.tensor(numbers), torch.tensor(controls)


def seed_of(number: int) -> int:
    """Of 64 bits and any sign."""
    sign = -1 if number % 2 else 1
    return sign * (number * 0x9E3779B97F4A7C15 % 2**63)


def p_value_of_draws(
    counts: Tensor, logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> float:
    """Of a chi-square test against the definitions in float64; 0 where a token was drawn that is cut off."""
    weights = torch.softmax(logits.double() / temperature, 0)
    weights[weights < min_p * weights.max()] = 0.0
    values, order = weights.sort(descending=True)
    values[top_k or len(values) :] = 0.0
    values[values.cumsum(0) - values >= top_p * values.sum()] = 0.0
    kept = values > 0
    if counts[order][~kept].sum() > 0:
        return 0.0
    expected = (values / values.sum())[kept] * counts.sum()
    statistic = ((counts[order][kept] - expected) ** 2 / expected).sum()
    half_freedom = torch.tensor((int(kept.sum()) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half_freedom, statistic / 2))
