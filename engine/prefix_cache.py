"""Which full blocks hold which tokens, so that a beginning seen before is not computed again.

    ROOT ─ tokens 0..3 ─ entry 1, block 4 ─ tokens 4..7 ─ entry 2, block 11
                                          └ tokens 4..7 ─ entry 3, block 2

Keys and values of a token depend on all tokens before it, so a block is found by the tokens it holds and by
the entry of the block before. Tokens are compared themselves, not by a digest: no two prompts are ever taken
for each other. Numbers only: who owns a block, and when it is given away, is the block manager's affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from engine.errors import InvariantError

ROOT = 0
"""The entry before a sequence's first block."""

_Key = tuple[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """The longest known beginning of some tokens.

    Attributes:
        blocks: In token order, all full.
        entry: Of the last of them; ROOT if there are none.
    """

    blocks: tuple[int, ...]
    entry: int


NOTHING_CACHED = CachedPrefix((), ROOT)


class PrefixCache:
    """A tree of blocks by their tokens.

    An entry's number is never used again, so what stood after a dropped one is found no more.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._entries: dict[_Key, tuple[int, int]] = {}
        """Entry number and block."""
        self._keys: dict[int, _Key] = {}
        """By block."""
        self._numbers = count(ROOT + 1)

    def __contains__(self, block: int) -> bool:
        return block in self._keys

    def find(self, token_ids: Sequence[int], max_blocks: int) -> CachedPrefix:
        blocks: list[int] = []
        entry, size = ROOT, self._block_size
        for start in range(0, max_blocks * size, size):
            found = self._entries.get((entry, tuple(token_ids[start : start + size])))
            if found is None:
                break
            entry, block = found
            blocks.append(block)
        return CachedPrefix(tuple(blocks), entry)

    def add(self, parent: int, token_ids: Sequence[int], block: int) -> int:
        """`block` holds these tokens after those of `parent`; the entry that stands for them from now on.

        Where another block already does, that one stays, and `block` is not kept beyond its owners.
        """
        key = (parent, tuple(token_ids))
        known = self._entries.get(key)
        if known is not None:
            return known[0]
        if block in self._keys:  # after an entry that was dropped meanwhile
            self.drop(block)
        number = next(self._numbers)
        self._entries[key] = (number, block)
        self._keys[block] = key
        return number

    def drop(self, block: int) -> None:
        """Forget a block whose contents are about to be overwritten."""
        del self._entries[self._keys.pop(block)]

    def check_invariants(self) -> None:
        """Raises InvariantError unless blocks and entries lead to each other."""
        for block, key in self._keys.items():
            if self._entries[key][1] != block:
                raise InvariantError(f"block {block}: the prefix cache leads to another one")
        if len(self._entries) != len(self._keys):
            raise InvariantError("the prefix cache holds an entry that no block has")
