"""The consumer's side of a job's message, over Celery's own strategy, request and event loop."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.app.task import Context
from celery.worker import state
from kombu.asynchronous.hub import Hub
from kombu.transport.virtual import Message
from vine import promise

from workers.coroutine_task import CoroutineTask, own_headers

LOST = (ConnectionError,)


class Broker:
    """A consumer with one message of one task; a pool that only keeps what it is given."""

    def __init__(self) -> None:
        self.app = Celery("test", broker="memory://", set_as_current=False)
        self.hub = Hub()
        self.acknowledged_in: list[int] = []
        self.lost: list[Exception] = []
        self.requests: list[Any] = []
        self.channel = SimpleNamespace(
            no_ack_consumers=None,
            basic_ack=self._acknowledge,
            decode_body=lambda body, encoding: body,
        )

        @self.app.task(name="wait", base=CoroutineTask, bind=True, shared=False, acks_late=True)
        def wait(task: Any, number: int) -> None:
            raise NotImplementedError

        self.task = wait
        consumer = SimpleNamespace(
            hostname="w@host",
            connection_errors=LOST,
            event_dispatcher=None,
            timer=SimpleNamespace(call_at=None),
            apply_eta_task=None,
            disable_rate_limits=True,
            task_buckets={},
            on_task_request=self.requests.append,
            _limit_task=None,
            _limit_post_eta=None,
            pool=SimpleNamespace(apply_async=None),
            controller=SimpleNamespace(state=state),
        )
        self.handle = wait.start_strategy(self.app, consumer)

    def deliver(self, id: str) -> Any:
        """Celery's request for a message, and the promise by which the event loop would acknowledge."""
        headers = {"id": id, "task": "wait", "lang": "py", "argsrepr": "(1,)", "kwargsrepr": "{}"}
        payload = {
            "body": "[[1], {}, {}]",
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": headers | {"traceparent": "00-1-2-01"},
            "properties": {"delivery_tag": id, "delivery_info": {"exchange": "", "routing_key": "q"}},
        }
        message = Message(payload, channel=self.channel)  # type: ignore[no-untyped-call]  # kombu's
        ack = promise(self.hub.call_soon, (message.ack_log_error,))
        self.handle(message, None, ack, promise(), [])
        return self.requests[-1], ack

    def _acknowledge(self, tag: str, multiple: bool = False) -> None:
        if self.lost:
            raise self.lost.pop()
        self.acknowledged_in.append(threading.get_ident())

    def turn_loop(self) -> None:
        for callback in self.hub._pop_ready():
            callback()


@pytest.fixture
def broker() -> Iterator[Broker]:
    yield Broker()
    state.reset_state()


def test_message_is_acknowledged_at_once_when_the_loops_own_thread_asks(broker: Broker) -> None:
    request, _ = broker.deliver("job")

    request.acknowledge()

    assert broker.acknowledged_in == [threading.get_ident()]
    assert request.message.acknowledged


def test_message_is_acknowledged_by_the_loop_when_another_thread_asks(broker: Broker) -> None:
    request, _ = broker.deliver("job")
    other = threading.Thread(target=request.acknowledge)

    other.start()
    other.join()

    assert broker.acknowledged_in == []
    broker.turn_loop()
    assert broker.acknowledged_in == [threading.get_ident()]


def test_lost_connection_shows_in_the_loop_when_a_message_is_acknowledged(broker: Broker) -> None:
    request, _ = broker.deliver("job")
    broker.lost = [BrokenPipeError(), BrokenPipeError()]

    request.acknowledge()

    assert request.acknowledged, "as Celery has it: the message is carried over, and redelivered"
    with pytest.raises(BrokenPipeError):
        broker.turn_loop()


def test_listener_hears_of_the_acknowledgement_when_celery_mends_its_window(broker: Broker) -> None:
    request, ack = broker.deliver("job")
    heard: list[Any] = []
    ack.then(heard.append)

    request.acknowledge()
    broker.turn_loop()

    assert len(heard) == len(broker.acknowledged_in) == 1


def test_revoked_message_is_dropped_and_acknowledged(broker: Broker) -> None:
    state.revoked.add("job")

    with pytest.raises(IndexError):
        broker.deliver("job")

    assert len(broker.acknowledged_in) == 1


@pytest.mark.parametrize(
    "more", [{}, {"traceparent": "00-1-2-01", "x": 1}, {"headers": {"given": 1}, "x": 1}], ids=str
)
def test_headers_of_a_request_are_those_that_celery_finds(more: dict[str, Any]) -> None:
    fields = {"id": "job", "task": "wait", "lang": "py", "args": [], "eta": None, "hostname": "w", **more}

    assert own_headers(fields) == Context(fields, called_directly=False, is_eager=False).headers
