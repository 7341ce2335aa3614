"""The real stack of a drill, and the hand that hurts it.

    clients ──▶ API ──proxy──▶ Valkey (AOF) ◀──proxy each── workers ══▶ engines
                 └───────────── spans ──▶ receiver ◀────────────┘

Every process is the product's own. What is killed is started again a moment later, as a supervisor would.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import redis
from pydantic import SecretStr

from jobs.keys import Keys
from jobs.redis_connection import connect
from jobs.settings import JobsSettings
from telemetry.receiver import Receiver
from tests.chaos.schedule import Fault, Kind
from tests.support.api_process import start_api
from tests.support.processes import children, wait_until
from tests.support.queue_lab import WorkerProcess
from tests.support.tcp_proxy import TcpProxy
from tests.support.valkey import ValkeyServer, free_port, running_valkey

MODEL = "throughline-tiny"
RESTART_SECONDS = 0.5
"""From a death to the next start."""
GRACE_SECONDS = 3.0
STALL_SECONDS = 6.0
START_SECONDS = 45.0
"""What an engine has to load: one that is stopped meanwhile must not hold the drill up for 10 minutes."""
READY_SECONDS = 120.0
POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Strike:
    """A fault as it really struck."""

    fault: Fault
    at: float
    """Unix seconds."""
    victim: str
    """A process by its member's name and the number of its start (of an engine: its worker), `redis`, or
    the member whose network it is."""
    mended_at: float
    """Unix seconds; that of the blow where nothing needs to be mended."""
    pid: int | None = None


@dataclass
class Member:
    """A process that is started again whenever it has ended."""

    name: str
    start: Callable[[int], subprocess.Popen[bytes]]
    """Takes the number of the start, from 0."""
    process: subprocess.Popen[bytes] = field(init=False)
    exit_codes: list[int] = field(default_factory=list)
    num_starts: int = 0
    last_to_leave: int = -1
    """The start that was asked to end, and serves for a last moment."""

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.process = self.start(self.num_starts)
        self.num_starts += 1

    def revive(self) -> None:
        """Note a death and start anew, RESTART_SECONDS later."""
        if (code := self.process.poll()) is not None:
            self.exit_codes.append(code)
            time.sleep(RESTART_SECONDS)
            self.restart()

    @property
    def incarnation(self) -> str:
        """Its name as its log and its spans have it."""
        return f"{self.name}-{self.num_starts - 1}"

    @property
    def is_leaving(self) -> bool:
        return self.process.poll() is not None or self.last_to_leave == self.num_starts - 1


class Rig:
    """One drill's processes. `strike` is called from one thread; its wounds are mended in the background."""

    def __init__(self, folder: Path, server: ValkeyServer, receiver: Receiver, exits: ExitStack) -> None:
        self.server, self.receiver = server, receiver
        self.settings = JobsSettings(redis_url=SecretStr(server.url))
        self.keys = Keys(self.settings.key_prefix)
        self.client: redis.Redis = connect(self.settings)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.strikes: list[Strike] = []
        self.metrics_ports: list[int] = []
        self._folder = folder
        self._exits = exits
        self._wounds: list[tuple[float, Callable[[], None]]] = []
        """(when to mend, by monotonic time; how)"""
        self._is_over = threading.Event()
        self._environment: dict[str, str] = {}
        self.proxies: dict[str, TcpProxy] = {}
        self.api: Member
        self.workers: list[Member] = []

    def begin(self, num_workers: int, *, lease_seconds: float) -> None:
        """Start everything and return when a completion could be answered."""
        self.settings = self.settings.model_copy(update={"lease_seconds": lease_seconds})
        self._environment = {
            "THROUGHLINE_LEASE_SECONDS": str(lease_seconds),
            "THROUGHLINE_SHUTDOWN_GRACE_SECONDS": str(GRACE_SECONDS),
            "THROUGHLINE_ENGINE_STALL_SECONDS": str(STALL_SECONDS),
            "THROUGHLINE_ENGINE_START_SECONDS": str(START_SECONDS),
            "OTEL_SDK_DISABLED": "",
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": self.receiver.grpc_endpoint,
            "OTEL_BSP_SCHEDULE_DELAY": "200",
            # The collector shares the drill's process and may answer late: no span is lost to that.
            "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": "60",
        }
        self.workers = [self._add_worker(number) for number in range(num_workers)]
        self.api = Member("api", self._start_api)
        threading.Thread(target=self._supervise, name="supervisor", daemon=True).start()
        wait_until(self.is_ready, timeout_seconds=READY_SECONDS, what=f"ready; see {self._folder}")

    def end(self) -> None:
        self._is_over.set()
        for member in (self.api, *self.workers):
            if member.process.poll() is None:
                member.process.kill()
            member.process.wait(10)
        self.client.close()

    def strike(self, fault: Fault) -> Strike | None:
        """Do harm; None where the chosen victim was down already."""
        try:
            struck = self._strike(fault)
        except (ProcessLookupError, AssertionError, FileNotFoundError):
            return None  # it ended in the same instant, or its engine was just being replaced
        if struck is not None:
            self.strikes.append(struck)
        return struck

    def mend(self) -> None:
        """Return when every wound has been dressed and all members live."""
        wait_until(lambda: not self._wounds, timeout_seconds=READY_SECONDS, what="all wounds dressed")
        wait_until(self.is_ready, timeout_seconds=READY_SECONDS, what=f"ready again; see {self._folder}")

    def is_ready(self) -> bool:
        """The API answers and each worker's engine is up."""
        if self.api.is_leaving:
            return False
        try:
            with urllib.request.urlopen(f"{self.url}/health/ready", timeout=2) as reply:
                if reply.status != 200:
                    return False
        except OSError:
            return False
        return all(self._is_consuming(worker) for worker in self.workers)

    def logs(self) -> dict[str, str]:
        """What each process that ever ran has said."""
        paths = sorted(self._folder.glob("*.log"))
        return {path.stem: path.read_text(encoding="utf-8", errors="replace") for path in paths}

    def _is_consuming(self, worker: Member) -> bool:
        path = self._folder / f"{worker.incarnation}.log"
        return not worker.is_leaving and "ready." in path.read_text(errors="replace")

    def _supervise(self) -> None:
        """In one thread for the rig's whole life: a leashed process dies with the thread that started it."""
        while not self._is_over.wait(POLL_SECONDS):
            for wound in [wound for wound in self._wounds if wound[0] <= time.monotonic()]:
                with suppress(ProcessLookupError):  # it has been killed meanwhile
                    wound[1]()
                self._wounds.remove(wound)
            for member in (self.api, *self.workers):
                if member.process.poll() is not None and not self._is_over.is_set():
                    member.revive()

    def _add_worker(self, number: int) -> Member:
        name = f"worker-{number}"
        self.metrics_ports.append(free_port())
        return Member(name, lambda start: self._start_worker(name, number, start))

    def _start_worker(self, name: str, number: int, start: int) -> subprocess.Popen[bytes]:
        environment = {
            **self._own_environment(name, start),
            "THROUGHLINE_METRICS_PORT": str(self.metrics_ports[number]),
        }
        log = self._folder / f"{name}-{start}.log"
        return WorkerProcess(f"{name}-{start}", environment, log).process

    def _start_api(self, start: int) -> subprocess.Popen[bytes]:
        environment = self._own_environment("api", start)
        return start_api(environment, self._folder / f"api-{start}.log", port=self.port)

    def _own_environment(self, name: str, start: int) -> dict[str, str]:
        """Each process is a service of its own, so that every span tells who made it."""
        return {
            **self._environment,
            "THROUGHLINE_REDIS_URL": self._proxy(name).url,
            "OTEL_SERVICE_NAME": f"{name}-{start}",
        }

    def _proxy(self, name: str) -> TcpProxy:
        if name not in self.proxies:
            port = urlsplit(self.server.url).port
            assert port is not None
            self.proxies[name] = self._exits.enter_context(TcpProxy(port))
        return self.proxies[name]

    def _strike(self, fault: Fault) -> Strike | None:
        worker = self.workers[fault.target % len(self.workers)]
        match fault.kind:
            case Kind.WORKER_KILL | Kind.WORKER_TERM | Kind.WORKER_PAUSE:
                return self._strike_process(fault, worker, worker.process.pid)
            case Kind.API_KILL | Kind.API_TERM:
                return self._strike_process(fault, self.api, self.api.process.pid)
            case Kind.ENGINE_KILL | Kind.ENGINE_PAUSE:
                return self._strike_process(fault, worker, engine_pid(worker.process.pid))
            case Kind.REDIS_KILL | Kind.REDIS_PAUSE:
                return self._strike_redis(fault)
            case Kind.NET_CUT | Kind.NET_DELAY | Kind.NET_HALF_OPEN:
                return self._strike_network(fault)

    def _strike_process(self, fault: Fault, member: Member, pid: int) -> Strike | None:
        if member.process.poll() is not None:
            return None
        now = time.time()
        match fault.kind:
            case Kind.WORKER_KILL | Kind.API_KILL | Kind.ENGINE_KILL:
                os.kill(pid, signal.SIGKILL)
            case Kind.WORKER_TERM | Kind.API_TERM:
                os.kill(pid, signal.SIGTERM)
                member.last_to_leave = member.num_starts - 1
            case _:  # a stopped engine is its worker's to end
                os.kill(pid, signal.SIGSTOP)
        if fault.kind is Kind.WORKER_PAUSE:
            past_its_lease = self.settings.visibility_timeout_seconds + 3.0
            self._later(past_its_lease, lambda: os.kill(pid, signal.SIGCONT))
            return Strike(fault, now, member.incarnation, now + past_its_lease, pid)
        return Strike(fault, now, member.incarnation, now, pid)

    def _strike_redis(self, fault: Fault) -> Strike | None:
        if not self.server.is_running():
            return None
        if fault.kind is Kind.REDIS_KILL:
            self.server.kill()
            self._later(fault.lasts_seconds, self.server.start)
        else:
            self.server.pause()
            self._later(fault.lasts_seconds, self.server.resume)
        now = time.time()
        return Strike(fault, now, "redis", now + fault.lasts_seconds)

    def _strike_network(self, fault: Fault) -> Strike | None:
        name = sorted(self.proxies)[fault.target % len(self.proxies)]
        proxy = self.proxies[name]
        match fault.kind:
            case Kind.NET_CUT:
                proxy.cut()
            case Kind.NET_DELAY:
                proxy.delay(0.1)
                self._later(fault.lasts_seconds, proxy.heal)
            case _:
                proxy.freeze()
                self._later(fault.lasts_seconds, proxy.heal)
        now = time.time()
        return Strike(fault, now, name, now if fault.kind is Kind.NET_CUT else now + fault.lasts_seconds)

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        self._wounds.append((time.monotonic() + seconds, act))


def engine_pid(worker_pid: int) -> int:
    found = children(worker_pid)
    assert len(found) == 1, found
    return found[0]


@contextmanager
def running_rig(folder: Path, *, num_workers: int, lease_seconds: float, max_spans: int) -> Iterator[Rig]:
    with ExitStack() as exits:
        server = exits.enter_context(running_valkey(tcp=True))
        receiver = exits.enter_context(Receiver(max_spans=max_spans, max_bytes=2 << 30))
        rig = Rig(folder, server, receiver, exits)
        try:
            rig.begin(num_workers, lease_seconds=lease_seconds)
            yield rig
        finally:
            rig.end()
