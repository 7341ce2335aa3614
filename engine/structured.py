"""Output that follows a schema, a regular expression, a list of choices or a grammar.

llguidance keeps the grammar and says at each step which tokens may come: a mask over the vocabulary, made in
tens of microseconds. The mask is applied to the logits before a token is chosen, so nothing is drawn in vain.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import llguidance

from engine.errors import InvalidRequestError
from engine.outputs import RequestFailure
from engine.sampling import StructuredOutput

MAX_KEPT_GRAMMARS = 32

_UNFOLLOWED = RequestFailure(
    "structure_failed", "the structure could not be followed to its end", retryable=False
)


class SerialisedTokenizer(Protocol):
    def to_json(self) -> str: ...


class Guide:
    """Where one sequence stands in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    @property
    def is_over(self) -> bool:
        """Whether nothing can follow; also when the grammar can no longer be followed (see `failure`)."""
        return bool(self._matcher.is_stopped())

    @property
    def failure(self) -> RequestFailure | None:
        """Why the grammar was given up, as when it grew too complex; None while all is well."""
        return _UNFOLLOWED if self._matcher.is_error() else None

    def allowed(self) -> bytes:
        """One bit for each token of the vocabulary, the first in the lowest bit of the first byte."""
        return bytes(self._matcher.compute_bitmask())

    def accept(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)

    def fork(self) -> Guide:
        return Guide(self._matcher.deep_copy())


class GrammarCompiler:
    """Makes guides for one tokenizer, and keeps the latest grammars compiled."""

    def __init__(self, source: SerialisedTokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """`vocab_size` is the model's, which may be larger than the tokenizer's."""
        self._source = source
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[StructuredOutput, Guide] = OrderedDict()

    def guide(self, structure: StructuredOutput) -> Guide:
        """At the beginning of the structure. A new one is compiled: up to a second, if it is huge.

        Raises:
            InvalidRequestError: the grammar makes no sense.
        """
        guide = self._compiled.pop(structure, None) or self._compile(structure)
        self._compiled[structure] = guide
        if len(self._compiled) > MAX_KEPT_GRAMMARS:
            self._compiled.popitem(last=False)
        return guide.fork()

    def _compile(self, structure: StructuredOutput) -> Guide:
        if self._tokenizer is None:
            self._tokenizer = llguidance.LLTokenizer(
                self._source.to_json(), n_vocab=self._vocab_size, eos_token=self._eos_token_ids or None
            )
        try:
            grammar = llguidance.grammar_from(structure.kind, structure.text)
        except (ValueError, TypeError) as error:
            raise _refused(structure) from error
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise _refused(structure)
        return Guide(matcher)


def _refused(structure: StructuredOutput) -> InvalidRequestError:
    return InvalidRequestError("structured_outputs", structure.kind, "must hold what its kind says")
