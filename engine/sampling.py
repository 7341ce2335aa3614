"""What a request asks for, and the random numbers it draws."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Literal, get_args

from engine.errors import InvalidRequestError

MAX_SEQUENCES_PER_REQUEST = 128
MAX_TOP_LOGPROBS = 20
_DRAW_BITS = 53  # what a float's mantissa holds
_SWITCHES = (
    "use_beam_search",
    "early_stopping",
    "ignore_eos",
    "echo",
    "skip_special_tokens",
    "include_stop_str_in_output",
)
StructureKind = Literal["json_schema", "regex", "choice", "grammar"]


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """What the output must follow.

    Attributes:
        text: The schema, the expression, a JSON list of strings, or a grammar in Lark's or GBNF's notation.
    """

    kind: StructureKind
    text: str

    @property
    def is_plausible(self) -> bool:
        """Whether it has the shape of one; its text is judged when it is compiled."""
        is_text = isinstance(self.text, str) and bool(self.text)
        return is_text and self.kind in get_args(StructureKind)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request is decoded; the meanings are those of vLLM and of OpenAI's legacy completions.

    Attributes:
        max_tokens: Tokens generated per sequence; 0 only together with `echo`.
        min_tokens: Before a sequence has so many, no token ends it, and no stop string is looked for in the
            text of these.
        temperature: 0 is greedy, and then top_p, top_k, min_p and seed have no effect.
        top_k: Sample among the k most probable tokens; 0 is off.
        min_p: Drop tokens less probable than this fraction of the most probable one.
        seed: The same seed and request give the same tokens, whatever else is in the batch, up to the
            rounding of the model itself. `None` draws one.
        n: Completions returned.
        best_of: Sequences generated, of which the n with the highest mean log-probability are returned;
            with beam search the width. `None` is n.
        use_beam_search: Keep the `best_of` most probable sequences at each step. Temperature, top_p, top_k,
            min_p, seed and penalties have no effect.
        length_penalty: A beam's score is its log-probability divided by its length to this power.
        early_stopping: Beam search ends as soon as `best_of` beams have finished.
        stop: Strings that end a sequence; its text is cut before the first one.
        stop_token_ids: Tokens that end a sequence, beside the model's own.
        ignore_eos: The model's own end-of-sequence tokens do not end a sequence.
        logprobs: Return the log-probability of each token and of this many most probable ones.
        prompt_logprobs: Return for each token of the prompt its log-probability and rank, and this many most
            probable ones in its place.
        echo: The prompt comes before the completion, with its log-probabilities if those are asked for.
        bad_words: Texts that no output may hold, as far as one run of tokens spells them: that of the word at
            the beginning of a text, or of the word after a space.
        structured_outputs: The output follows it from its first token, and ends where it is complete. Not
            together with beam search, `bad_words`, `min_tokens` or `ignore_eos`, which could contradict it.
        skip_special_tokens: Leave special tokens out of the text.
        include_stop_str_in_output: Keep the stop string, or the text of the stop token.
        presence_penalty, frequency_penalty: Subtracted once, or per occurrence, for generated tokens.
        repetition_penalty: Divides positive, multiplies negative logits of tokens seen in prompt or output.
        logit_bias: Added to the logits of these token ids.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    bad_words: tuple[str, ...] = ()
    structured_outputs: StructuredOutput | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_switches()
        self._check_lengths()
        self._check_distribution()
        self._check_penalties()
        self._check_stops()
        self._check_structure()

    @property
    def width(self) -> int:
        """Sequences generated side by side."""
        return self.best_of or self.n

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def changes_logits(self) -> bool:
        """Whether penalties or a bias move the distribution away from the model's own."""
        return bool(
            self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1.0
            or self.logit_bias
        )

    @property
    def can_speculate(self) -> bool:
        """Whether tokens may be run ahead of their turn.

        Beams are ranked together, and a structure's mask would have to be made for each token ahead.
        """
        return not self.use_beam_search and self.structured_outputs is None

    @property
    def can_run_ahead(self) -> bool:
        """Whether a token can be chosen, and the one after it run, before the host knows it.

        What was chosen must not decide what may come next. Stop strings and ends of sequence may: they are
        found one step late, and that step's token is dropped.
        """
        looks_back = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        return (
            self.width == 1
            and self.max_tokens > 0
            and not self.use_beam_search
            and self.structured_outputs is None
            and not self.bad_words
            and not looks_back
        )

    @property
    def needs_logprobs(self) -> bool:
        """Whether the chosen tokens' log-probabilities are wanted, by the client or to rank sequences."""
        return self.logprobs is not None or (self.width > self.n and not self.use_beam_search)

    @property
    def needs_prompt_logprobs(self) -> bool:
        return self.prompt_logprobs is not None or (self.echo and self.logprobs is not None)

    @property
    def num_prompt_tops(self) -> int:
        """Most probable tokens wanted in the place of each of the prompt's."""
        return max(self.prompt_logprobs or 0, (self.logprobs or 0) if self.echo else 0)

    def _check_switches(self) -> None:
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequestError(name, getattr(self, name), "must be true or false")

    def _check_lengths(self) -> None:
        _check_int("max_tokens", self.max_tokens, 0 if self.echo else 1, None)
        _check_int("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check_int("n", self.n, 1, MAX_SEQUENCES_PER_REQUEST)
        if self.best_of is not None:
            _check_int("best_of", self.best_of, self.n, MAX_SEQUENCES_PER_REQUEST)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS)
        if self.prompt_logprobs is not None:
            _check_int("prompt_logprobs", self.prompt_logprobs, 0, MAX_TOP_LOGPROBS)

    def _check_distribution(self) -> None:
        _check_float("temperature", self.temperature, 0.0, None)
        _check_float("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise InvalidRequestError("top_p", self.top_p, "must be above 0")
        _check_int("top_k", self.top_k, 0, None)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _check_int("seed", self.seed, -(1 << 63), (1 << 63) - 1)

    def _check_penalties(self) -> None:
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, None)
        if self.repetition_penalty == 0.0:
            raise InvalidRequestError("repetition_penalty", self.repetition_penalty, "must be above 0")
        _check_float("length_penalty", self.length_penalty, None, None)
        if not isinstance(self.logit_bias, Mapping):
            rule = "must be a mapping from token ids to numbers"
            raise InvalidRequestError("logit_bias", self.logit_bias, rule)
        for token_id, bias in self.logit_bias.items():
            _check_int("logit_bias", token_id, 0, None)
            _check_float("logit_bias", bias, -100.0, 100.0)

    def _check_stops(self) -> None:
        for name, texts in (("stop", self.stop), ("bad_words", self.bad_words)):
            if not isinstance(texts, tuple) or not all(isinstance(text, str) and text for text in texts):
                raise InvalidRequestError(name, texts, "must be a tuple of strings that are not empty")
        if not isinstance(self.stop_token_ids, tuple):
            raise InvalidRequestError("stop_token_ids", self.stop_token_ids, "must be a tuple of token ids")
        for token_id in self.stop_token_ids:
            _check_int("stop_token_ids", token_id, 0, None)

    def _check_structure(self) -> None:
        structure = self.structured_outputs
        if structure is None:
            return
        if not isinstance(structure, StructuredOutput) or not structure.is_plausible:
            rule = f"must be a text of one of the kinds {', '.join(get_args(StructureKind))}"
            raise InvalidRequestError("structured_outputs", getattr(structure, "kind", structure), rule)
        for name in ("use_beam_search", "bad_words", "min_tokens", "ignore_eos"):
            if getattr(self, name):
                rule = "cannot be combined with structured_outputs"
                raise InvalidRequestError(name, getattr(self, name), rule)


def uniform_draw(seed: int, sequence_index: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but the arguments.

    Counter-based, so a sequence that is preempted, forked or retried elsewhere needs no generator state to
    go on with the same tokens.
    """
    key = b"%d/%d/%d" % (seed, sequence_index, position)
    digest = blake2b(key, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> (64 - _DRAW_BITS)) / (1 << _DRAW_BITS)


def _check_int(name: str, value: object, low: int, high: int | None) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):  # type: ignore[operator]  # narrowed by `whole`
        rule = f"must be a whole number of at least {low}"
        raise InvalidRequestError(name, value, rule if high is None else f"{rule} and at most {high}")


def _check_float(name: str, value: object, low: float | None, high: float | None) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise InvalidRequestError(name, value, "must be a finite number")
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = [f"at least {low:g}"] if low is not None else []
        bounds += [f"at most {high:g}"] if high is not None else []
        raise InvalidRequestError(name, value, f"must be {' and '.join(bounds)}")
