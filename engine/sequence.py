"""A request's tokens and where it stands; data for the scheduler, no policy and no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final

from engine.prefix_cache import ROOT
from engine.sampling import SamplingParams
from engine.speculation import PromptLookup

# Any id that every model has: what is run in its place comes from the device.
_PENDING_TOKEN: Final = 0


class RequestStatus(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log-probability of one token and of the most probable tokens in its place, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens of one stream, and which of them the KV cache holds.

    Attributes:
        index: Which of the request's sequences; keys its random numbers.
        token_ids: Prompt, then output.
        num_computed_tokens: Leading tokens whose keys and values are in the cache, or are the business of
            the request's first sequence, which shares their blocks.
        block_table: Blocks of the cache in token order; owned by the block manager's reference counts.
        num_published_blocks: Leading blocks that the prefix cache has been told of.
        prefix_entry: What it calls the last of them.
        cumulative_logprob: Of the output tokens, where log-probabilities are computed.
        logprobs: One entry per output token, where the client asked for them.
        has_pending_token: The last of `token_ids` stands for one that is chosen and not read yet.
        lookup: Proposes what comes next; `None` until it is first asked.
    """

    index: int
    token_ids: list[int]
    num_prompt_tokens: int
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    num_published_blocks: int = 0
    prefix_entry: int = ROOT
    cumulative_logprob: float = 0.0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    has_pending_token: bool = False
    lookup: PromptLookup | None = None

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    def append(self, token_id: int) -> None:
        self.token_ids.append(token_id)

    def append_pending(self) -> None:
        """Count a token that the device knows and the host does not."""
        self.token_ids.append(_PENDING_TOKEN)
        self.has_pending_token = True

    def drop_pending(self) -> None:
        """Take that back, because it is known now or will never be."""
        if self.has_pending_token:
            self.token_ids.pop()
            self.has_pending_token = False


@dataclass(slots=True, eq=False)
class Request:
    """One generation.

    A request starts with one sequence. Once its prompt is computed it is forked into `params.width` of them,
    which from then on decode in the same steps.

    Attributes:
        arrival_number: Grows with each request added; a preempted request keeps it, and so its place.
        seed: The client's, or one drawn for it.
        sequences: Those alive, the first one being the leader when the cache is refilled.
        num_cached_tokens: Of the prompt, found in the prefix cache at the first admission; `None` before it.
    """

    request_id: str
    params: SamplingParams
    priority: int
    arrival_number: int
    seed: int
    sequences: list[Sequence]
    status: RequestStatus = RequestStatus.WAITING
    is_forked: bool = False
    num_cached_tokens: int | None = None

    @property
    def order(self) -> tuple[int, int]:
        """Smaller is served first and preempted last."""
        return self.priority, self.arrival_number

    @property
    def awaits_its_end(self) -> bool:
        """Whether the token that is pending is the last it may have, so that there is nothing to run."""
        sequence = self.sequences[0]
        return sequence.has_pending_token and sequence.num_output_tokens >= self.params.max_tokens

    @property
    def num_seats(self) -> int:
        """Sequences it runs, or will run once forked."""
        return len(self.sequences) if self.is_forked else self.params.width

    @property
    def is_decoding(self) -> bool:
        """Whether each sequence lacks exactly its last token in the cache."""
        return all(sequence.num_uncomputed_tokens == 1 for sequence in self.sequences)
