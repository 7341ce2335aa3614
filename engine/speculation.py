"""Prompt lookup: what followed a sequence's last tokens where they stood before is proposed to follow again.

Proposed tokens are run in the step that runs the last token. Each position is then given a token as if the
proposed ones before it were right: by the logits and the random number that it would have had anyway.
Tokens are kept up to the first that differs from the proposed one, so what comes out is what would have come
out without, greedy or sampled. A proposed token is accepted with the probability that the model gives it,
which is what rejection sampling would do, and the seed still decides every token.

No draft model (Saxena 2023, "Prompt Lookup Decoding", github.com/apoorvumang/prompt-lookup-decoding).
"""

from __future__ import annotations

from collections.abc import Sequence

# Longer runs are looked for first: what followed them is more likely to follow again.
_RUN_LENGTHS = (4, 2)
_MAX_PAUSE = 16


class PromptLookup:
    """Proposals for one sequence.

    Right proposals lengthen the next one up to the limit. After one that is wrong from its first token none
    is made for a while, each time twice as long, so that text without repetitions costs next to nothing.
    """

    __slots__ = ("_followers", "_length", "_max_tokens", "_num_indexed", "_pause", "_rest")

    def __init__(self, max_tokens: int) -> None:
        """`max_tokens`: of one proposal."""
        self._max_tokens = max_tokens
        self._length = max_tokens
        self._pause = 0
        self._rest = 0
        self._followers: dict[tuple[int, ...], int] = {}
        """Of each run of tokens, where the token after its latest occurrence stands."""
        self._num_indexed = 0

    def propose(self, token_ids: Sequence[int], max_tokens: int) -> tuple[int, ...]:
        """What may follow `token_ids`, which only grow from call to call; empty where nothing is known."""
        if self._rest > 0:
            self._rest -= 1
            return ()
        self._index(token_ids)
        length = min(self._length, max_tokens)
        for size in _RUN_LENGTHS:
            follower = self._followers.get(tuple(token_ids[-size:]))
            if follower is not None:
                return _copy_on(token_ids, follower, length)
        return ()

    def learn(self, num_proposed: int, num_accepted: int) -> None:
        """How the proposal before went."""
        if num_accepted == 0:
            self._pause = min(_MAX_PAUSE, 2 * self._pause + 1)
            self._rest = self._pause
        else:
            self._pause = 0
        grown = 2 * num_proposed if num_accepted == num_proposed else num_accepted
        self._length = max(1, min(self._max_tokens, grown))

    def _index(self, token_ids: Sequence[int]) -> None:
        """Take in the tokens that came since, but the last: nothing follows it yet."""
        for end in range(self._num_indexed, len(token_ids)):
            for size in _RUN_LENGTHS:
                if size <= end:
                    self._followers[tuple(token_ids[end - size : end])] = end
        self._num_indexed = len(token_ids)


def _copy_on(token_ids: Sequence[int], start: int, length: int) -> tuple[int, ...]:
    """`length` tokens from `start` on; past the end what was copied is copied again."""
    period = len(token_ids) - start
    copied = token_ids[start : start + length]
    repeats = -(-length // period)
    return tuple(list(copied) * repeats)[:length] if len(copied) < length else tuple(copied)
