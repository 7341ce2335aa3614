"""Who owns which block of the KV cache. Counts only: the tensors are in `kv_cache.py`.

    state of a block     reference count     where it is
    free                 0                   in the free list, once
    kept                 0                   in the prefix cache; taken, longest unused first, if none is free
    owned                1                   in one sequence's block table
    shared               2 or more           in as many block tables; read only

A block table is the list of a sequence's blocks in token order: token t lies in block `table[t // size]`.
Before a sequence writes into a shared block it gets its own copy (copy-on-write); full blocks are never
written again, so only a last, partly filled block is ever copied.

A table is released from its end, so of a kept beginning the last block is the first to go: no block is kept
without the one before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine.errors import InvariantError
from engine.prefix_cache import NOTHING_CACHED, ROOT, CachedPrefix, PrefixCache


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Contents to be copied in the cache before the step's tokens are written."""

    source: int
    target: int


class BlockManager:
    """Hands out blocks and takes them back; not for use by several threads."""

    def __init__(self, num_blocks: int, block_size: int, *, keeps_prefixes: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        # Last in, first out: a block just freed is the one most likely still in a processor cache.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._kept: dict[int, None] = {}
        """In the order of their release."""
        self._reference_counts = [0] * num_blocks
        self._prefixes = PrefixCache(block_size) if keeps_prefixes else None

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out: the free and the kept ones."""
        return len(self._free) + len(self._kept)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def extend(self, table: list[int], num_tokens: int) -> None:
        """Grow `table` until it covers `num_tokens`; the caller has checked `num_free`."""
        for _ in range(self.num_blocks_for(num_tokens) - len(table)):
            table.append(self._take())

    def fork(self, table: list[int], num_blocks: int | None = None) -> list[int]:
        """A second table over the same (first `num_blocks`) blocks."""
        shared = table[:num_blocks]
        for block in shared:
            self._reference_counts[block] += 1
        return shared

    def find(self, token_ids: Sequence[int], max_blocks: int) -> CachedPrefix:
        """The longest beginning of the tokens that is still there, at most `max_blocks` of it."""
        return NOTHING_CACHED if self._prefixes is None else self._prefixes.find(token_ids, max_blocks)

    def num_unused(self, prefix: CachedPrefix) -> int:
        """How many of its blocks nobody holds, so that to adopt it lowers `num_free` by so many."""
        return sum(1 for block in prefix.blocks if self._reference_counts[block] == 0)

    def adopt(self, prefix: CachedPrefix) -> list[int]:
        """A table over the prefix's blocks, found just now."""
        for block in prefix.blocks:
            self._kept.pop(block, None)
            self._reference_counts[block] += 1
        return list(prefix.blocks)

    def publish(self, parent: int, token_ids: Sequence[int], block: int) -> int:
        """A full block is computed and can be found from now on; its entry (see `PrefixCache.add`)."""
        return ROOT if self._prefixes is None else self._prefixes.add(parent, token_ids, block)

    def can_write(self, table: list[int], position: int) -> bool:
        """Whether `make_writable` would find the block it may need."""
        return self.num_free > 0 or not self._needs_block(table, position)

    def make_writable(self, table: list[int], position: int) -> BlockCopy | None:
        """Give token `position`, next after those covered or in the last block, a block of its own.

        Returns the copy to make first, if the block was shared.
        """
        slot = position // self.block_size
        if slot == len(table):
            table.append(self._take())
            return None
        block = table[slot]
        if self._reference_counts[block] == 1:
            return None
        table[slot] = self._take()
        self._reference_counts[block] -= 1
        return BlockCopy(source=block, target=table[slot])

    def shorten(self, table: list[int], num_tokens: int) -> None:
        """Give back the blocks behind those of the first `num_tokens`."""
        num_kept = self.num_blocks_for(num_tokens)
        surplus = table[num_kept:]
        del table[num_kept:]
        self.release(surplus)

    def release(self, table: list[int]) -> None:
        """Drop one reference to each block of `table` and empty it."""
        for block in reversed(table):
            self._reference_counts[block] -= 1
            if self._reference_counts[block] > 0:
                continue
            if self._prefixes is not None and block in self._prefixes:
                self._kept[block] = None
            else:
                self._free.append(block)
        table.clear()

    def check_invariants(self, tables: Iterable[list[int]]) -> None:
        """Compare the counts with all block tables there are.

        Raises:
            InvariantError: a block is lost, owned twice or miscounted.
        """
        counted = Counter(block for table in tables for block in table)
        for block, count in enumerate(self._reference_counts):
            if counted[block] != count:
                raise InvariantError(f"block {block}: {count} references counted, {counted[block]} found")
        unused = [*self._free, *self._kept]
        if len(set(unused)) != len(unused):
            raise InvariantError("a block is twice among the free and the kept ones")
        if set(unused) != {block for block, count in enumerate(self._reference_counts) if count == 0}:
            raise InvariantError("free and kept blocks are not exactly those without references")
        if self._prefixes is not None:
            self._prefixes.check_invariants()
            if any(block not in self._prefixes for block in self._kept):
                raise InvariantError("a block is kept that the prefix cache does not know")

    def _needs_block(self, table: list[int], position: int) -> bool:
        slot = position // self.block_size
        return slot == len(table) or self._reference_counts[table[slot]] > 1

    def _take(self) -> int:
        block = self._free.pop() if self._free else self._evict()
        self._reference_counts[block] = 1
        return block

    def _evict(self) -> int:
        block = next(iter(self._kept))
        del self._kept[block]
        assert self._prefixes is not None, "only a prefix cache keeps blocks"
        self._prefixes.drop(block)
        return block
