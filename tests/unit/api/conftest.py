from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from starlette.types import ASGIApp, Receive, Scope, Send
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from api.app import build_app
from api.services import Backends
from api.settings import ApiSettings
from jobs.clock import SystemClock
from jobs.errors import StoreUnavailable
from jobs.memory_store import MemorySchedule, MemoryStore
from jobs.model import (
    Choice,
    ItemResult,
    JobId,
    JobRequest,
    JobResult,
    NewJob,
    Prompt,
    PromptLogprob,
    PromptLogprobs,
    Usage,
    WorkerId,
    new_lease_token,
)
from jobs.registry import ModelCard
from jobs.states import JobState
from jobs.store import Created, Settlement
from tests.support import job_factory
from tests.support.job_factory import failed

MODEL = "house/bytes"
WORKER = WorkerId("worker-1")


def byte_tokenizer() -> str:
    """One token a byte, ids 0 to 255, as a tokenizer.json."""
    vocabulary = {character: index for index, character in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return str(tokenizer.to_str())


def model_card(**overrides: Any) -> ModelCard:
    own = {"name": MODEL, "aliases": ("bytes",), "max_num_sequences": 32, "max_logprobs": 5}
    return job_factory.model_card(**{**own, **overrides})


def answer(request: JobRequest) -> Settlement:
    """A result for every prompt and choice, made of what the request says."""
    num_choices = int(request.sampling.get("n", 1))
    items = tuple(
        ItemResult(
            choices=tuple(
                Choice(index=index, text=f" answer {index}", finish_reason="length")
                for index in range(num_choices)
            ),
            usage=Usage(prompt_tokens=len(prompt.token_ids), completion_tokens=2 * num_choices),
            prompt_logprobs=_places(prompt) if "prompt_logprobs" in request.sampling else None,
        )
        for prompt in request.prompts
    )
    return Settlement(JobState.COMPLETED, result=JobResult(items=items))


def _places(prompt: Prompt) -> PromptLogprobs:
    """As if each token were the most probable one."""
    places = [
        {token_id: PromptLogprob(logprob=-0.5, rank=1, decoded_token="x")} for token_id in prompt.token_ids
    ]
    return (None, *places[1:])


class Backend(MemoryStore):
    """The memory store with a worker that settles what it is told, and a plug that can be pulled."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.is_away = False
        self.loses_answers = False
        """Of `create`, which then happened all the same."""
        self.settles_at_once: Callable[[JobRequest], Settlement] | None = None
        self.created: list[NewJob] = []

    def _check(self) -> None:
        if self.is_away:
            raise StoreUnavailable("the job store did not answer: ConnectionError")

    async def create(self, job: NewJob, *, max_open: int) -> Created:
        self._check()
        created = await super().create(job, max_open=max_open)
        if not created.replayed:
            self.created.append(job)
            if self.settles_at_once is not None:
                await self.settle_now(job.id, self.settles_at_once)
        if self.loses_answers:
            raise StoreUnavailable("the job store did not answer: ConnectionError")
        return created

    async def get(self, id: JobId, *, with_result: bool = False) -> Any:
        self._check()
        return await super().get(id, with_result=with_result)

    async def cancel(self, id: JobId, *, now: float) -> Any:
        self._check()
        return await super().cancel(id, now=now)

    async def list_models(self, *, now: float) -> Any:
        self._check()
        return await super().list_models(now=now)

    async def ping(self) -> None:
        self._check()

    async def start(self, id: JobId) -> Any:
        """Claim as a worker would; returns the token and the request."""
        token = new_lease_token()
        claim = await self.claim(id, token, WORKER, now=SystemClock().now(), lease_seconds=30)
        return token, claim.request

    async def settle_now(self, id: JobId, outcome: Callable[[JobRequest], Settlement] = answer) -> None:
        token, request = await self.start(id)
        await self.settle(id, token, outcome(request), now=SystemClock().now())


@dataclass
class Api:
    """A running app, its backend and a client of it."""

    client: httpx.AsyncClient
    backend: Backend
    app: Any
    transport: httpx.ASGITransport
    bodies: dict[str, Any] = field(default_factory=lambda: {"model": MODEL, "prompt": "San Francisco is a"})

    async def submit(self, **fields: Any) -> httpx.Response:
        return await self.client.post("/v1/jobs", json={**self.bodies, **fields})

    async def complete(self, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        return await self.client.post("/v1/completions", json={**self.bodies, **fields}, headers=headers)

    @property
    def last(self) -> JobId:
        return self.backend.created[-1].id

    async def state(self, id: JobId) -> JobState:
        job = await MemoryStore.get(self.backend, id)
        assert job is not None
        return JobState(job.state)

    async def published(self) -> JobId:
        """The job whose message comes next, once it has come."""
        await eventually(lambda: bool(self.backend.published))
        return self.backend.published.pop(0)[0]

    async def is_watched(self, id: JobId) -> None:
        """Returns once this API waits for the job."""
        await eventually(lambda: bool(self.backend._records[id].get("watchers")))

    async def has_state(self, id: JobId, state: JobState) -> None:
        """Returns once the job has it."""
        await eventually(lambda: self.backend._records[id]["state"] == state)


async def eventually(condition: Callable[[], bool], *, seconds: float = 5.0) -> None:
    deadline = monotonic() + seconds
    while not condition():
        assert monotonic() < deadline, "the condition was not met in time"
        await asyncio.sleep(0.001)


class InSpan:
    """A server span around each request, as a process with a tracer provider has it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._tracer = TracerProvider(shutdown_on_exit=False).get_tracer("test")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._tracer.start_as_current_span("server"):
            await self._app(scope, receive, send)


@asynccontextmanager
async def running_api(backend: Backend, **settings: Any) -> AsyncIterator[Api]:
    @asynccontextmanager
    async def connect() -> AsyncIterator[Backends]:
        yield Backends(backend, backend, backend, SystemClock(), MemorySchedule(backend))

    app = build_app(ApiSettings(**settings), connect)
    transport = httpx.ASGITransport(InSpan(app))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://api") as client,
    ):
        yield Api(client, backend, app, transport)


@pytest.fixture
def backend() -> Backend:
    backend = Backend()
    backend.announce(model_card(), byte_tokenizer())
    backend.beat(MODEL, WORKER, now=SystemClock().now())
    return backend


@pytest.fixture
async def api(backend: Backend) -> AsyncIterator[Api]:
    async with running_api(backend) as api:
        yield api


@pytest.fixture
def start_api() -> Callable[..., Any]:
    """`async with start_api(backend, **settings) as api`."""
    return running_api


@pytest.fixture
def worker_fails() -> Callable[..., Callable[[JobRequest], Settlement]]:
    return lambda reason, *, retryable: lambda _request: failed(reason, retryable=retryable)


@pytest.fixture
def answers() -> Callable[[JobRequest], Settlement]:
    return answer
