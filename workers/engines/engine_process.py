"""The engine's own process: `python -m workers.engines.engine_process FD`.

It knows the engine and the pipe, nothing of jobs, Celery or Redis. It ends when the worker closes the
connection or dies. Signals meant for the worker's process group (Ctrl-C, SIGTERM) are ignored: the
worker decides when the engine may go.
"""

from __future__ import annotations

import ctypes
import gc
import signal
import sys
from multiprocessing.connection import Connection
from time import monotonic

from engine.core import Engine
from engine.errors import EngineError
from engine.outputs import RequestOutput
from engine.stats import StepStats
from workers.engines.loading import show_loading
from workers.engines.protocol import (
    BEAT_SECONDS,
    Abort,
    Add,
    Command,
    EngineRequest,
    ModelFacts,
    Progress,
    Ready,
    Refused,
    Start,
    StartFailed,
    StepSampling,
    StepTally,
)

_PR_SET_PDEATHSIG = 1


class EngineLoop:
    """Takes commands between steps and tells what finished. Used in a process of its own or in a thread."""

    def __init__(self, engine: Engine, connection: Connection, sampling: StepSampling | None = None) -> None:
        self._engine = engine
        self._connection = connection
        self._refused: list[Refused] = []
        self._durations: list[float] = []
        self._num_preempted = 0
        self._num_proposed_tokens = 0
        self._num_accepted_tokens = 0
        self._sampling = sampling
        self._num_steps = 0
        self._sampled: list[StepStats] = []
        self._last_said = monotonic()

    def run(self) -> None:
        """Return when the other end closes the connection."""
        try:
            while True:
                self._take_commands()
                self._step()
        except (EOFError, ConnectionError, BrokenPipeError):
            return

    def _take_commands(self) -> None:
        patience = 0.0 if self._engine.has_work() else BEAT_SECONDS
        while self._connection.poll(patience):
            self._obey(self._connection.recv())
            patience = 0.0

    def _obey(self, command: Command) -> None:
        match command:
            case Add(requests):
                for request in requests:
                    self._add(request)
            case Abort(ids):
                for id in ids:
                    self._engine.abort(id)
            case Start():
                raise RuntimeError("the engine was started twice")

    def _add(self, request: EngineRequest) -> None:
        try:
            self._engine.add_request(
                request.id, request.prompt_token_ids, request.params, prompt_text=request.prompt_text
            )
        except EngineError as error:
            self._refused.append(Refused(request.id, error.reason, str(error)))

    def _step(self) -> None:
        if not self._engine.has_work():
            if self._refused or self._is_due():
                self._say(())
            return
        output = self._engine.step()
        self._durations.append(output.stats.duration_seconds)
        self._num_preempted += output.stats.num_preempted
        self._num_proposed_tokens += output.stats.num_proposed_tokens
        self._num_accepted_tokens += output.stats.num_accepted_tokens
        if self._sampling is not None:
            self._sample(self._sampling, output.stats)
        if output.finished or self._refused or self._is_due():
            self._say(output.finished, output.stats)

    def _sample(self, sampling: StepSampling, stats: StepStats) -> None:
        self._num_steps += 1
        if sampling.chooses(self._num_steps, stats.duration_seconds):
            self._sampled.append(stats)

    def _say(self, finished: tuple[RequestOutput, ...], stats: StepStats | None = None) -> None:
        refused, sampled = tuple(self._refused), tuple(self._sampled)
        self._connection.send(Progress(finished, refused, stats, self._take_tally(), sampled))
        self._refused.clear()
        self._sampled.clear()
        self._last_said = monotonic()

    def _take_tally(self) -> StepTally | None:
        if not self._durations:
            return None
        tally = StepTally(
            tuple(self._durations), self._num_preempted, self._num_proposed_tokens, self._num_accepted_tokens
        )
        self._durations.clear()
        self._num_preempted = self._num_proposed_tokens = self._num_accepted_tokens = 0
        return tally

    def _is_due(self) -> bool:
        return monotonic() - self._last_said >= BEAT_SECONDS


def model_facts(engine: Engine) -> ModelFacts:
    info = engine.model_info
    return ModelFacts(
        architecture=info.architecture,
        vocab_size=info.vocab_size,
        device=info.device,
        max_model_len=info.max_model_len,
        num_parameters=info.num_parameters,
        num_blocks=info.num_blocks,
        tokenizer_json=info.tokenizer.to_json(),
    )


def serve(connection: Connection) -> None:
    """Load what `Start` says, then run until the connection closes."""
    start = connection.recv()
    try:
        with show_loading() as loading:
            engine = Engine.from_config(start.config, loading=loading)
    except EngineError as error:
        connection.send(StartFailed(str(error)))
        return
    gc.collect()
    gc.freeze()  # torch's and the model's objects stay for ever; looking through them would hold up a step
    connection.send(Ready(model_facts(engine)))
    EngineLoop(engine, connection, start.sampling).run()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _die_with_parent()
    with Connection(int(sys.argv[1])) as connection:
        serve(connection)


def _die_with_parent() -> None:
    """On Linux, be killed when the thread that started us ends; elsewhere the closed pipe must do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
