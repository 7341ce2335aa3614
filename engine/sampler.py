"""From logits to tokens: one pass over the whole batch for each thing that any of its rows asks for.

    greedy                      one argmax
    temperature                 softmax and cumulative sum over the vocabulary, one uniform number a row
    top_k, top_p, min_p         the same over the most probable tokens only, sorted
    penalties, logit_bias       on the rows that have them, before the above; forbidden tokens likewise
    log-probabilities           log-softmax of the model's own logits, on the rows that want it

The draw is by inversion: one uniform number a token, so a row's token depends on its own logits and number
and on nothing else in the batch.

That is the CPU's way. On a GPU one op does all of it, without a sort, and draws by a race in which every
token has a number of its own (`cuda_ops.sample_tokens`): cheap there, dear on a CPU. So a seed stands for
other tokens on the other kind of device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import cuda_ops
from engine.batch import to_device
from engine.chosen_tokens import ChosenTokens, SampledToken, TokenScores
from engine.packed_rows import pack_changes, pack_draws
from engine.sampling import MAX_TOP_LOGPROBS, SamplingParams, uniform_draw
from engine.sequence import Sequence, TokenLogprob

# Sorting a vocabulary is slow; nearly always the first few tokens hold all of top_p.
_NUCLEUS_SIZES = (64, 1024, 8192)


@dataclass(frozen=True, slots=True)
class SamplerRow:
    """One token to choose.

    Attributes:
        row: Of the logits; several sequences may share one, right after a fork.
        forbidden: Tokens that must not be chosen.
        ahead: Tokens that are taken to have followed those of the sequence.
        allowed: One bit for each token that may be; `None` for all.
    """

    row: int
    sequence: Sequence
    params: SamplingParams
    seed: int
    forbidden: frozenset[int] = frozenset()
    allowed: bytes | None = None
    ahead: tuple[int, ...] = ()

    @property
    def changes_logits(self) -> bool:
        return self.params.changes_logits or bool(self.forbidden) or self.allowed is not None

    @property
    def position(self) -> int:
        """The place in its sequence that the token will have."""
        return len(self.sequence.token_ids) + len(self.ahead)

    @property
    def draw(self) -> float:
        return uniform_draw(self.seed, self.sequence.index, self.position)


@torch.inference_mode()
def choose(logits: Tensor, rows: SequenceOf[SamplerRow]) -> ChosenTokens:
    """Choose a token for each row. `logits`: `[num_rows, vocab_size]` float32, left as they are.

    Waits for no GPU.
    """
    return _choose_each(_select(logits, [row.row for row in rows]), rows)


@torch.inference_mode()
def sample(logits: Tensor, rows: SequenceOf[SamplerRow]) -> list[SampledToken]:
    """Choose a token for each row, as `choose`, and read it, with the log-probabilities that are wanted."""
    return choose(logits, rows).read(num_tops(rows)) if rows else []


@torch.inference_mode()
def choose_by_race(logits: Tensor, rows: SequenceOf[SamplerRow]) -> ChosenTokens:
    """As `choose`, by one op; `logits` has a row for each of `rows`."""
    has_scores = any(row.params.needs_logprobs for row in rows)
    chosen = cuda_ops.sample_tokens(
        logits,
        *pack_draws(rows, logits.device),
        pack_changes(rows, logits.shape[-1], logits.device),
        truncates=any(_truncates(row.params) for row in rows),
        scores=has_scores,
        num_top=min(max(num or 0 for num in num_tops(rows)), logits.shape[-1]),
    )
    scores = TokenScores(range(len(rows)), chosen.logprobs, chosen.top_ids, chosen.top_logprobs)
    return ChosenTokens(chosen.token_ids, chosen.are_sound, scores if has_scores else None)


@torch.inference_mode()
def score(logits: Tensor, token_ids: SequenceOf[int], num_top: int) -> list[TokenLogprob]:
    """The log-probability of a given token in each row, and of the `num_top` most probable ones."""
    scores = TokenScores(range(len(logits)), *_scores(logits, _indices(token_ids, logits), num_top))
    return scores.entries(token_ids, [num_top] * len(token_ids))


@torch.inference_mode()
def rank(logits: Tensor, token_ids: SequenceOf[int]) -> list[int]:
    """The place of a given token in each row, 1 for the most probable one."""
    chosen = logits.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])
    ranks: list[int] = ((logits > chosen).sum(dim=-1) + 1).tolist()
    return ranks


@torch.inference_mode()
def most_probable(
    logits: Tensor, num_top: int, forbidden: SequenceOf[frozenset[int]] = ()
) -> list[list[tuple[int, float]]]:
    """Per row the `num_top` most probable tokens with their log-probabilities, best first.

    `forbidden` tokens, given for all rows or none, come last; the others keep their probabilities.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    for row, tokens in enumerate(forbidden):
        _forbid_in(logprobs[row], tokens)
    values, ids = logprobs.topk(min(num_top, logits.shape[-1]))
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return [list(zip(row_ids, row_values, strict=True)) for row_ids, row_values in pairs]


def _select(values: Tensor, rows: list[int]) -> Tensor:
    if rows == list(range(values.shape[0])):
        return values
    return values[_indices(rows, values)]


def _indices(values: SequenceOf[int], like: Tensor) -> Tensor:
    return to_device(np.array(values, dtype=np.int64), like.device)


def _choose_each(logits: Tensor, rows: SequenceOf[SamplerRow]) -> ChosenTokens:
    """As `choose`; `logits` has a row for each of `rows`."""
    if logits.is_cuda:
        return choose_by_race(logits, rows)
    token_ids = _choose(_apply_changes(logits, rows), rows)
    return ChosenTokens(token_ids, _are_sound(logits, rows, token_ids), _score_rows(logits, rows, token_ids))


def _choose(logits: Tensor, rows: SequenceOf[SamplerRow]) -> Tensor:
    """`[num_rows]` int64."""
    drawn = [index for index, row in enumerate(rows) if not row.params.is_greedy]
    if not drawn:
        return cuda_ops.argmax(logits)
    has_greedy = len(drawn) < len(rows)
    chosen = cuda_ops.argmax(logits) if has_greedy else _indices([0] * len(rows), logits)
    truncated = [index for index in drawn if _truncates(rows[index].params)]
    untruncated = [index for index in drawn if not _truncates(rows[index].params)]
    for group, draw_from in ((untruncated, _invert), (truncated, _draw_from_nucleus)):
        if group:
            group_rows = [rows[index] for index in group]
            probabilities = _probabilities(_select(logits, group), group_rows)
            chosen[_indices(group, logits)] = draw_from(probabilities, group_rows)
    return chosen


def _are_sound(logits: Tensor, rows: SequenceOf[SamplerRow], token_ids: Tensor) -> Tensor:
    """`[num_rows]` bool. Of a greedy row the chosen token tells: argmax finds a NaN first, then infinity."""
    extremes = logits.gather(1, token_ids[:, None])[:, 0]
    drawn = [index for index, row in enumerate(rows) if not row.params.is_greedy]
    if drawn:
        extremes[_indices(drawn, logits)] = _select(logits, drawn).amax(dim=-1)
    return extremes.isfinite()


def _truncates(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _probabilities(logits: Tensor, rows: SequenceOf[SamplerRow]) -> Tensor:
    temperatures = _column([row.params.temperature for row in rows], logits)
    return cuda_ops.softmax_at(logits, temperatures.flatten())


def _draw_from_nucleus(probabilities: Tensor, rows: SequenceOf[SamplerRow]) -> Tensor:
    """Draw from the head of each row, the first that is long enough: a row's own affair, not the batch's."""
    chosen = torch.zeros(len(rows), dtype=torch.int64)
    left = list(range(len(rows)))
    vocab_size = probabilities.shape[-1]
    for size in (*(size for size in _NUCLEUS_SIZES if size < vocab_size), vocab_size):
        head, ids = _most_probable(_select(probabilities, left), size)
        held = _rows_that_hold(head, vocab_size, [rows[index] for index in left])
        if held:
            held_rows = [rows[left[place]] for place in held]
            drawn = _draw_from_head(_select(head, held), _select(ids, held), held_rows)
            chosen[[left[place] for place in held]] = drawn
        left = [index for place, index in enumerate(left) if place not in held]
        if not left:
            break
    return chosen


def _most_probable(probabilities: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The head of each row, sorted, and where it stood."""
    if size < probabilities.shape[-1]:
        return probabilities.topk(size)
    return torch.sort(probabilities, dim=-1, descending=True, stable=True)


def _draw_from_head(head: Tensor, ids: Tensor, rows: SequenceOf[SamplerRow]) -> Tensor:
    """Keep what min_p, then top_k, then top_p leave, and draw from that."""
    kept = head * _is_kept(head, rows)
    return ids.gather(1, _invert(kept, rows)[:, None]).flatten()


def _rows_that_hold(head: Tensor, vocab_size: int, rows: SequenceOf[SamplerRow]) -> list[int]:
    """Those whose head has all that their parameters can keep."""
    size = head.shape[-1]
    if size == vocab_size:
        return list(range(len(rows)))
    largest, smallest = head[:, 0].tolist(), head[:, -1].tolist()
    totals = head.sum(dim=-1).tolist()
    facts = enumerate(zip(rows, largest, smallest, totals, strict=True))
    return [
        place
        for place, (row, first, last, total) in facts
        if _holds_row(row.params, size, first, last, total)
    ]


def _holds_row(params: SamplingParams, size: int, largest: float, smallest: float, total: float) -> bool:
    """Whether the first cut that applies to the whole vocabulary falls within a head of `size` tokens."""
    if 0 < params.top_k <= size:
        return True
    if params.min_p > 0.0 and smallest < params.min_p * largest:
        return True
    return params.top_k == 0 and params.min_p == 0.0 and total >= params.top_p


def _is_kept(values: Tensor, rows: SequenceOf[SamplerRow]) -> Tensor:
    """`[num_rows, head]` bool, for probabilities sorted in descending order."""
    head = values.shape[-1]
    min_p = _column([row.params.min_p for row in rows], values)
    top_k = _column([float(row.params.top_k or head) for row in rows], values)
    top_p = _column([row.params.top_p for row in rows], values)
    kept = (values >= min_p * values[:, :1]) & (torch.arange(head, device=values.device) < top_k)
    rest = values * kept
    cumulative = rest.cumsum(dim=-1)
    # top_p holds of what min_p and top_k have left: the shortest head that reaches it. They leave no more
    # than the head; without them all of the vocabulary is left, of which the head is only a part.
    is_cut = _column([float(row.params.min_p > 0 or row.params.top_k > 0) for row in rows], values) > 0
    # The last of a running sum, for a plain sum is rounded differently for heads of different lengths.
    left = torch.where(is_cut, cumulative[:, -1:], 1.0)
    kept &= (cumulative - rest < top_p * left) | (top_p >= 1.0)
    kept[:, 0] = True
    return kept


def _invert(weights: Tensor, rows: SequenceOf[SamplerRow]) -> Tensor:
    """Per row the first place where the cumulative weight exceeds the row's uniform share of the total."""
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    target = _column([row.draw for row in rows], weights) * total
    # Rounding may lift the target to the total itself, past the last token of any weight.
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    # Among NaNs nothing is found, not even the end.
    found = torch.searchsorted(cumulative, target, right=True).clamp_(max=weights.shape[-1] - 1)
    return found.flatten()


def _apply_changes(logits: Tensor, rows: SequenceOf[SamplerRow]) -> Tensor:
    """A copy with penalties and biases where any row has them, else the logits themselves."""
    if not any(row.changes_logits for row in rows):
        return logits
    changed = logits.clone()
    for index, row in enumerate(rows):
        if row.params.changes_logits:
            _apply_penalties(changed[index], row)
        _forbid_in(changed[index], row.forbidden)
        if row.allowed is not None:
            _allow_only(changed[index], row.allowed)
    return changed


def _forbid_in(logits: Tensor, forbidden: frozenset[int]) -> None:
    """In place, on one row; not where nothing would be left to choose."""
    if forbidden and len(forbidden) < logits.shape[-1]:
        logits[_indices(sorted(forbidden), logits)] = -torch.inf


def _apply_penalties(logits: Tensor, row: SamplerRow) -> None:
    """In place, on one row `[vocab_size]`: bias, repetition, then the two that subtract.

    The order is that of vLLM and `transformers`; it shows where a token has a bias and is seen again, for
    the repetition penalty multiplies.
    """
    params = row.params
    if params.logit_bias:
        biases = np.array(list(params.logit_bias.values()), dtype=np.float32)
        logits[_indices(list(params.logit_bias), logits)] += to_device(biases, logits.device)
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*row.sequence.token_ids, *row.ahead}), device=logits.device)
        values = logits[seen]
        penalty = params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    counts = Counter((*row.sequence.output_token_ids, *row.ahead))
    if counts and (params.presence_penalty or params.frequency_penalty):
        ids = torch.tensor(list(counts), device=logits.device)
        occurrences = torch.tensor(list(counts.values()), device=logits.device)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * occurrences


def _allow_only(logits: Tensor, allowed: bytes) -> None:
    """In place, on one row; `allowed` has a bit for each of its tokens, and may have more."""
    bits = np.unpackbits(np.frombuffer(allowed, dtype=np.uint8), count=logits.shape[-1], bitorder="little")
    logits.masked_fill_(torch.from_numpy(bits == 0).to(logits.device), -torch.inf)


def _score_rows(logits: Tensor, rows: SequenceOf[SamplerRow], token_ids: Tensor) -> TokenScores | None:
    """Of the rows that want it."""
    wanted = [index for index, row in enumerate(rows) if row.params.needs_logprobs]
    if not wanted:
        return None
    # The same for all: which of equally probable tokens come first depends on how many are asked for.
    num_top = min(MAX_TOP_LOGPROBS, logits.shape[-1]) if any(rows[i].params.logprobs for i in wanted) else 0
    return TokenScores(wanted, *_scores(_select(logits, wanted), _select(token_ids, wanted), num_top))


def _scores(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens' log-probabilities `[num_rows]`; ids and values of the best ones, `[num_rows, num_top]`."""
    logprobs = torch.log_softmax(logits, dim=-1)
    values, ids = logprobs.topk(num_top)
    return logprobs.gather(1, token_ids[:, None])[:, 0], ids, values


def num_tops(rows: SequenceOf[SamplerRow]) -> list[int | None]:
    """How many of the most probable tokens each row wants beside its own; None for no log-probability."""
    return [(row.params.logprobs or 0) if row.params.needs_logprobs else None for row in rows]


def _column(values: list[float], like: Tensor) -> Tensor:
    return to_device(np.array(values, dtype=np.float32), like.device)[:, None]
