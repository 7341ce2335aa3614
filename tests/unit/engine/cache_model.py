"""A cache that stores, for each slot, which prefix was computed into it, so that schedules can be judged."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.scheduler import ScheduledBatch, ScheduledSequence
from engine.sequence import Sequence


@dataclass
class CacheModel:
    """Runs scheduled batches as a model would: copies, then all writes, then each sequence reads its past.

    A key depends on all tokens up to its own, so the slot of token t holds the tokens 0..t.
    """

    block_size: int
    slots: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def run(self, batch: ScheduledBatch) -> None:
        self._copy(batch)
        for entry in batch.entries:
            for position in range(entry.start, entry.start + entry.num_tokens):
                slot = self._slot(entry.sequence, position)
                self.slots[slot] = _beginning(entry, position)
        for entry in batch.entries:
            self._read(entry)

    def _copy(self, batch: ScheduledBatch) -> None:
        size = self.block_size
        moved = {
            copy.target * size + offset: self.slots.get(copy.source * size + offset, ())
            for copy in batch.copies
            for offset in range(size)
        }
        self.slots.update(moved)

    def _read(self, entry: ScheduledSequence) -> None:
        for position in range(entry.start + entry.num_tokens):
            found = self.slots.get(self._slot(entry.sequence, position))
            assert found == _beginning(entry, position), (
                f"position {position} of a sequence of {len(entry.sequence.token_ids)} tokens was overwritten"
            )

    def _slot(self, sequence: Sequence, position: int) -> int:
        return (
            sequence.block_table[position // self.block_size] * self.block_size + position % self.block_size
        )


def _beginning(entry: ScheduledSequence, position: int) -> tuple[int, ...]:
    """The tokens up to this one, proposed ones included."""
    return (*entry.sequence.token_ids, *entry.proposal)[: position + 1]
