from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine.block_manager import BlockManager
from engine.errors import InvariantError
from engine.sampling import SamplingParams
from engine.scheduler import ScheduledBatch, ScheduledSequence, Scheduler, max_blocks_of
from engine.sequence import Request, RequestStatus, Sequence
from tests.unit.engine.cache_model import CacheModel


@dataclass(frozen=True)
class Limits:
    num_blocks: int
    block_size: int
    max_num_sequences: int
    max_num_batched_tokens: int
    num_speculative_tokens: int = 0


@dataclass
class Bench:
    """A scheduler with a model of the cache under it, and tokens drawn at random in place of a model."""

    limits: Limits
    seed: int = 0
    num_token_kinds: int = 9
    requests: list[Request] = field(default_factory=list)
    joined: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.blocks = BlockManager(self.limits.num_blocks, self.limits.block_size)
        self.scheduler = Scheduler(
            self.blocks,
            max_num_sequences=self.limits.max_num_sequences,
            max_num_batched_tokens=self.limits.max_num_batched_tokens,
            num_speculative_tokens=self.limits.num_speculative_tokens,
        )
        self.cache = CacheModel(self.limits.block_size)
        self.random = random.Random(self.seed)
        self.num_accepted = 0

    def add(
        self, num_prompt: int, max_tokens: int, width: int, *, beam: bool = False, priority: int = 0
    ) -> bool:
        """False if the request could never run, which the engine refuses beforehand."""
        limits = self.limits
        if width > limits.max_num_sequences:
            return False
        if max_blocks_of(limits.block_size, num_prompt, width, max_tokens) > limits.num_blocks:
            return False
        number = len(self.requests)
        request = Request(
            request_id=str(number),
            params=SamplingParams(max_tokens=max_tokens, n=width, use_beam_search=beam),
            priority=priority,
            arrival_number=number,
            seed=0,
            sequences=[
                Sequence(
                    0, [self.random.randrange(self.num_token_kinds) for _ in range(num_prompt)], num_prompt
                )
            ],
        )
        self.requests.append(request)
        self.scheduler.add(request)
        return True

    def step(self) -> ScheduledBatch:
        waiting = self._in(RequestStatus.WAITING)
        batch = self.scheduler.schedule()
        self.check(batch)
        self.check_nobody_starves(batch, waiting)
        self.cache.run(batch)
        self.scheduler.commit(batch)
        self.joined += batch.joined
        due: dict[str, list[ScheduledSequence]] = {}
        for entry in batch.entries:
            if entry.samples:
                due.setdefault(entry.request.request_id, []).append(entry)
        for entries in due.values():
            self._advance(entries)
        self.scheduler.check_invariants()
        return batch

    def check(self, batch: ScheduledBatch) -> None:
        assert batch.num_tokens <= self.limits.max_num_batched_tokens
        assert len(batch.entries) <= self.limits.max_num_sequences
        assert len({id(entry.sequence) for entry in batch.entries}) == len(batch.entries)
        assert all(entry.request.status is RequestStatus.RUNNING for entry in batch.entries)
        lengths = [entry.num_tokens for entry in batch.entries]
        assert all(length >= 1 for length in lengths)
        for entry in batch.entries:
            assert not entry.proposal or (entry.is_decode and not entry.request.params.use_beam_search)
            assert len(entry.proposal) <= self.limits.num_speculative_tokens
            num_tokens = entry.sequence.num_output_tokens + len(entry.proposal)
            assert num_tokens < entry.request.params.max_tokens or not entry.proposal
        assert sorted(lengths, key=lambda length: length != 1) == lengths

    def check_nobody_starves(self, batch: ScheduledBatch, waiting: list[Request]) -> None:
        """`waiting`: before the step. What is first in a line moves; together that bounds every wait."""
        running = self._in(RequestStatus.RUNNING)
        served = [entry.request for entry in batch.entries]
        if running:
            assert min(running, key=order) in served, "the first of the running ones got no token"
        elif waiting:
            raise AssertionError("requests wait and none runs")
        assert all(request in served for request in running if request.is_decoding)
        left_behind = [request for request in waiting if request.status is RequestStatus.WAITING]
        for request in batch.joined:
            assert all(order(request) < order(other) for other in left_behind), "one was overtaken"
        for request in batch.preempted:
            assert all(order(other) < order(request) for other in running), "an older one had to go"

    def _in(self, status: RequestStatus) -> list[Request]:
        return [request for request in self.requests if request.status is status]

    def run_to_end(self) -> int:
        """Steps until nothing is left; fails if some step makes no progress."""
        num_steps = 0
        while self.scheduler.has_work():
            assert self.step().entries, "there is work and nothing was scheduled"
            num_steps += 1
        return num_steps

    def _advance(self, entries: list[ScheduledSequence]) -> None:
        """`entries`: of one request."""
        request = entries[0].request
        if request.params.use_beam_search:
            self._advance_beams(request)
        elif not request.is_forked and request.params.width > 1:
            self.scheduler.fork(request)
            for sequence in list(request.sequences):
                self._append(request, sequence, entries[0])
        else:
            for entry in entries:
                self._append(request, entry.sequence, entry)

    def _append(self, request: Request, sequence: Sequence, entry: ScheduledSequence) -> None:
        """One token, and one more for each proposed one that was right; the last may end the sequence."""
        proposal, num_accepted = entry.proposal, 0
        for place in range(len(proposal) + 1):
            sequence.token_ids.append(self.random.randrange(self.num_token_kinds))
            # Sequences of one request may stop at different lengths.
            is_over = sequence.num_output_tokens >= request.params.max_tokens or (
                sequence.index > 0 and self.random.random() < 0.05
            )
            is_right = place < len(proposal) and sequence.token_ids[-1] == proposal[place]
            num_accepted += is_right
            if is_over or not is_right:
                break
        if proposal:
            self.scheduler.accept_proposed(entry, num_accepted)
            self.num_accepted += num_accepted
        if is_over:
            self.scheduler.finish_sequence(request, sequence)

    def _advance_beams(self, request: Request) -> None:
        beams = []
        for index in range(request.params.width):
            parent = self.random.choice(request.sequences)
            beam = self.scheduler.fork_sequence(parent, index)
            beam.token_ids.append(self.random.randrange(self.num_token_kinds))
            beams.append(beam)
        self.scheduler.replace_sequences(request, beams)
        if beams[0].num_output_tokens >= request.params.max_tokens:
            self.scheduler.remove(request)


def order(request: Request) -> tuple[int, int]:
    """Smaller is served first: by priority, then by arrival."""
    return request.priority, request.arrival_number


@st.composite
def limits(draw: st.DrawFn) -> Limits:
    max_num_sequences = draw(st.integers(1, 8))
    return Limits(
        num_blocks=draw(st.integers(4, 40)),
        block_size=draw(st.sampled_from([1, 2, 4, 5])),
        max_num_sequences=max_num_sequences,
        max_num_batched_tokens=draw(st.integers(max_num_sequences, 40)),
        num_speculative_tokens=draw(st.sampled_from([0, 1, 3, 8])),
    )


class SchedulerMachine(RuleBasedStateMachine):
    """Adds, aborts and steps in any order; sequences finish and blocks run out by themselves on the way.

    After every rule no block is lost or owned twice, by the block manager's own count. After every step also
    the token budget and the seats are kept, each sequence finds in the cache what it put there, and nobody
    starves. In the end everything finishes and every block is free.
    """

    @initialize(
        limits=limits(),
        seed=st.integers(0, 1000),
        # With one kind all sequences of a request are equal, which is where sharing goes furthest.
        num_token_kinds=st.sampled_from([1, 2, 9]),
    )
    def begin(self, limits: Limits, seed: int, num_token_kinds: int) -> None:
        self.bench = Bench(limits, seed, num_token_kinds)

    @rule(
        num_prompt=st.integers(1, 30),
        max_tokens=st.integers(1, 20),
        width=st.sampled_from([1, 1, 1, 2, 4]),
        beam=st.booleans(),
        priority=st.integers(0, 1),
    )
    def add(self, num_prompt: int, max_tokens: int, width: int, beam: bool, priority: int) -> None:
        self.bench.add(num_prompt, max_tokens, width, beam=beam, priority=priority)

    @rule(number=st.integers(0, 20))
    def abort(self, number: int) -> None:
        alive = [one for one in self.bench.requests if one.status is not RequestStatus.FINISHED]
        if alive:
            self.bench.scheduler.remove(alive[number % len(alive)])

    @rule(num_steps=st.integers(1, 6))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.bench.step()

    @invariant()
    def accounts_agree(self) -> None:
        self.bench.scheduler.check_invariants()

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        self.bench.run_to_end()
        assert all(request.status is RequestStatus.FINISHED for request in self.bench.requests)
        assert self.bench.blocks.num_free == self.bench.limits.num_blocks


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


@settings(max_examples=100)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=2, max_size=12),
    num_blocks=st.integers(8, 30),
)
def test_scheduler_never_lets_a_request_overtake_in_the_waiting_line(
    sizes: list[tuple[int, int]], num_blocks: int
) -> None:
    bench = Bench(Limits(num_blocks, 4, 3, 16))
    for num_prompt, max_tokens in sizes:
        bench.add(num_prompt, max_tokens, 1)

    bench.run_to_end()

    first_admissions = list(dict.fromkeys(request.arrival_number for request in bench.joined))
    assert first_admissions == sorted(first_admissions)


def test_scheduler_decodes_every_running_sequence_in_each_step_while_a_long_prompt_is_chunked() -> None:
    bench = Bench(Limits(num_blocks=100, block_size=4, max_num_sequences=4, max_num_batched_tokens=8))
    for _ in range(3):
        bench.add(2, 30, 1)
    bench.step()
    bench.add(60, 4, 1)

    batches = [bench.step() for _ in range(8)]

    for batch in batches:
        assert [entry.num_tokens for entry in batch.entries[:3]] == [1, 1, 1]
        assert batch.num_tokens == 8


def test_scheduler_preempts_the_newest_request_when_blocks_run_out() -> None:
    bench = Bench(Limits(num_blocks=7, block_size=2, max_num_sequences=2, max_num_batched_tokens=8))
    bench.add(4, 8, 1)
    bench.add(2, 8, 1)

    preempted = []
    while bench.scheduler.has_work():
        preempted += [request.request_id for request in bench.step().preempted]

    assert preempted
    assert set(preempted) == {"1"}


def test_scheduler_guesses_what_followed_before_and_gives_back_the_blocks_of_wrong_guesses() -> None:
    limits = Limits(
        num_blocks=40, block_size=2, max_num_sequences=1, max_num_batched_tokens=32, num_speculative_tokens=5
    )
    bench = Bench(limits, num_token_kinds=2)
    bench.add(20, 60, 1)
    sequence = bench.requests[0].sequences[0]

    proposals = []
    while bench.scheduler.has_work():
        proposals += [len(entry.proposal) for entry in bench.step().entries]
        if sequence.block_table:
            assert len(sequence.block_table) == bench.blocks.num_blocks_for(sequence.num_computed_tokens)

    assert max(proposals) == 5
    assert 0 < bench.num_accepted < sum(proposals)


def test_scheduler_guesses_only_what_the_token_budget_leaves() -> None:
    limits = Limits(
        num_blocks=9, block_size=99, max_num_sequences=2, max_num_batched_tokens=6, num_speculative_tokens=8
    )
    bench = Bench(limits, num_token_kinds=1)
    bench.add(6, 60, 1)
    bench.step()
    bench.add(16, 4, 1)

    batches = [bench.step() for _ in range(4)]

    assert [[len(entry.proposal) for entry in batch.entries] for batch in batches[:3]] == [[0, 0]] * 3
    assert [entry.num_tokens for entry in batches[0].entries] == [1, 5]
    assert sum(len(entry.proposal) for entry in batches[3].entries) == 4


def test_scheduler_serves_the_smaller_priority_first() -> None:
    bench = Bench(Limits(num_blocks=50, block_size=4, max_num_sequences=1, max_num_batched_tokens=8))
    bench.add(4, 2, 1, priority=1)
    bench.add(4, 2, 1, priority=0)

    bench.run_to_end()

    assert [request.request_id for request in bench.joined] == ["1", "0"]


def test_scheduler_computes_the_prompt_once_when_a_request_has_four_sequences() -> None:
    bench = Bench(Limits(num_blocks=60, block_size=4, max_num_sequences=4, max_num_batched_tokens=64))
    bench.add(18, 6, 4)

    first = bench.step()
    used_after_prefill = bench.blocks.num_used
    second = bench.step()

    assert [entry.num_tokens for entry in first.entries] == [18]
    assert used_after_prefill == 5
    assert len(second.entries) == 4
    # Four full blocks are shared; of the partly filled fifth each sequence but the last one takes a copy.
    assert len(second.copies) == 3
    assert bench.blocks.num_used == 4 + 4


def test_scheduler_shares_the_prompt_again_when_a_preempted_request_resumes() -> None:
    bench = Bench(Limits(num_blocks=40, block_size=4, max_num_sequences=4, max_num_batched_tokens=64))
    bench.add(16, 8, 4)
    for _ in range(3):
        bench.step()
    request = bench.requests[0]
    bench.scheduler._preempt(request, ScheduledBatch())

    bench.step()

    assert request.status is RequestStatus.RUNNING
    assert bench.blocks.num_used == 4 + 4
    bench.run_to_end()


def test_scheduler_resumes_sequences_that_are_equal_and_end_with_their_block() -> None:
    limits = Limits(num_blocks=40, block_size=4, max_num_sequences=3, max_num_batched_tokens=64)
    bench = Bench(limits, num_token_kinds=1)
    bench.add(6, 8, 3, beam=True)
    bench.step()
    bench.step()
    request = bench.requests[0]
    assert [len(sequence.token_ids) for sequence in request.sequences] == [8, 8, 8]
    bench.scheduler._preempt(request, ScheduledBatch())

    bench.run_to_end()

    assert request.status is RequestStatus.FINISHED


def test_block_manager_reports_a_block_that_no_table_holds() -> None:
    blocks = BlockManager(4, 2)
    table: list[int] = []
    blocks.extend(table, 4)

    blocks.check_invariants([table])
    with pytest.raises(InvariantError, match="references"):
        blocks.check_invariants([])


def test_block_manager_copies_only_blocks_that_others_hold_too() -> None:
    blocks = BlockManager(8, 4)
    parent: list[int] = []
    blocks.extend(parent, 6)
    child = blocks.fork(parent)

    copy = blocks.make_writable(child, 6)
    again = blocks.make_writable(child, 6)
    parents = blocks.make_writable(parent, 6)

    assert copy is not None
    assert (copy.source, copy.target) == (parent[1], child[1])
    assert again is None
    assert parents is None
    assert parent[0] == child[0]
    blocks.check_invariants([parent, child])
