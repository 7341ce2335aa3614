"""Gives each sequence that is due its next tokens, by the logits of the step that has just run.

    one row of logits       one token
    a proposal of k tokens     k + 1 rows and, while the proposal holds, as many tokens
    beams                   all rows of a request together

Where nothing but the token itself is wanted it may be chosen on the device and read one step later
(`TokensAhead`), so that the device has the next step's work by then.

What a sequence has taken is its progress's affair, whose blocks are free thereby the scheduler's. A request
whose own tokens cannot be had or taken fails alone: it leaves with its reason, and the others go on.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
from torch import Tensor

from engine.batch import Feed
from engine.beam_progress import BeamProgress
from engine.chosen_tokens import ChosenTokens, SampledToken
from engine.outputs import RequestFailure, TokenDelta
from engine.progress import RequestProgress
from engine.sampled_progress import SampledProgress
from engine.sampler import SamplerRow, choose, most_probable, num_tops, sample
from engine.scheduler import ScheduledBatch, ScheduledSequence, Scheduler
from engine.sequence import RequestStatus, Sequence

_NO_NUMBERS = RequestFailure(
    "logits_not_finite", "the model's numbers for this request are not finite", retryable=False
)


@dataclass(slots=True)
class Turn:
    """What became of the sequences that were due.

    Attributes:
        ended: Requests all of whose sequences are finished; the scheduler has them no more.
        num_proposed_tokens, num_accepted_tokens: Run ahead of their turn, and those of them that were kept.
    """

    deltas: list[TokenDelta] = field(default_factory=list)
    ended: list[RequestProgress] = field(default_factory=list)
    num_proposed_tokens: int = 0
    num_accepted_tokens: int = 0

    def add(self, later: Turn) -> None:
        self.deltas += later.deltas
        self.ended += later.ended
        self.num_proposed_tokens += later.num_proposed_tokens
        self.num_accepted_tokens += later.num_accepted_tokens


@dataclass(frozen=True, slots=True)
class _Due:
    """One sequence that takes tokens of its own: the rows it chooses from, in the order of its tokens.

    Attributes:
        entry: What was run; after a fork it is the first sequence's.
    """

    progress: SampledProgress
    sequence: Sequence
    entry: ScheduledSequence
    rows: list[SamplerRow]


@dataclass(frozen=True, slots=True)
class TokensAhead:
    """One step's tokens, chosen on the device and not read yet, in the order of `due`."""

    due: list[_Due]
    chosen: ChosenTokens

    def feed(self, batch: ScheduledBatch) -> Feed | None:
        """Which of the next step's tokens these are."""
        places = {id(one.sequence): place for place, one in enumerate(self.due)}
        ends = accumulate(entry.num_tokens for entry in batch.entries)
        fed = [
            (end - 1, places[id(entry.sequence)])
            for end, entry in zip(ends, batch.entries, strict=True)
            if entry.sequence.has_pending_token
        ]
        if not fed:
            return None
        rows, sources = np.array(fed, dtype=np.int64).T
        return Feed(self.chosen.ids, rows.copy(), sources.copy())

    def mark_pending(self) -> None:
        """Let what has not ended meanwhile be scheduled as if it had its token."""
        for one in self.due:
            if one.progress.request.status is not RequestStatus.FINISHED:
                one.sequence.append_pending()


class Decoding:
    def __init__(self, scheduler: Scheduler, clock: Callable[[], float]) -> None:
        self._scheduler = scheduler
        self._clock = clock

    def advance(
        self, due: SequenceOf[ScheduledSequence], progress: Mapping[str, RequestProgress], logits: Tensor
    ) -> Turn:
        """Choose tokens for all that is due.

        Args:
            due: Entries whose tokens are all run; a request's sequences in their order.
            progress: Of their requests, by id.
            logits: `[num_rows, vocab_size]`: for each entry the row of its last token, then of its proposal.
        """
        turn = Turn()
        sampled: list[_Due] = []
        beams: dict[str, list[int]] = defaultdict(list)
        first = 0
        for entry in due:
            rows = range(first, first + 1 + len(entry.proposal))
            first = rows.stop
            match progress[entry.request.request_id]:
                case BeamProgress():
                    beams[entry.request.request_id] += rows
                case SampledProgress() as own if own.params.max_tokens == 0:
                    self._end_after_prompt(own, turn)
                case SampledProgress() as own:
                    sampled += self._sequences_due(own, entry, rows, turn)
        for request_id, rows_of_beams in beams.items():
            searching = progress[request_id]
            assert isinstance(searching, BeamProgress)
            self._advance_beams(searching, logits[rows_of_beams], turn)
        self._advance_sampled(sampled, logits, turn)
        return turn

    def choose_ahead(
        self, due: SequenceOf[ScheduledSequence], progress: Mapping[str, RequestProgress], logits: Tensor
    ) -> TokensAhead:
        """Choose as `advance` does and wait for nothing; of requests that all can run ahead."""
        chosen_for = []
        for row, entry in enumerate(due):
            own = progress[entry.request.request_id]
            assert isinstance(own, SampledProgress)
            chosen_for.append(_due(own, entry.sequence, entry, range(row, row + 1)))
        return TokensAhead(chosen_for, choose(logits, [row for one in chosen_for for row in one.rows]))

    def take_ahead(self, ahead: TokensAhead) -> Turn:
        """Read what was chosen, which waits for the device; what has ended since is dropped."""
        turn = Turn()
        tokens = ahead.chosen.read(num_tops([row for one in ahead.due for row in one.rows]))
        now = self._clock()
        for one, token in zip(ahead.due, tokens, strict=True):
            one.sequence.drop_pending()
            self._take(one, [token], now, turn)
        return turn

    def _sequences_due(
        self, progress: SampledProgress, entry: ScheduledSequence, rows: range, turn: Turn
    ) -> list[_Due]:
        """The entry's sequence, or once its prompt is computed all that it is forked into."""
        request = progress.request
        if request.status is RequestStatus.FINISHED:  # another of its sequences has failed
            return []
        sequences = [entry.sequence]
        if not request.is_forked and request.params.width > 1:
            self._scheduler.fork(request)
            sequences = request.sequences
        try:
            return [_due(progress, sequence, entry, rows) for sequence in sequences]
        except Exception as error:  # whatever a grammar may raise
            self._fail(progress, RequestFailure.of(error), turn)
            return []

    def _advance_sampled(self, due: list[_Due], logits: Tensor, turn: Turn) -> None:
        tokens = iter(sample(logits, [row for one in due for row in one.rows]))
        now = self._clock()
        for one in due:
            self._take(one, [next(tokens) for _ in one.rows], now, turn)

    def _take(self, due: _Due, tokens: list[SampledToken], now: float, turn: Turn) -> None:
        progress, sequence = due.progress, due.sequence
        # Another of its sequences has failed, or it was ended while this token was on its way.
        if progress.request.status is RequestStatus.FINISHED:
            return
        if not all(token.is_sound for token in tokens):
            self._fail(progress, _NO_NUMBERS, turn)
            return
        try:
            taken, text, is_finished = _accept(due, tokens)
        except Exception as error:  # whatever a tokenizer or a grammar may raise
            self._fail(progress, RequestFailure.of(error), turn)
            return
        progress.phases.got_token(now)
        if due.entry.proposal:
            self._accept_proposed(due, taken, turn)
        delta = progress.delta(sequence.index, taken, text)
        if delta is not None:
            turn.deltas.append(delta)
        if is_finished:
            self._finish_sequence(progress, sequence, turn)

    def _accept_proposed(self, due: _Due, taken: list[int], turn: Turn) -> None:
        proposal = due.entry.proposal
        num_accepted = len(taken) if taken == list(proposal[: len(taken)]) else len(taken) - 1
        self._scheduler.accept_proposed(due.entry, num_accepted)
        due.progress.phases.speculated(len(proposal), num_accepted)
        turn.num_proposed_tokens += len(proposal)
        turn.num_accepted_tokens += num_accepted

    def _advance_beams(self, progress: BeamProgress, logits: Tensor, turn: Turn) -> None:
        """`logits`: `[num_beams, vocab_size]`, of the request's live sequences in order."""
        request = progress.request
        num_top = max(progress.search.num_candidates, request.params.logprobs or 0)
        try:
            forbidden = [progress.forbidden(sequence) for sequence in request.sequences]
            tops = most_probable(logits, num_top, forbidden)
            if not all(math.isfinite(top[0][1]) for top in tops):
                self._fail(progress, _NO_NUMBERS, turn)
                return
            live = progress.advance(tops)
        except Exception as error:  # whatever a tokenizer may raise
            self._fail(progress, RequestFailure.of(error), turn)
            return
        progress.phases.got_token(self._clock())
        if not live:
            self._remove(progress, turn)
            return
        beams = []
        for index, candidate in enumerate(live):
            beam = self._scheduler.fork_sequence(request.sequences[candidate.parent], index)
            beam.token_ids.append(candidate.token_id)
            beam.cumulative_logprob = candidate.cumulative_logprob
            beam.logprobs.append(candidate.entry)
            beams.append(beam)
        self._scheduler.replace_sequences(request, beams)

    def _end_after_prompt(self, progress: SampledProgress, turn: Turn) -> None:
        """Of a request that generates nothing."""
        if not all(math.isfinite(entry.logprob) for entry in progress.prompt_logprobs):
            self._fail(progress, _NO_NUMBERS, turn)
            return
        turn.deltas += progress.accept_nothing()
        self._remove(progress, turn)

    def _fail(self, progress: RequestProgress, failure: RequestFailure, turn: Turn) -> None:
        """The request ends here, with those of its sequences that had finished."""
        progress.failure = failure
        self._remove(progress, turn)

    def _finish_sequence(self, progress: RequestProgress, sequence: Sequence, turn: Turn) -> None:
        self._scheduler.finish_sequence(progress.request, sequence)
        if not progress.request.sequences:
            turn.ended.append(progress)

    def _remove(self, progress: RequestProgress, turn: Turn) -> None:
        self._scheduler.remove(progress.request)
        turn.ended.append(progress)


def _accept(due: _Due, tokens: list[SampledToken]) -> tuple[list[int], str, bool]:
    """Keep tokens as long as what was proposed is what was chosen.

    Returns the tokens kept, the text they released, and whether they end the sequence.
    """
    taken: list[int] = []
    text, is_finished = "", False
    for token in tokens:
        advance = due.progress.accept(due.sequence, token.token_id, token.entry)
        taken.append(token.token_id)
        text += advance.text
        is_finished = advance.is_finished
        if is_finished or taken != list(due.entry.proposal[: len(taken)]):
            break
    return taken, text, is_finished


def _due(progress: SampledProgress, sequence: Sequence, entry: ScheduledSequence, rows: range) -> _Due:
    return _Due(
        progress,
        sequence,
        entry,
        [
            SamplerRow(
                row,
                sequence,
                progress.params,
                progress.request.seed,
                progress.forbidden(sequence, entry.proposal[:place]),
                progress.allowed(sequence),
                entry.proposal[:place],
            )
            for place, row in enumerate(rows)
        ],
    )
