"""One rank's process beside the engine's: `python -m engine.rank_process FD`.

It does what it is told (`engine.ranks`) until the socket closes. Signals meant for the engine's process group
are ignored: the engine decides when its ranks may go.
"""

from __future__ import annotations

import ctypes
import signal
import sys
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from engine.batch import Feed
from engine.errors import EngineError
from engine.graphs import GraphRunner
from engine.loading import load_for
from engine.model_runner import ModelRunner
from engine.placement import Placement
from engine.ranks import Command, ComputeLogits, Join, Load, MakeRunner, Measure, Run, join_group
from engine.weights import LoadedModel

_PR_SET_PDEATHSIG = 1


class Rank:
    """What one rank has made so far, and how it obeys."""

    def __init__(self, join: Join) -> None:
        self._config = join.config
        self._shard = join.shard
        self._loaded: LoadedModel | None = None
        self._placement: Placement | None = None
        self._runner: ModelRunner | GraphRunner | None = None
        self._hidden: Tensor | None = None

    def obey(self, command: Command, connection: Connection) -> None:
        match command:
            case Load():
                self._loaded = load_for(self._config, shard=self._shard)
                connection.send(None)
            case Measure(max_model_len):
                assert self._loaded is not None
                self._placement = Placement(self._loaded.model, self._config, max_model_len)
                connection.send(self._placement.num_blocks_affordable())
            case MakeRunner(num_blocks):
                assert self._placement is not None
                runner = self._placement.make_runner(num_blocks)
                assert isinstance(runner, ModelRunner | GraphRunner)
                self._runner = runner
                connection.send(None)
            case Run() as step:
                self._hidden = self._run(step)
            case ComputeLogits(rows):
                assert self._runner is not None
                assert self._hidden is not None
                self._runner.logits(self._hidden, rows)
            case Join():
                raise RuntimeError("a rank joins once")

    def _run(self, step: Run) -> Tensor:
        assert self._runner is not None
        feed: Feed | None = None
        if step.fed is not None:
            rows, sources, num_ids = step.fed
            ids = torch.empty(num_ids, dtype=torch.int64, device=self._config.device)
            dist.broadcast(ids, 0)
            feed = Feed(ids, rows, sources)
        return self._runner.execute(step.layout, feed)


def serve(connection: Connection) -> None:
    join = connection.recv()
    connection.send(None)
    store = TCPStore("127.0.0.1", join.port, join.shard.size, is_master=False)
    join_group(store, join.config, join.shard)
    rank = Rank(join)
    while True:
        command = connection.recv()
        try:
            rank.obey(command, connection)
        except EngineError as error:
            connection.send(error)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with Connection(int(sys.argv[1])) as connection:
        try:
            serve(connection)
        except (EOFError, ConnectionError, BrokenPipeError):
            return


if __name__ == "__main__":
    main()
