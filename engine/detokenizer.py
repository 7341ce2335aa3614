"""Token ids to text, as they come, without ever showing half a character."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_REPLACEMENT = "\ufffd"
# A character is at most four byte tokens. If text still ends in a replacement after this many more tokens,
# the bytes are not going to become valid and the replacement is the text.
_MAX_UNSETTLED_TOKENS = 8
# Past this many tokens the settled ones are dropped from the window that is decoded for each token.
_MAX_WINDOW_TOKENS = 8
_NUM_CONTEXT_TOKENS = 6
# A window that begins within a character reaches its first byte after so many more.
_NUM_BYTES_BEFORE = 3


class Decoder(Protocol):
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class IncrementalDetokenizer:
    """Decodes a short window of the latest tokens at each push, whatever the length of the text.

    The window starts with tokens whose text is out already, for a token's text can depend on the one before
    it (leading spaces). It is only cut where the text was last settled, that is ended in no replacement
    character: with byte fallback a whole run of bytes becomes replacements while its last one is incomplete.
    """

    __slots__ = ("_decoder", "_num_emitted", "_num_settled", "_skip_special_tokens", "_window")

    def __init__(
        self, decoder: Decoder, context: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        """`context` holds the tokens before the first one pushed; only the last few matter."""
        self._decoder = decoder
        self._skip_special_tokens = skip_special_tokens
        self._window = self._end_of(context)
        self._num_emitted = len(self._decode()) if self._window else 0
        self._num_settled = len(self._window)

    def push(self, token_id: int) -> str:
        """Returns the text that has become certain: often that of `token_id`, sometimes none."""
        self._window.append(token_id)
        text = self._decode()
        if text.endswith(_REPLACEMENT) and len(self._window) - self._num_settled <= _MAX_UNSETTLED_TOKENS:
            return self._emit(text.rstrip(_REPLACEMENT))
        new = self._emit(text)
        self._settle()
        return new

    def flush(self) -> str:
        """The rest at the end of a sequence: incomplete characters as replacement characters."""
        return self._emit(self._decode()) if len(self._window) > self._num_settled else ""

    def _end_of(self, context: Sequence[int]) -> list[int]:
        """The last few tokens, from a character's beginning on.

        With byte fallback a run of bytes that begins within a character is replaced whole, with all that is
        pushed to it. A context that holds broken characters itself has no better beginning.
        """
        shortest = list(context[-_NUM_CONTEXT_TOKENS:])
        for num_more in range(_NUM_BYTES_BEFORE + 1):
            window = list(context[-_NUM_CONTEXT_TOKENS - num_more :])
            if _REPLACEMENT not in self._text_of(window):
                return window
        return shortest

    def _emit(self, text: str) -> str:
        new = text[self._num_emitted :]
        self._num_emitted = max(self._num_emitted, len(text))
        return new

    def _settle(self) -> None:
        """All text so far is out; if the window is long, keep only the latest segment that has text."""
        if len(self._window) > _MAX_WINDOW_TOKENS and self._text_of(self._window[self._num_settled :]):
            del self._window[: self._num_settled]
            self._num_emitted = len(self._decode())
        self._num_settled = len(self._window)

    def _decode(self) -> str:
        return self._text_of(self._window)

    def _text_of(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(token_ids, self._skip_special_tokens)
