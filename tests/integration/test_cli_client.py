from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cli.client import ApiClient
from cli.errors import ApiError, ApiUnreachableError
from cli.stack.readiness import readiness
from tests.support.valkey import free_port

Reply = tuple[int, dict[str, str], object]
NO_WORKER: Reply = (
    503,
    {"Retry-After": "0.05"},
    {"error": {"message": "no worker serves the model", "code": "no_worker"}},
)
ACCEPTED: Reply = (202, {}, {"id": "job_1", "status": "queued", "done": False})


class _Handler(BaseHTTPRequestHandler):
    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server = self.server
        assert isinstance(server, ScriptedServer)
        status, headers, body = server.next_reply(self.path)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = _answer

    def log_message(self, format: str, *args: object) -> None:
        return


class ScriptedServer(ThreadingHTTPServer):
    """Answers with the replies in their order, the last one for ever; remembers what was asked."""

    def __init__(self, replies: tuple[Reply, ...]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self._replies = replies
        self.asked: list[str] = []

    def next_reply(self, path: str) -> Reply:
        self.asked.append(path)
        return self._replies[min(len(self.asked), len(self._replies)) - 1]


@contextmanager
def api(*replies: Reply) -> Iterator[tuple[ApiClient, ScriptedServer]]:
    with ScriptedServer(replies) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            with ApiClient(f"http://127.0.0.1:{server.server_port}") as client:
                yield client, server
        finally:
            server.shutdown()
            thread.join()


def soon(seconds: float = 10.0) -> float:
    return time.monotonic() + seconds


def test_client_asks_again_when_the_api_says_that_it_will_pass() -> None:
    with api(NO_WORKER, NO_WORKER, ACCEPTED) as (client, server):
        job = client.patiently(lambda: client.submit({"prompt": "x"}), deadline=soon())

        assert job.id == "job_1"
        assert server.asked == ["/v1/jobs"] * 3


def test_client_gives_up_with_the_apis_reason_when_it_does_not_pass() -> None:
    with api(NO_WORKER) as (client, _), pytest.raises(ApiError, match="HTTP 503: no worker serves") as caught:
        client.patiently(lambda: client.submit({"prompt": "x"}), deadline=soon(0.3))

    assert (caught.value.status, caught.value.code) == (503, "no_worker")


def test_client_does_not_ask_again_when_the_request_is_at_fault() -> None:
    refusal: Reply = (400, {}, {"error": {"message": "max_tokens=-1: must be at least 1", "code": None}})
    with api(refusal) as (client, server):
        with pytest.raises(ApiError, match="HTTP 400: max_tokens=-1"):
            client.patiently(lambda: client.submit({"prompt": "x"}), deadline=soon())

        assert len(server.asked) == 1


def test_client_waits_through_a_restart_of_the_api() -> None:
    done: Reply = (200, {}, {"id": "job_1", "status": "completed", "done": True})
    running: Reply = (200, {}, {"id": "job_1", "status": "in_progress", "done": False})
    with api(running, NO_WORKER, done) as (client, server):
        job = client.wait("job_1", deadline=soon())

        assert job.is_done
        assert len(server.asked) == 3
        assert server.asked[0].startswith("/v1/jobs/job_1?wait=")


def test_client_returns_the_job_as_it_is_when_its_time_is_over() -> None:
    with api((200, {}, {"id": "job_1", "status": "queued", "done": False})) as (client, _):
        assert not client.wait("job_1", deadline=soon(-1)).is_done


def test_client_says_how_to_start_a_stack_when_nothing_listens() -> None:
    with (
        ApiClient(f"http://127.0.0.1:{free_port()}") as client,
        pytest.raises(ApiUnreachableError, match="throughline up"),
    ):
        client.model_names()


@pytest.mark.parametrize("reply", [(502, {}, b"<html>"), (500, {}, {"detail": "x"}), (404, {}, [])])
def test_client_says_what_it_got_when_an_error_is_not_of_the_apis_shape(reply: Reply) -> None:
    with api(reply) as (client, _), pytest.raises(ApiError, match=f"HTTP {reply[0]}: .* from http://"):
        client.model_names()


def test_client_says_so_when_the_answer_is_no_json() -> None:
    with api((200, {}, b"<html>")) as (client, _), pytest.raises(ApiUnreachableError, match="is no JSON"):
        client.model_names()


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ((200, {}, {"status": "ready"}), (True, "ready")),
        ((503, {}, {"reasons": ["no worker is alive"]}), (False, "not ready: no worker is alive")),
        ((502, {}, b"<html>"), (False, "HTTP 502")),
    ],
)
def test_readiness_tells_the_apis_reasons(reply: Reply, said: tuple[bool, str]) -> None:
    with api(reply) as (client, _):
        assert readiness(client.url) == said


def test_readiness_says_that_nothing_answers() -> None:
    assert readiness(f"http://127.0.0.1:{free_port()}") == (False, "no answer: Connection refused")
