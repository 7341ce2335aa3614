"""Keeps the stack's processes up, and takes them down in order.

start   stage by stage: redis (wait until it answers) ─▶ workers ─▶ api
keep    one keeper task a process: run, wait for its end, ask the policy, run again
stop    the other way round: api (stops accepting) ─▶ workers (soft shutdown) ─▶ redis;
        each has its grace period, then its whole process group gets SIGKILL
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cli.errors import StackError
from cli.stack.log import Log
from cli.stack.policy import GiveUp, decide, describe_exit
from cli.stack.process import Child, ProcessSpec

READY_POLL_SECONDS = 0.03


@dataclass(frozen=True, slots=True)
class Stage:
    """Processes that start together once all of the stage before are ready, and stop together before it."""

    processes: tuple[ProcessSpec, ...]


class Supervisor:
    """Runs the stages. All methods belong to the main thread's event loop.

    Invariant: every running child is in `_children` under its name, from the moment it exists (starting one
    is synchronous), so a stop at any time misses none.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        log: Log,
        on_change: Callable[[Sequence[int]], None] = lambda pids: None,
    ) -> None:
        """`on_change` is told the ids of the running children whenever one starts or ends."""
        self._stages = tuple(stages)
        self._log = log
        self._on_change = on_change
        self._children: dict[str, Child] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._stopping = asyncio.Event()
        self._failure: StackError | None = None
        self._num_stop_requests = 0

    @property
    def was_forced(self) -> bool:
        """Whether a second request to stop cut the first short."""
        return self._num_stop_requests > 1

    @property
    def was_asked_to_stop(self) -> bool:
        return self._num_stop_requests > 0

    @property
    def is_stopping(self) -> bool:
        return self._stopping.is_set()

    def is_running(self, name: str) -> bool:
        return name in self._children

    def request_stop(self) -> None:
        """Begin to stop; asked again, kill at once. May be used as a signal handler of the loop."""
        self._num_stop_requests += 1
        self._stopping.set()
        if self.was_forced:
            self._log.note("asked twice: killing what still runs")
            for child in self._children.values():
                child.kill_group()

    async def start(self) -> None:
        """Return once every process has been started, or a stop was requested.

        Raises:
            StackError: A process that others wait for does not come up.
        """
        for stage in self._stages:
            for spec in stage.processes:
                keeper = asyncio.create_task(self._keep(spec), name=spec.name)
                keeper.add_done_callback(self._keeper_ended)
                self._keepers.append(keeper)
            for spec in stage.processes:
                await self._wait_ready(spec)

    async def wait(self) -> None:
        """Return when a stop was requested.

        Raises:
            StackError: A vital process was given up.
        """
        await self._stopping.wait()
        if self._failure is not None:
            raise self._failure

    async def stop(self) -> None:
        """Return when nothing runs any more. Safe to call at any time, more than once."""
        self._stopping.set()
        for stage in reversed(self._stages):
            await asyncio.gather(*(self._stop_process(spec) for spec in stage.processes))
        await asyncio.gather(*self._keepers, return_exceptions=True)

    async def _keep(self, spec: ProcessSpec) -> None:
        quick_failures = 0
        while not self._stopping.is_set():
            status, ran_seconds = await self._run_once(spec)
            if self._stopping.is_set():
                return
            verdict = decide(
                spec.policy, exit_status=status, ran_seconds=ran_seconds, quick_failures=quick_failures
            )
            if isinstance(verdict, GiveUp):
                self._give_up(spec, status, verdict)
                return
            quick_failures = verdict.quick_failures
            self._log.note(
                f"{spec.name} ended after {ran_seconds:.1f} s with {describe_exit(status)}; "
                f"starting it again in {verdict.delay_seconds:g} s"
            )
            await self._pause(verdict.delay_seconds)

    async def _run_once(self, spec: ProcessSpec) -> tuple[int, float]:
        child = Child(spec, lambda text: self._log.line(spec.name, text))
        self._children[spec.name] = child
        self._tell_change()
        status = await child.ended()
        del self._children[spec.name]
        self._tell_change()
        return status, child.ran_seconds

    def _give_up(self, spec: ProcessSpec, status: int, verdict: GiveUp) -> None:
        message = f"{spec.name} ended with {describe_exit(status)} and is not started again: {verdict.reason}"
        if spec.is_vital:
            self._fail(StackError(message))
        else:
            self._log.note(message)

    def _fail(self, failure: StackError) -> None:
        self._failure = failure
        self._stopping.set()

    def _keeper_ended(self, keeper: asyncio.Task[None]) -> None:
        if not keeper.cancelled() and (error := keeper.exception()):
            self._fail(StackError(f"{keeper.get_name()} cannot be run: {error}"))

    async def _wait_ready(self, spec: ProcessSpec) -> None:
        if spec.is_ready is None:
            return
        while not self._stopping.is_set():
            if self.is_running(spec.name) and await asyncio.to_thread(spec.is_ready):
                return
            await self._pause(READY_POLL_SECONDS)
        if self._failure is not None:
            raise self._failure

    async def _stop_process(self, spec: ProcessSpec) -> None:
        child = self._children.get(spec.name)
        if child is None:
            return
        child.ask_to_stop()
        try:
            await asyncio.wait_for(asyncio.shield(child.exit), spec.grace_seconds)
        except TimeoutError:
            self._log.note(f"{spec.name} did not stop within {spec.grace_seconds:g} s: killed")
            child.kill_group()
            await asyncio.shield(child.exit)

    async def _pause(self, seconds: float) -> None:
        """Wait so long, or until a stop is requested."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)

    def _tell_change(self) -> None:
        self._on_change([child.pid for child in self._children.values()])
