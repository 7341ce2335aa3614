"""An engine's other ranks: processes that hold their share of the model and do as the first one does.

    engine (rank 0) ──command──▶ rank 1, 2, …      over a socket each: what to load, make and run
          ◀──────── torch.distributed ────────▶    sums and gathered logits, over gloo or NCCL

The first rank alone schedules, samples and speaks with the outside. A command is told before the first rank
does the same itself, for both meet in what they add up. A rank ends when its socket closes.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Final, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store, TCPStore

from engine.batch import BatchLayout, Feed, Integers
from engine.config import EngineConfig
from engine.errors import EngineError, RankError
from engine.graphs import GraphRunner
from engine.loading import load_for
from engine.model_runner import ModelRunner
from engine.placement import Placement
from engine.scheduler import ScheduledBatch
from engine.shard import Shard
from engine.weights import LoadedModel, LoadObserver

_Result = TypeVar("_Result")

_HOST: Final = "127.0.0.1"
# The first command that follows a long silence may find the others asleep for as long as there is no work.
_COLLECTIVE_TIMEOUT: Final = timedelta(minutes=10)
_END_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class Join:
    """Become this rank of the group that meets at `port`."""

    config: EngineConfig
    shard: Shard
    port: int


@dataclass(frozen=True, slots=True)
class Load:
    pass


@dataclass(frozen=True, slots=True)
class Measure:
    """Say how many blocks of the cache there is room for."""

    max_model_len: int


@dataclass(frozen=True, slots=True)
class MakeRunner:
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Run:
    """Run a step; `fed` are the rows and sources of as many tokens as the first rank will send."""

    layout: BatchLayout
    fed: tuple[Integers, Integers, int] | None


@dataclass(frozen=True, slots=True)
class ComputeLogits:
    """Of the step run last."""

    rows: tuple[int, ...]


Command = Join | Load | Measure | MakeRunner | Run | ComputeLogits


class Ranks:
    """The first rank's end. One engine a process, for `torch.distributed` knows one group."""

    def __init__(self, config: EngineConfig) -> None:
        self.shard = Shard(0, config.tensor_parallel_size)
        self._config = config
        self._others = [_RankProcess(rank) for rank in range(1, self.shard.size)]
        self._is_closing = False

    @classmethod
    def start(cls, config: EngineConfig) -> Ranks:
        """Start the other processes and meet them.

        Raises:
            RankError: one ended before it came.
        """
        ranks = cls(config)
        try:
            ranks._meet()
        except BaseException:
            ranks.close()
            raise
        return ranks

    def load(self, loading: LoadObserver | None) -> LoadedModel:
        """All ranks load their share at once; returns the first one's.

        Raises:
            EngineError: whichever rank's came first.
        """
        self.tell(Load())
        loaded = load_for(self._config, loading, self.shard)
        self.answers()
        return loaded

    def tell(self, command: Command) -> None:
        """Raises RankError if a rank is gone."""
        for other in self._others:
            try:
                other.connection.send(command)
            except OSError as error:
                raise RankError(self._describe_loss() or f"rank {other.rank} does not listen") from error

    def answers(self) -> list[int | None]:
        """Wait for what each rank has to say to the last command: a number to `Measure`, None to others.

        Raises:
            EngineError: a rank's own error, or RankError if it is gone.
        """
        answers: list[int | None] = []
        for other in self._others:
            try:
                answer = other.connection.recv()
            except (EOFError, OSError) as error:
                raise RankError(self._describe_loss() or f"rank {other.rank} is gone") from error
            if isinstance(answer, EngineError):
                raise answer
            answers.append(answer)
        return answers

    def explain(self, error: Exception) -> Exception:
        """The reason for what went wrong in the first rank, where it lies in another one; else the error."""
        loss = self._describe_loss()
        return error if loss is None else RankError(loss)

    def close(self) -> None:
        """End the other processes and leave the group; harmless when repeated."""
        self._is_closing = True
        for other in self._others:
            other.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _meet(self) -> None:
        store = TCPStore(_HOST, 0, self.shard.size, is_master=True, wait_for_workers=False)
        for other in self._others:
            config = _config_of(self._config, other.rank)
            other.connection.send(Join(config, replace(self.shard, rank=other.rank), store.port))
        self.answers()  # each has loaded torch by now, so that nobody waits in vain for one that never comes
        join_group(store, self._config, self.shard)
        for other in self._others:
            threading.Thread(target=self._watch, args=(other,), name="rank-watch", daemon=True).start()

    def _watch(self, other: _RankProcess) -> None:
        """On a GPU nothing that waits for a lost rank ever ends by itself; gloo sees the connection close."""
        other.process.wait()
        if not self._is_closing and self._config.is_on_gpu:
            dist.distributed_c10d._abort_process_group()

    def _describe_loss(self) -> str | None:
        for other in self._others:
            with suppress(subprocess.TimeoutExpired):
                code = other.process.wait(_END_SECONDS)
                how = f"signal {-code}" if code < 0 else f"exit code {code}"
                return f"rank {other.rank} of {self.shard.size} ended with {how}"
        return None


class _RankProcess:
    """One process and our end of its connection."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        ours, theirs = socket.socketpair()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "engine.rank_process", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},  # as the engine's own process
        )
        theirs.close()
        self.connection = Connection(ours.detach())

    def close(self) -> None:
        self.connection.close()
        try:
            self.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def join_group(store: Store, config: EngineConfig, shard: Shard) -> None:
    """Meet the other ranks, all of which have said that they are coming."""
    device = torch.device(config.device) if config.is_on_gpu else None
    if device is not None:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if config.is_on_gpu else "gloo",
        store=store,
        rank=shard.rank,
        world_size=shard.size,
        timeout=_COLLECTIVE_TIMEOUT,
        device_id=device,
    )


def _config_of(config: EngineConfig, rank: int) -> EngineConfig:
    """The same on the rank's own device."""
    if not config.is_on_gpu:
        return config
    first = torch.device(config.device).index or 0
    return replace(config, device=f"cuda:{first + rank}")


@dataclass(frozen=True, slots=True)
class SharedPlacement:
    """As `Placement`, on all ranks at once."""

    own: Placement
    ranks: Ranks

    def num_blocks_affordable(self) -> int:
        """As the rank with the least room."""
        self.ranks.tell(Measure(self.own.max_model_len))
        num_blocks = _explained(self.ranks, self.own.num_blocks_affordable)
        return min(num_blocks, *(answer for answer in self.ranks.answers() if answer is not None))

    def make_runner(self, num_blocks: int, loading: LoadObserver | None = None) -> SharedRunner:
        self.ranks.tell(MakeRunner(num_blocks))
        runner = _explained(self.ranks, lambda: self.own.make_runner(num_blocks, loading))
        assert isinstance(runner, ModelRunner | GraphRunner)
        self.ranks.answers()
        return SharedRunner(runner, self.ranks, self.own.config.block_size)


class SharedRunner:
    """Takes the place of a `ModelRunner`: tells the other ranks, then does the same."""

    def __init__(self, own: ModelRunner | GraphRunner, ranks: Ranks, block_size: int) -> None:
        self._own = own
        self._ranks = ranks
        self._block_size = block_size

    def run(self, batch: ScheduledBatch, feed: Feed | None = None) -> Tensor:
        """As `Runner.run`.

        Raises:
            RankError: a rank was lost.
        """
        layout = BatchLayout.of(batch, self._block_size)
        fed = None if feed is None else (feed.rows, feed.sources, len(feed.ids))
        self._ranks.tell(Run(layout, fed))

        def run() -> Tensor:
            if feed is not None:
                dist.broadcast(feed.ids, 0)
            return self._own.execute(layout, feed)

        return _explained(self._ranks, run)

    def logits(self, hidden: Tensor, rows: Sequence[int]) -> Tensor:
        """As `Runner.logits`, of the last `run`.

        Raises:
            RankError: a rank was lost.
        """
        self._ranks.tell(ComputeLogits(tuple(rows)))
        return _explained(self._ranks, lambda: self._own.logits(hidden, rows))


def _explained(ranks: Ranks, act: Callable[[], _Result]) -> _Result:
    """Do it; what fails because another rank is gone says so."""
    try:
        return act()
    except EngineError:
        raise
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ranks.explain(error) from error
