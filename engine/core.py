"""The engine: requests in, tokens out, one step at a time.

Not for several threads: one thread adds, aborts and steps.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from itertools import accumulate, count

from torch import Tensor

from engine.admission import ModelInfo, check_request
from engine.beam_progress import BeamProgress
from engine.block_manager import BlockManager
from engine.config import EngineConfig
from engine.decoding import Decoding, TokensAhead, Turn
from engine.device import choose_device, memory_for
from engine.errors import ConfigError, EngineError, InvalidRequestError, InvariantError, StepError
from engine.loading import load_for
from engine.model_config import ModelConfig
from engine.model_runner import Runner
from engine.outputs import (
    Completion,
    Logprobs,
    RequestFailure,
    RequestOutput,
    StepOutput,
    TokenDelta,
    Usage,
)
from engine.placement import Placement
from engine.progress import RequestProgress
from engine.ranks import Ranks, SharedPlacement
from engine.sampled_progress import SampledProgress
from engine.sampler import rank, score
from engine.sampling import SamplingParams
from engine.scheduler import ScheduledBatch, ScheduledSequence, Scheduler
from engine.sequence import Request, RequestStatus
from engine.sequence import Sequence as TokenSequence
from engine.stats import StepObserver, StepStats
from engine.structured import GrammarCompiler
from engine.weights import LoadedModel, LoadObserver

__all__ = [
    "Completion",
    "Engine",
    "Logprobs",
    "ModelInfo",
    "RequestOutput",
    "StepOutput",
    "TokenDelta",
    "Usage",
]

_SCORED_ROWS_AT_ONCE = 256


class Engine:
    """Batches requests continuously over a paged KV cache.

    Attributes:
        model_info: What is loaded, and how large the cache came out.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig,
        *,
        observer: StepObserver | None = None,
        clock: Callable[[], float] = time.monotonic,
        loading: LoadObserver | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """Raises ConfigError if the model and the configuration do not fit together, or DeviceMemoryError."""
        config = choose_device(config)
        placement: Placement | SharedPlacement
        placement = Placement(loaded.model, config, _max_model_len(loaded.config, config))
        if ranks is not None:
            placement = SharedPlacement(placement, ranks)
        num_blocks = placement.num_blocks_affordable()
        self.model_info = _describe(loaded, config, _max_model_len(loaded.config, config), num_blocks)
        self._blocks = BlockManager(
            self.model_info.num_blocks, config.block_size, keeps_prefixes=config.keeps_prefixes
        )
        self._scheduler = Scheduler(
            self._blocks,
            max_num_sequences=config.max_num_sequences,
            max_num_batched_tokens=config.max_num_batched_tokens,
            num_speculative_tokens=config.num_speculative_tokens,
        )
        self._decoding = Decoding(self._scheduler, clock)
        self._runner: Runner = placement.make_runner(num_blocks, loading)
        self._ranks = ranks
        self._config = config
        self._observer = observer
        self._clock = clock
        self._arrivals = count()
        self._grammars = GrammarCompiler(
            self.model_info.tokenizer, self.model_info.vocab_size, self.model_info.eos_token_ids
        )
        self._progress: dict[str, RequestProgress] = {}
        self._finished: list[RequestOutput] = []
        self._ahead: TokensAhead | None = None
        # What is proposed to run ahead of its turn depends on the tokens, so those must be known.
        self._runs_ahead = config.is_on(config.async_steps) and not config.num_speculative_tokens
        self._is_broken = False

    @classmethod
    def from_config(
        cls,
        config: EngineConfig,
        *,
        loading: LoadObserver | None = None,
        observer: StepObserver | None = None,
    ) -> Engine:
        """Load the weights, of which `loading` is told, and make the cache.

        Raises:
            ConfigError: the device or the kernels are not there, or the model does not fit the configuration.
            ModelLoadError: the folder or name holds no model that can be loaded.
            DeviceMemoryError: the GPU has no room for it.
        """
        config = choose_device(config)
        if config.tensor_parallel_size > 1:
            ranks = Ranks.start(config)
            try:
                return cls(ranks.load(loading), config, observer=observer, loading=loading, ranks=ranks)
            except BaseException:
                ranks.close()
                raise
        return cls(load_for(config, loading), config, observer=observer, loading=loading)

    def close(self) -> None:
        """End the processes of the other ranks, where there are any; the engine is of no use afterwards."""
        if self._ranks is not None:
            self._ranks.close()

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        prompt_text: str | None = None,
        priority: int = 0,
    ) -> None:
        """Put a request into the waiting line; smaller priorities are served first.

        `prompt_text` is what `echo` repeats; without it the decoded prompt is.

        Raises:
            InvalidRequestError: the id is in use, or the request could never be run.
        """
        if request_id in self._progress:
            raise InvalidRequestError("request_id", request_id, "is already in the engine")
        check_request(self.model_info, prompt_token_ids, params, priority)
        request = Request(
            request_id=request_id,
            params=params,
            priority=priority,
            arrival_number=next(self._arrivals),
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            sequences=[TokenSequence(0, list(prompt_token_ids), len(prompt_token_ids))],
        )
        self._progress[request_id] = self._begin(request, prompt_text)
        self._scheduler.add(request)

    def abort(self, request_id: str) -> bool:
        """End a request; its blocks are free at once and the next step reports what it had.

        Returns False if there is no such request, or no longer.
        """
        progress = self._progress.get(request_id)
        if progress is None:
            return False
        for sequence in progress.request.sequences:
            sequence.drop_pending()
        try:
            progress.abort()
        except Exception as error:  # whatever a tokenizer may raise
            progress.failure = RequestFailure.of(error)
        self._scheduler.remove(progress.request)
        self._settle(progress, self._clock())
        return True

    def has_work(self) -> bool:
        """Whether a step would do or report anything."""
        return bool(self._finished) or self._scheduler.has_work()

    def step(self) -> StepOutput:
        """Schedule, run, update, once.

        Raises:
            StepError: the model failed, now or in an earlier step; only a new engine helps.
            DeviceMemoryError: the GPU had no room for the step; likewise, with another setting.
        """
        if self._is_broken:
            raise StepError("an earlier step failed, so this engine's state cannot be trusted")
        started_at = self._clock()
        try:
            batch = self._scheduler.schedule()
            self._note_scheduling(batch, started_at)
            with memory_for("step", self._config.device):
                turn = self._run(batch)
        except Exception as error:
            self._is_broken = True
            if isinstance(error, EngineError):
                raise
            raise StepError(f"the step raised {type(error).__name__}: {error}") from error
        finished, self._finished = tuple(self._finished), []
        stats = self._stats(batch, turn, started_at, finished)
        if self._observer is not None:
            self._observer.on_step(stats)
        return StepOutput(tuple(turn.deltas), finished, stats)

    def check_invariants(self) -> None:
        """Compare all accounts with each other; cheap enough for an idle loop.

        Raises:
            InvariantError: a block is lost, owned twice or miscounted, or a request is in two states.
        """
        self._scheduler.check_invariants()
        num_requests = self._scheduler.num_running + self._scheduler.num_waiting
        if num_requests != len(self._progress):
            raise InvariantError(f"{num_requests} requests are scheduled, {len(self._progress)} are known")

    def _begin(self, request: Request, prompt_text: str | None) -> RequestProgress:
        arrived_at = self._clock()
        texts, ends = self.model_info.tokenizer, frozenset(self.model_info.eos_token_ids)
        # Where nothing is generated there is nothing to search.
        if request.params.use_beam_search and request.params.max_tokens > 0:
            return BeamProgress(request, texts, ends, prompt_text=prompt_text, arrived_at=arrived_at)
        structure = request.params.structured_outputs
        guide = None if structure is None else self._grammars.guide(structure)
        return SampledProgress(
            request, texts, ends, prompt_text=prompt_text, arrived_at=arrived_at, guide=guide
        )

    def _note_scheduling(self, batch: ScheduledBatch, at: float) -> None:
        for request in batch.preempted:
            self._progress[request.request_id].phases.preempted(at)
        for request in batch.joined:
            self._progress[request.request_id].phases.admitted(at)
        for request_id in {entry.request.request_id: None for entry in batch.entries}:
            self._progress[request_id].phases.took_part(len(batch.entries))

    def _run(self, batch: ScheduledBatch) -> Turn:
        """Compute the batch, then give each sequence that is due its next tokens.

        Tokens chosen ahead are read one step later, when the device has this step's work.
        """
        ahead, self._ahead = self._ahead, None
        if not batch.entries and ahead is None:
            if self._scheduler.has_work():
                raise InvariantError("there is work and nothing was scheduled")
            return Turn()
        hidden = self._launch(batch, ahead)
        turn = Turn() if ahead is None else self._decoding.take_ahead(ahead)
        self._scheduler.commit(batch)
        if hidden is not None:
            self._collect_prompt_logprobs(batch, hidden)
            turn.add(self._advance(batch, hidden))
        for ended in turn.ended:
            self._settle(ended, self._clock())
        return turn

    def _launch(self, batch: ScheduledBatch, ahead: TokensAhead | None) -> Tensor | None:
        """Give the device the step, and the choice of its tokens where nothing must be known for that."""
        if not batch.entries:
            return None
        hidden = self._runner.run(batch, None if ahead is None else ahead.feed(batch))
        due = [entry for entry in batch.entries if entry.samples]
        if due and self._runs_ahead and all(entry.request.params.can_run_ahead for entry in due):
            logits = self._runner.logits(hidden, _rows_due(batch))
            self._ahead = self._decoding.choose_ahead(due, self._progress, logits)
        return hidden

    def _advance(self, batch: ScheduledBatch, hidden: Tensor) -> Turn:
        if self._ahead is not None:
            self._ahead.mark_pending()
            return Turn()
        due = [entry for entry in batch.entries if entry.samples and _is_alive(entry)]
        if not due:
            return Turn()
        return self._decoding.advance(due, self._progress, self._runner.logits(hidden, _rows_due(batch)))

    def _collect_prompt_logprobs(self, batch: ScheduledBatch, hidden: Tensor) -> None:
        first_row = 0
        for entry in batch.entries:
            progress = self._progress[entry.request.request_id]
            if progress.wants_prompt_logprobs and _is_alive(entry):
                self._score_prompt(progress, entry, first_row, hidden)
            first_row += entry.num_tokens

    def _score_prompt(
        self, progress: RequestProgress, entry: ScheduledSequence, first_row: int, hidden: Tensor
    ) -> None:
        """Position p scores token p + 1; a preempted prompt is computed again but scored once."""
        sequence = entry.sequence
        first = max(entry.start, len(progress.prompt_logprobs))
        last = min(entry.start + entry.num_tokens, sequence.num_prompt_tokens - 1)
        for start in range(first, last, _SCORED_ROWS_AT_ONCE):
            end = min(start + _SCORED_ROWS_AT_ONCE, last)
            offset = first_row - entry.start
            logits = self._runner.logits(hidden, range(start + offset, end + offset))
            targets = sequence.token_ids[start + 1 : end + 1]
            progress.prompt_logprobs += score(logits, targets, progress.params.num_prompt_tops)
            if progress.params.prompt_logprobs is not None:
                progress.prompt_ranks += rank(logits, targets)

    def _settle(self, progress: RequestProgress, at: float) -> None:
        del self._progress[progress.request.request_id]
        self._finished.append(progress.output(at))

    def _stats(
        self, batch: ScheduledBatch, turn: Turn, started_at: float, finished: tuple[RequestOutput, ...]
    ) -> StepStats:
        num_decode_tokens = sum(entry.num_tokens for entry in batch.entries if entry.is_decode)
        return StepStats(
            started_at=started_at,
            duration_seconds=self._clock() - started_at,
            batch_size=len(batch.entries),
            num_prefill_tokens=batch.num_tokens - num_decode_tokens,
            num_decode_tokens=num_decode_tokens,
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_blocks_used=self._blocks.num_used,
            num_blocks_total=self._blocks.num_blocks,
            num_preempted=len(batch.preempted),
            joined=tuple(request.request_id for request in batch.joined),
            left=tuple(output.request_id for output in finished),
            num_proposed_tokens=turn.num_proposed_tokens,
            num_accepted_tokens=turn.num_accepted_tokens,
        )


def _is_alive(entry: ScheduledSequence) -> bool:
    """Whether its request has not ended since it was scheduled."""
    return entry.request.status is not RequestStatus.FINISHED


def _rows_due(batch: ScheduledBatch) -> list[int]:
    """For each sequence that gets tokens: the rows of its last token and of those proposed to follow it."""
    ends = accumulate(entry.num_tokens for entry in batch.entries)
    pairs = zip(ends, batch.entries, strict=True)
    return [
        row
        for end, entry in pairs
        if entry.samples and _is_alive(entry)
        for row in range(end - 1 - len(entry.proposal), end)
    ]


def _max_model_len(model: ModelConfig, config: EngineConfig) -> int:
    own_limit = model.max_position_embeddings
    max_model_len = own_limit if config.max_model_len is None else config.max_model_len
    if max_model_len > own_limit:
        raise ConfigError("max_model_len", max_model_len, f"must be at most {own_limit}, the model's limit")
    return max_model_len


def _describe(loaded: LoadedModel, config: EngineConfig, max_model_len: int, num_blocks: int) -> ModelInfo:
    return ModelInfo(
        architecture=loaded.config.architecture,
        vocab_size=loaded.config.vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=loaded.generation_config.eos_token_ids,
        dtype=config.dtype,
        device=config.device,
        num_parameters=loaded.num_parameters,
        num_blocks=num_blocks,
        block_size=config.block_size,
        max_num_sequences=config.max_num_sequences,
        tokenizer=loaded.tokenizer,
    )
