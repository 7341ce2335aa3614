from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from workers.broker.message_lease import HeldMessages


@dataclass
class Message:
    delivery_tag: str
    acknowledged: bool = False
    channel: Any = None


@dataclass
class Request:
    """As Celery's: `acknowledged` says that the acknowledgement was tried, the message's that it arrived."""

    message: Message
    id: str = "job"
    acknowledged: bool = False
    time_start: float | None = 1.0


@dataclass
class Channel:
    """Of a new connection; notes what it was given."""

    appended: list[str] = field(default_factory=list)

    @property
    def qos(self) -> Channel:
        return self

    def append(self, message: Message, tag: str) -> None:
        self.appended.append(tag)


def received(held: HeldMessages, tag: str) -> Request:
    request = Request(Message(tag))
    held._receive(request)
    return request


def test_message_of_a_running_task_is_kept() -> None:
    held = HeldMessages()
    received(held, "a")

    assert held.tags() == ["a"]


def test_acknowledged_message_is_kept_no_longer() -> None:
    held = HeldMessages()
    request = received(held, "a")

    request.acknowledged = request.message.acknowledged = True

    assert held.tags() == []


def test_message_whose_acknowledgement_was_lost_is_left_to_the_visibility_timeout() -> None:
    """Kept for ever it would stay unacknowledged for ever, and hide a lost job from the ledger's count."""
    held = HeldMessages()
    request = received(held, "a")

    request.acknowledged = True

    assert held.tags() == []


def test_acknowledgement_under_way_during_a_cut_finds_its_message_on_the_new_channel() -> None:
    held = HeldMessages()
    request, channel = received(held, "a"), Channel()
    request.acknowledged = True

    held.carry_over(channel)
    held.carry_over(second := Channel())

    assert channel.appended == ["a"]
    assert request.message.channel is channel
    assert second.appended == [], "its one acknowledgement was made or lost by then"
