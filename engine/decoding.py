"""Gives each sequence that is due its next tokens, by the logits of the step that has just run.

    one row of logits       one token
    a proposal of k tokens     k + 1 rows and, while the proposal holds, as many tokens
    beams                   all rows of a request together

What a sequence has taken is its progress's affair, whose blocks are free thereby the scheduler's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from torch import Tensor

from engine.beam_progress import BeamProgress
from engine.outputs import TokenDelta
from engine.progress import RequestProgress
from engine.sampled_progress import SampledProgress
from engine.sampler import SampledToken, SamplerRow, most_probable, sample
from engine.scheduler import ScheduledSequence, Scheduler
from engine.sequence import Sequence


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
                    turn.deltas += own.accept_nothing()
                    self._remove(own, turn)
                case SampledProgress() as own:
                    sampled += self._sequences_due(own, entry, rows)
        for request_id, rows_of_beams in beams.items():
            searching = progress[request_id]
            assert isinstance(searching, BeamProgress)
            self._advance_beams(searching, logits[rows_of_beams], turn)
        self._advance_sampled(sampled, logits, turn)
        return turn

    def _sequences_due(self, progress: SampledProgress, entry: ScheduledSequence, rows: range) -> list[_Due]:
        """The entry's sequence, or once its prompt is computed all that it is forked into."""
        request = progress.request
        if request.is_forked or request.params.width == 1:
            return [_due(progress, entry.sequence, entry, rows)]
        self._scheduler.fork(request)
        return [_due(progress, sequence, entry, rows) for sequence in request.sequences]

    def _advance_sampled(self, due: list[_Due], logits: Tensor, turn: Turn) -> None:
        tokens = iter(sample(logits, [row for one in due for row in one.rows]))
        now = self._clock()
        for one in due:
            self._take(one, [next(tokens) for _ in one.rows], now, turn)

    def _take(self, due: _Due, tokens: list[SampledToken], now: float, turn: Turn) -> None:
        """Keep tokens as long as what was proposed is what was chosen."""
        progress, sequence, proposal = due.progress, due.sequence, due.entry.proposal
        taken: list[int] = []
        text, is_finished = "", False
        for token in tokens:
            advance = progress.accept(sequence, token.token_id, token.entry)
            taken.append(token.token_id)
            text += advance.text
            is_finished = advance.is_finished
            if is_finished or taken != list(proposal[: len(taken)]):
                break
        progress.phases.got_token(now)
        if proposal:
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
        forbidden = [progress.forbidden(sequence) for sequence in request.sequences]
        live = progress.advance(most_probable(logits, num_top, forbidden))
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

    def _finish_sequence(self, progress: RequestProgress, sequence: Sequence, turn: Turn) -> None:
        self._scheduler.finish_sequence(progress.request, sequence)
        if not progress.request.sequences:
            turn.ended.append(progress)

    def _remove(self, progress: RequestProgress, turn: Turn) -> None:
        self._scheduler.remove(progress.request)
        turn.ended.append(progress)


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
