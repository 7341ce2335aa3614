"""The native kernels' threads: shared by all callers, gone after a fork, never in the way of a result."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import cuda_ops
from cuda_ops.dense import PackedWeight, pack_weight
from tests.support.kernels import NATIVE_LEVELS, taken_kernels


@pytest.fixture(scope="module", autouse=True, params=NATIVE_LEVELS[-1:])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """One level: the threads are the same for all."""
    yield from taken_kernels(request.param)


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    """More than the machine may have cores, so that some come late."""
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def layer() -> tuple[Tensor, PackedWeight]:
    torch.manual_seed(0)
    return torch.randn(3, 64), pack_weight(torch.randn(4000, 64))


def test_an_op_gives_the_same_on_one_thread_and_on_three(layer: tuple[Tensor, PackedWeight]) -> None:
    together = [cuda_ops.linear(*layer) for _ in range(300)]
    torch.set_num_threads(1)
    alone = cuda_ops.linear(*layer)

    assert all(torch.equal(result, alone) for result in together)


def test_ops_of_several_callers_at_once_do_not_mix(layer: tuple[Tensor, PackedWeight]) -> None:
    x, weight = layer
    inputs = [x + shift for shift in range(4)]
    expected = [cuda_ops.linear(each, weight) for each in inputs]

    def call_often(index: int) -> bool:
        torch.set_num_threads(3)
        return all(torch.equal(cuda_ops.linear(inputs[index], weight), expected[index]) for _ in range(200))

    with ThreadPoolExecutor(4) as callers:
        assert all(callers.map(call_often, range(4)))


def is_awake(task: Path) -> bool:
    try:
        return task.joinpath("stat").read_text().rpartition(")")[2].split()[0] != "S"
    except (FileNotFoundError, ProcessLookupError):
        return False  # it has ended


def wait_until_others_sleep() -> None:
    """Until every thread of this process but the calling one has gone to sleep."""
    own = threading.get_native_id()
    while any(is_awake(task) for task in Path("/proc/self/task").iterdir() if int(task.name) != own):
        os.sched_yield()


def fork_and_check(check: Callable[[], bool]) -> int:
    """What a child made by fork ends with; a child that hangs is killed by an alarm."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)
        os._exit(0 if check() else 1)
    return os.waitpid(child, 0)[1]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are watched in /proc")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_ops_run_in_a_child_made_by_fork_when_the_parents_threads_sleep(
    layer: tuple[Tensor, PackedWeight],
) -> None:
    expected = cuda_ops.linear(*layer)
    wait_until_others_sleep()

    def is_right_after_every_sleep() -> bool:
        for _ in range(5):
            if not torch.equal(cuda_ops.linear(*layer), expected):
                return False
            wait_until_others_sleep()
        return True

    assert fork_and_check(is_right_after_every_sleep) == 0
