"""Decides what each step runs. Pure policy: no torch, no clock, no effects but its own lists.

A step is filled in this order, so that nothing that already produces tokens is held up by a prompt:

    1. decode     every request that decodes, oldest first; blocks run out: the newest request is preempted
    2. prefill    admitted prompts that are not through yet, oldest first, while the token budget lasts
    3. admit      waiting requests in order, while budget, seats and blocks last; not after a preemption
    4. speculate  tokens proposed for those that decode, in what budget and free blocks are left

The blocks of all known tokens are taken at admission, so only decoding can run out of them. The waiting line
is never overtaken, and a preempted request keeps its place, so none starves within a priority.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import takewhile

from engine.block_manager import BlockCopy, BlockManager
from engine.errors import InvariantError
from engine.prefix_cache import NOTHING_CACHED, ROOT, CachedPrefix
from engine.sequence import Request, RequestStatus, Sequence
from engine.speculation import PromptLookup


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """Tokens `start : start + num_tokens` of one sequence, to be run in this step.

    Attributes:
        num_tokens: To run, the proposed ones included.
        samples: They are the last it has, so their logits choose the next one.
        proposal: Tokens that may follow those it has; logits are wanted of its last own token and of these.
    """

    request: Request
    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    proposal: tuple[int, ...] = ()

    @classmethod
    def next_of(cls, request: Request, sequence: Sequence, num_tokens: int) -> ScheduledSequence:
        start = sequence.num_computed_tokens
        return cls(request, sequence, start, num_tokens, start + num_tokens == len(sequence.token_ids))

    @property
    def is_decode(self) -> bool:
        """Whether it runs the token generated last, and not a prompt or tokens lost in a preemption."""
        num_own = self.num_tokens - len(self.proposal)
        return num_own == 1 and self.samples and self.start >= self.sequence.num_prompt_tokens

    @property
    def token_ids(self) -> list[int]:
        """The tokens to run."""
        return [*self.sequence.token_ids[self.start : self.start + self.num_tokens], *self.proposal]

    def with_proposal(self, proposal: tuple[int, ...]) -> ScheduledSequence:
        return replace(self, num_tokens=self.num_tokens + len(proposal), proposal=proposal)


@dataclass(slots=True)
class ScheduledBatch:
    """What one step runs.

    Attributes:
        entries: Those with one token first.
        copies: Blocks to copy before anything is written.
        joined: Requests admitted in this step.
        preempted: Requests whose blocks were taken; none of them has an entry.
    """

    entries: list[ScheduledSequence] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)
    joined: list[Request] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(entry.num_tokens for entry in self.entries)

    def put_single_tokens_first(self) -> None:
        self.entries.sort(key=lambda entry: entry.num_tokens != 1)


class Scheduler:
    """The waiting line and the running set, both kept in order of priority, then arrival."""

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_sequences: int,
        max_num_batched_tokens: int,
        num_speculative_tokens: int = 0,
    ) -> None:
        """`num_speculative_tokens`: proposed for one sequence in one step, at most; 0 is none."""
        self._blocks = blocks
        self._num_speculative_tokens = num_speculative_tokens
        self._max_num_sequences = max_num_sequences
        self._max_num_batched_tokens = max_num_batched_tokens
        self._waiting: list[Request] = []
        self._running: list[Request] = []

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, request: Request) -> None:
        """Append to the waiting line; `max_blocks_of` it must not exceed the cache."""
        insort(self._waiting, request, key=_order)

    def schedule(self) -> ScheduledBatch:
        """Choose the next step's work and reserve its blocks; `commit` follows once it has run."""
        batch = ScheduledBatch()
        self._schedule_decodes(batch)
        budget = self._max_num_batched_tokens - len(batch.entries)
        decoding = {id(entry.request) for entry in batch.entries}
        for request in self._running:
            if id(request) not in decoding and not request.awaits_its_end:
                budget -= self._schedule_prefill(request, batch, budget)
        if not batch.preempted:
            self._admit(batch, budget)
        if self._num_speculative_tokens:
            self._speculate(batch)
        batch.put_single_tokens_first()
        return batch

    def commit(self, batch: ScheduledBatch) -> None:
        """Record that the step has run, or will before any other: its keys and values are in the cache.

        Of requests that have ended since it was scheduled nothing is left to record.
        """
        for entry in batch.entries:
            if entry.request.status is RequestStatus.FINISHED:
                continue
            entry.sequence.num_computed_tokens = entry.start + entry.num_tokens - len(entry.proposal)
            self._publish(entry.sequence)

    def accept_proposed(self, entry: ScheduledSequence, num_accepted: int) -> None:
        """The first `num_accepted` proposed tokens are the sequence's own; the others' blocks are free."""
        sequence = entry.sequence
        sequence.num_computed_tokens += num_accepted
        self._blocks.shorten(sequence.block_table, sequence.num_computed_tokens)
        self._publish(sequence)
        if sequence.lookup is not None:
            sequence.lookup.learn(len(entry.proposal), num_accepted)

    def fork(self, request: Request) -> None:
        """Once the prompt is computed: one sequence becomes `params.width`, sharing all blocks."""
        root = request.sequences[0]
        request.sequences += [self.fork_sequence(root, index) for index in range(1, request.params.width)]
        request.is_forked = True

    def fork_sequence(self, parent: Sequence, index: int) -> Sequence:
        return Sequence(
            index=index,
            token_ids=list(parent.token_ids),
            num_prompt_tokens=parent.num_prompt_tokens,
            num_computed_tokens=parent.num_computed_tokens,
            block_table=self._blocks.fork(parent.block_table),
            num_published_blocks=parent.num_published_blocks,
            prefix_entry=parent.prefix_entry,
            cumulative_logprob=parent.cumulative_logprob,
            logprobs=list(parent.logprobs),
        )

    def replace_sequences(self, request: Request, sequences: list[Sequence]) -> None:
        """Continue with forks of the old sequences (see `fork_sequence`), and drop the old ones."""
        for sequence in request.sequences:
            self._blocks.release(sequence.block_table)
        request.sequences = sequences
        request.is_forked = True

    def finish_sequence(self, request: Request, sequence: Sequence) -> None:
        """Free the sequence's blocks; with the last sequence the request leaves."""
        self._blocks.release(sequence.block_table)
        request.sequences.remove(sequence)
        if not request.sequences:
            self.remove(request)

    def remove(self, request: Request) -> None:
        """Take the request out, wherever it is; its blocks are free at once."""
        line = self._running if request.status is RequestStatus.RUNNING else self._waiting
        line.remove(request)
        self._release(request)
        request.status = RequestStatus.FINISHED

    def check_invariants(self) -> None:
        """Raises InvariantError if blocks, seats or the cached lengths do not add up."""
        self._blocks.check_invariants(sequence.block_table for sequence in self._sequences())
        if self._num_seats_taken() > self._max_num_sequences:
            raise InvariantError(f"{self._num_seats_taken()} seats taken of {self._max_num_sequences}")
        for request in self._waiting:
            if any(sequence.block_table for sequence in request.sequences):
                raise InvariantError("a waiting request holds blocks")
        for sequence in self._sequences():
            if self._blocks.num_blocks_for(sequence.num_computed_tokens) > len(sequence.block_table):
                raise InvariantError("a sequence counts tokens as cached that it has no blocks for")

    def _schedule_decodes(self, batch: ScheduledBatch) -> None:
        for request in list(self._running):
            # An older request may have preempted this one meanwhile.
            if request.status is not RequestStatus.RUNNING or not request.is_decoding:
                continue
            if request.awaits_its_end:
                continue
            if self._reserve_decode(request, batch):
                batch.entries += [
                    ScheduledSequence.next_of(request, sequence, 1) for sequence in request.sequences
                ]

    def _reserve_decode(self, request: Request, batch: ScheduledBatch) -> bool:
        """Make each sequence's next slot writable; False if the request itself had to be preempted."""
        copies: list[BlockCopy] = []
        for sequence in request.sequences:
            while not self._blocks.can_write(sequence.block_table, sequence.num_computed_tokens):
                victim = self._running[-1]
                self._preempt(victim, batch)
                if victim is request:
                    return False
            copy = self._blocks.make_writable(sequence.block_table, sequence.num_computed_tokens)
            if copy is not None:
                copies.append(copy)
        batch.copies += copies
        return True

    def _schedule_prefill(self, request: Request, batch: ScheduledBatch, budget: int) -> int:
        """Add chunks of the request's uncomputed tokens; returns how many tokens that took.

        Several sequences are filled up to their last token only: they then decode it together, in one step.
        The first one leads: while its part of the shared blocks is not computed it takes all of the budget.
        A follower may run in the very step that completes it, for a layer writes all keys, then reads them.
        """
        taken = 0
        keep = 1 if len(request.sequences) > 1 else 0
        for sequence in request.sequences:
            num_tokens = min(sequence.num_uncomputed_tokens - keep, budget - taken)
            if num_tokens > 0:
                batch.entries.append(ScheduledSequence.next_of(request, sequence, num_tokens))
                taken += num_tokens
        return taken

    def _admit(self, batch: ScheduledBatch, budget: int) -> None:
        num_seats = self._num_seats_taken() if self._waiting else 0
        while self._waiting and budget > 0:
            request = self._waiting[0]
            # A free block for each running sequence, or the newcomer would soon be preempted for one of them.
            num_free = self._blocks.num_free - num_seats
            num_seats += request.num_seats
            if num_seats > self._max_num_sequences or not self._place(request, num_free):
                return
            del self._waiting[0]
            insort(self._running, request, key=_order)
            request.status = RequestStatus.RUNNING
            batch.joined.append(request)
            budget -= self._schedule_prefill(request, batch, budget)

    def _place(self, request: Request, num_free: int) -> bool:
        """Take the blocks of all known tokens, or none if that would be more than `num_free`.

        The first sequence begins with what the prefix cache still has of it. After a preemption the others
        share what they have in common with the first one, as they did before; else a request that once fitted
        might never fit again.
        """
        leader, *followers = request.sequences
        prefix = self._find_prefix(request)
        num_common = [self._num_common_blocks(leader, follower) for follower in followers]
        num_found_elsewhere = len(prefix.blocks) - self._blocks.num_unused(prefix)
        num_needed = self._blocks.num_blocks_for(len(leader.token_ids)) - num_found_elsewhere
        num_needed += sum(
            self._blocks.num_blocks_for(len(follower.token_ids)) - common
            for follower, common in zip(followers, num_common, strict=True)
        )
        if num_needed > num_free:
            return False
        self._begin_with(prefix, request)
        self._blocks.extend(leader.block_table, len(leader.token_ids))
        for follower, common in zip(followers, num_common, strict=True):
            follower.block_table = self._blocks.fork(leader.block_table, common)
            follower.num_computed_tokens = common * self._blocks.block_size
            self._blocks.extend(follower.block_table, len(follower.token_ids))
        return True

    def _find_prefix(self, request: Request) -> CachedPrefix:
        """Not of all tokens: one is left to run, and with several sequences one before their last."""
        if request.params.needs_prompt_logprobs:  # which only a forward pass over the whole prompt gives
            return NOTHING_CACHED
        token_ids = request.sequences[0].token_ids
        num_left = 1 if len(request.sequences) == 1 else 2
        return self._blocks.find(token_ids, (len(token_ids) - num_left) // self._blocks.block_size)

    def _begin_with(self, prefix: CachedPrefix, request: Request) -> None:
        leader = request.sequences[0]
        leader.block_table = self._blocks.adopt(prefix)
        leader.num_published_blocks = len(prefix.blocks)
        leader.prefix_entry = prefix.entry
        leader.num_computed_tokens = len(prefix.blocks) * self._blocks.block_size
        if request.num_cached_tokens is None:
            request.num_cached_tokens = leader.num_computed_tokens

    def _publish(self, sequence: Sequence) -> None:
        """Let other requests find the blocks that this step has filled."""
        size = self._blocks.block_size
        for slot in range(sequence.num_published_blocks, sequence.num_computed_tokens // size):
            tokens = sequence.token_ids[slot * size : (slot + 1) * size]
            block = sequence.block_table[slot]
            sequence.prefix_entry = self._blocks.publish(sequence.prefix_entry, tokens, block)
            sequence.num_published_blocks += 1

    def _speculate(self, batch: ScheduledBatch) -> None:
        """Let decoding sequences run proposed tokens too; nobody is preempted or kept waiting for them."""
        budget = self._max_num_batched_tokens - batch.num_tokens
        for index, entry in enumerate(batch.entries):
            if budget > 0 and entry.is_decode and entry.request.params.can_speculate:
                proposal = self._propose(entry, budget)
                if proposal:
                    self._blocks.extend(entry.sequence.block_table, entry.start + 1 + len(proposal))
                    batch.entries[index] = entry.with_proposal(proposal)
                    budget -= len(proposal)

    def _propose(self, entry: ScheduledSequence, budget: int) -> tuple[int, ...]:
        """At most what the budget, the free blocks and the request's `max_tokens` leave room for."""
        sequence = entry.sequence
        # The token chosen after the last proposed one counts too.
        num_wanted = entry.request.params.max_tokens - sequence.num_output_tokens - 1
        num_blocks = len(sequence.block_table) + self._blocks.num_free
        num_slots = num_blocks * self._blocks.block_size - len(sequence.token_ids)
        limit = min(budget, num_wanted, num_slots)
        if limit < 1:
            return ()
        if sequence.lookup is None:
            sequence.lookup = PromptLookup(self._num_speculative_tokens)
        return sequence.lookup.propose(sequence.token_ids, limit)

    def _num_common_blocks(self, leader: Sequence, follower: Sequence) -> int:
        """Full blocks of equal tokens; the last token stays out, for each sequence decodes its own."""
        pairs = zip(leader.token_ids[:-1], follower.token_ids[:-1], strict=False)
        num_common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return num_common // self._blocks.block_size

    def _preempt(self, request: Request, batch: ScheduledBatch) -> None:
        self._running.remove(request)
        self._release(request)
        request.status = RequestStatus.WAITING
        insort(self._waiting, request, key=_order)
        batch.preempted.append(request)

    def _release(self, request: Request) -> None:
        for sequence in request.sequences:
            self._blocks.release(sequence.block_table)
            sequence.num_computed_tokens = 0
            sequence.num_published_blocks = 0
            sequence.prefix_entry = ROOT

    def _num_seats_taken(self) -> int:
        return sum(request.num_seats for request in self._running)

    def _sequences(self) -> Iterator[Sequence]:
        for request in (*self._waiting, *self._running):
            yield from request.sequences


def max_blocks_of(block_size: int, num_prompt_tokens: int, width: int, max_tokens: int) -> int:
    """Blocks a request can come to hold: its full prompt blocks once, the rest for each of `width` sequences.

    A request of at most as many blocks as the cache has can always run to its end, if need be alone.
    """
    num_shared = num_prompt_tokens // block_size if width > 1 else 0
    # The last token generated is never run, so it needs no slot.
    num_own_tokens = num_prompt_tokens - num_shared * block_size + max(0, max_tokens - 1)
    per_sequence = -(-num_own_tokens // block_size)
    return num_shared + width * per_sequence


def _order(request: Request) -> tuple[int, int]:
    return request.order
