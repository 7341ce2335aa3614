"""What choosing tokens means: the generator's published answers, the distribution, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cuda_ops
from cuda_ops import reference
from cuda_ops.errors import OpInputError
from cuda_ops.sampling import LogitChanges
from tests.support.drawn_tokens import NINE_LOGITS, make_parameters, p_value_of_draws

NUM_DRAWS = 20_000


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((1, 2, 3), -5, None),
    ],
)
def test_philox_gives_its_published_answers_and_those_of_its_definition(
    counter: tuple[int, int, int], key: int, words: str | None
) -> None:
    actual = [int(word) for word in reference.philox(*map(torch.tensor, (*counter, key)))]

    assert actual == philox_by_definition((*counter, 0), key % 2**64)
    assert words is None or " ".join(f"{word:08x}" for word in actual) == words


def philox_by_definition(counter: tuple[int, int, int, int], key: int) -> list[int]:
    """In Python's own numbers, which never wrap."""
    state, (low, high) = list(counter), (key % 2**32, key >> 32)
    for _ in range(10):
        first, second = state[0] * 0xD2511F53, state[2] * 0xCD9E8D57
        state = [
            (second >> 32) ^ state[1] ^ low,
            second % 2**32,
            (first >> 32) ^ state[3] ^ high,
            first % 2**32,
        ]
        low, high = (low + 0x9E3779B9) % 2**32, (high + 0xBB67AE85) % 2**32
    return state


@pytest.mark.parametrize("cut", [(0, 1.0, 0.0), (4, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.2), (6, 0.9, 0.01)])
@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_sample_tokens_draws_from_the_distribution_asked_for(
    cut: tuple[int, float, float], temperature: float
) -> None:
    parameters = make_parameters([(temperature, *cut)] * NUM_DRAWS)

    chosen = cuda_ops.sample_tokens(
        NINE_LOGITS.expand(NUM_DRAWS, -1), *parameters, truncates=True, scores=False
    )

    counts = torch.bincount(chosen.token_ids, minlength=len(NINE_LOGITS))
    assert p_value_of_draws(counts, NINE_LOGITS, temperature, *cut) > 1e-4


def test_sample_tokens_draws_anew_for_each_seed_sequence_and_position() -> None:
    numbers = torch.tensor(
        [(seed, index, place, 0) for seed in (0, -1) for index in (0, 1) for place in (5, 6)]
    )
    controls = torch.tensor([[1.0, 1.0, 0.0, 1.0, 0.0, 0.0]]).repeat(8, 1)

    chosen = cuda_ops.sample_tokens(torch.zeros(8, 10**5), numbers, controls, truncates=False, scores=False)

    assert len(set(chosen.token_ids.tolist())) == 8


def changes_of(num_rows: int, vocab_size: int) -> LogitChanges:
    return LogitChanges(
        torch.zeros(num_rows + 1, dtype=torch.int32),
        torch.zeros(0, 3, dtype=torch.int32),
        torch.zeros(0),
        torch.zeros(0, -(-vocab_size // 32), dtype=torch.int32),
        torch.full((num_rows,), -1, dtype=torch.int32),
    )


def broken(changes: LogitChanges, **parts: Tensor) -> LogitChanges:
    names = ("starts", "tokens", "biases", "masks", "mask_rows")
    return LogitChanges(*(parts.get(name, getattr(changes, name)) for name in names))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logits": torch.zeros(3)}, "logits is"),
        ({"logits": torch.zeros(3, 0)}, "logits is"),
        ({"numbers": torch.zeros(2, 4, dtype=torch.int64)}, "numbers is"),
        ({"numbers": torch.zeros(3, 4)}, "numbers is"),
        ({"controls": torch.zeros(6, 3).T}, "controls is"),
        ({"changes": broken(changes_of(3, 64), masks=torch.zeros(1, 1, dtype=torch.int32))}, "masks is"),
        ({"changes": broken(changes_of(3, 64), starts=torch.zeros(3, dtype=torch.int32))}, "starts is"),
    ],
)
def test_sample_tokens_refuses_what_does_not_fit(changed: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "logits": torch.zeros(3, 64),
        "numbers": torch.zeros(3, 4, dtype=torch.int64),
        "controls": torch.zeros(3, 6),
        "changes": changes_of(3, 64),
    }

    with pytest.raises(OpInputError, match=message):
        cuda_ops.sample_tokens(**{**arguments, **changed}, truncates=False, scores=False)


def test_sample_tokens_is_one_node_of_a_compiled_graph() -> None:
    logits, parameters = torch.randn(4, 50), make_parameters([(1.0, 5, 0.9, 0.0)] * 4)

    def choose(logits: Tensor, numbers: Tensor, controls: Tensor) -> tuple[Tensor, Tensor]:
        chosen = cuda_ops.sample_tokens(logits * 2, numbers, controls, truncates=True, scores=True)
        return chosen.token_ids, chosen.logprobs

    compiled = torch.compile(choose, fullgraph=True, backend="aot_eager")

    for actual, meant in zip(compiled(logits, *parameters), choose(logits, *parameters), strict=True):
        assert torch.equal(actual, meant)
