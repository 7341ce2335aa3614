from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.errors import StackError
from cli.stack.policy import RestartPolicy
from cli.stack.process import Child
from cli.stack.supervisor import Stage, Supervisor
from tests.support import stand_in_stack
from tests.support.processes import kill_all_with, running_with, wait_until
from tests.support.stand_in_stack import BROKEN_MODEL, DEAF, POLITE, SERVE, program, stand_ins

ROOT = Path(__file__).resolve().parents[2]


class ListLog:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, source: str, text: str) -> None:
        self.lines.append(f"{source}: {text}")

    def note(self, text: str) -> None:
        self.line("up", text)

    def count(self, text: str) -> int:
        return sum(text in line for line in self.lines)


class StackProcess:
    """The stand-in stack in a process of its own; `mark` is in the environment of all it starts."""

    def __init__(self, folder: Path) -> None:
        self.mark = f"STACK_MARK={uuid.uuid4()}"
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "STACK_MARK": self.mark.partition("=")[2]}
        self._log = folder / "stack.log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, stand_in_stack.__file__, str(folder / "state")],
                env=environ,
                stdout=log,
                stderr=log,
            )

    def log(self) -> str:
        return self._log.read_text()

    def wait_for_log(self, text: str, times: int = 1) -> None:
        wait_until(lambda: self.log().count(text) >= times, timeout_seconds=8, what=f"{text!r} in the log")

    def wait_until_serving(self) -> None:
        self.wait_for_log("serving", times=3)

    def left(self) -> list[int]:
        return running_with(self.mark)

    def wait_until_nothing_is_left(self) -> None:
        wait_until(lambda: self.left() == [], timeout_seconds=5, what=f"no process left: {self.left()}")


def pid_of(program_name: str, pids: list[int]) -> int:
    return next(pid for pid in pids if program_name in Path(f"/proc/{pid}/cmdline").read_text())


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[StackProcess]:
    started = StackProcess(tmp_path)
    yield started
    kill_all_with(started.mark)
    started.process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_stack_stops_in_order_and_leaves_nothing_when_signalled(
    stack: StackProcess, number: signal.Signals
) -> None:
    stack.wait_until_serving()

    stack.process.send_signal(number)

    assert stack.process.wait(15) == 0
    assert stack.left() == []
    log = stack.log()
    assert log.index("api      │ bye") < log.index("worker-1 │ bye") < log.index("redis    │ bye")


def test_stack_leaves_nothing_when_a_child_was_killed_before_the_stop(stack: StackProcess) -> None:
    stack.wait_until_serving()

    os.kill(pid_of("subprocess.Popen", stack.left()), signal.SIGKILL)
    stack.process.send_signal(signal.SIGTERM)

    assert stack.process.wait(15) == 0
    assert stack.left() == []


def test_stack_leaves_nothing_when_the_supervisor_itself_is_killed(stack: StackProcess) -> None:
    stack.wait_until_serving()

    stack.process.kill()

    stack.process.wait()
    stack.wait_until_nothing_is_left()


def test_children_are_gone_when_the_supervisor_and_its_watchman_are_killed(stack: StackProcess) -> None:
    stack.wait_until_serving()
    children = {pid for pid in stack.left() if os.getpgid(pid) == pid}

    os.kill(pid_of("watchman.py", stack.left()), signal.SIGKILL)
    stack.process.kill()

    stack.process.wait()
    wait_until(lambda: not children & set(stack.left()), timeout_seconds=5, what="leash pulled")


def test_second_stack_is_refused_when_the_state_folder_is_held(stack: StackProcess, tmp_path: Path) -> None:
    stack.wait_until_serving()

    second = subprocess.run(
        [sys.executable, stand_in_stack.__file__, str(tmp_path / "state")],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=20,
    )  # fmt: skip

    assert second.returncode == 1
    assert f"a stack runs here already (pid {stack.process.pid}, http://127.0.0.1:1)" in second.stderr


def test_state_folder_can_be_held_again_when_its_holder_was_killed(
    stack: StackProcess, tmp_path: Path
) -> None:
    stack.wait_until_serving()
    stack.process.kill()
    stack.process.wait()

    second = StackProcess(tmp_path)

    second.wait_until_serving()
    second.process.terminate()
    assert second.process.wait(15) == 0
    second.wait_until_nothing_is_left()


async def run_until(supervisor: Supervisor, condition: str, log: ListLog, times: int = 1) -> None:
    async with asyncio.timeout(10):
        while log.count(condition) < times:
            await asyncio.sleep(0.01)


async def test_supervisor_starts_a_process_again_and_says_why_when_it_was_killed() -> None:
    log, pids = ListLog(), [[]]
    supervisor = Supervisor((Stage((program("worker-1", SERVE),)),), log, lambda now: pids.append(list(now)))
    await supervisor.start()
    await run_until(supervisor, "worker-1: serving", log)

    os.kill(pids[-1][0], signal.SIGKILL)

    await run_until(supervisor, "worker-1: serving", log, times=2)
    await supervisor.stop()
    assert log.count("with signal 9 (SIGKILL); starting it again in 0.05 s") == 1
    assert pids[-1] == []


async def test_supervisor_leaves_a_worker_down_and_the_rest_up_when_its_model_is_broken() -> None:
    log = ListLog()
    policy = RestartPolicy(first_delay_seconds=0.01, final_codes={3: "the model cannot be loaded"})
    worker = program("worker-1", BROKEN_MODEL, is_vital=False, policy=policy)
    supervisor = Supervisor((Stage((worker,)), Stage((program("api", POLITE),))), log)
    await supervisor.start()
    await run_until(supervisor, "is not started again: the model cannot be loaded", log)
    await run_until(supervisor, "api: serving", log)

    assert log.count("worker-1: model: config.json is missing") == 1
    assert supervisor.is_running("api")
    assert not supervisor.is_stopping
    await supervisor.stop()


async def test_supervisor_ends_the_stack_when_a_vital_process_keeps_failing() -> None:
    policy = RestartPolicy(first_delay_seconds=0.01, max_quick_failures=3)
    api = program("api", "import sys; sys.exit(7)", policy=policy)
    log = ListLog()
    supervisor = Supervisor((Stage((program("worker-1", SERVE),)), Stage((api,))), log)
    await supervisor.start()

    with pytest.raises(
        StackError, match="api ended with exit code 7 and is not started again: it ended 3 times"
    ):
        await asyncio.wait_for(supervisor.wait(), 10)

    await supervisor.stop()
    assert not supervisor.is_running("worker-1")


async def test_supervisor_waits_for_a_stage_to_be_ready_before_it_starts_the_next() -> None:
    log, answers = ListLog(), iter([False, False, True])
    redis = program("redis", SERVE, is_ready=lambda: log.lines.append("asked") or next(answers))
    supervisor = Supervisor((Stage((redis,)), Stage((program("api", SERVE),))), log)

    await supervisor.start()
    await run_until(supervisor, "api: serving", log)

    await supervisor.stop()
    assert log.count("asked") == 3
    assert log.lines.index("api: serving") > max(i for i, line in enumerate(log.lines) if line == "asked")


async def test_supervisor_kills_a_process_when_its_grace_is_over() -> None:
    log = ListLog()
    supervisor = Supervisor((Stage((program("worker-1", DEAF, grace_seconds=0.1),)),), log)
    await supervisor.start()
    await run_until(supervisor, "worker-1: serving", log)

    await asyncio.wait_for(supervisor.stop(), 5)

    assert log.count("worker-1 did not stop within 0.1 s: killed") == 1


async def test_supervisor_kills_everything_when_asked_twice() -> None:
    log = ListLog()
    supervisor = Supervisor((Stage((program("worker-1", DEAF, grace_seconds=600),)),), log)
    await supervisor.start()
    await run_until(supervisor, "worker-1: serving", log)

    supervisor.request_stop()
    stopping = asyncio.create_task(supervisor.stop())
    await asyncio.sleep(0)
    supervisor.request_stop()

    await asyncio.wait_for(stopping, 5)
    assert supervisor.was_forced


async def test_supervisor_stops_at_once_when_asked_while_it_starts() -> None:
    supervisor = Supervisor((Stage((program("redis", SERVE, is_ready=lambda: False),)),), ListLog())
    starting = asyncio.create_task(supervisor.start())
    await asyncio.sleep(0)

    supervisor.request_stop()

    await asyncio.wait_for(starting, 5)
    await asyncio.wait_for(supervisor.stop(), 5)
    assert not supervisor.is_running("redis")


async def test_supervisor_stops_the_stand_in_stack_with_its_deaf_grandchild() -> None:
    log = ListLog()
    supervisor = Supervisor(stand_ins(), log)
    await supervisor.start()
    await run_until(supervisor, "serving", log, times=3)

    await asyncio.wait_for(supervisor.stop(), 10)

    assert log.count("bye") == 3


async def output_of(code: str) -> list[str]:
    lines: list[str] = []
    child = Child(program("program", code), lines.append)
    await asyncio.wait_for(child.ended(), 10)
    return lines


async def test_child_passes_on_each_line_the_last_unfinished_one_included() -> None:
    code = "import sys; sys.stdout.write('one\\n\\ntwo\\n'); sys.stdout.flush(); sys.stderr.write('no end')"

    assert await output_of(code) == ["one", "two", "no end"]


async def test_child_cuts_a_line_when_it_never_ends() -> None:
    pieces = await output_of("import sys; sys.stdout.write('x' * 1_000_000)")

    assert sum(map(len, pieces)) == 1_000_000
    assert max(map(len, pieces)) <= 2 * 64 * 1024


async def test_child_shows_bytes_that_are_no_text_and_only_the_last_state_of_a_progress_bar() -> None:
    code = "import sys; sys.stdout.buffer.write(b'\\xff\\n10%\\r50%\\r100%\\r\\n')"

    assert await output_of(code) == ["\ufffd", "100%"]


async def test_child_ends_when_what_it_started_keeps_its_output_open() -> None:
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'])"

    assert await output_of(code) == []
