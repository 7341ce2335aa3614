"""kombu's channel with one Redis client, where kombu makes one for every message and acknowledgement.

Making a client costs more than what is sent with it: a sixth of a worker's time in a flood of small jobs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from kombu.transport import redis as kombu_redis

_Channel: Any = kombu_redis.Channel  # untyped


class SharedClientChannel(_Channel):  # type: ignore[misc]  # kombu is untyped
    @contextmanager
    def conn_or_acquire(self, client: Any = None) -> Iterator[Any]:
        yield client or self._shared_client

    @cached_property
    def _shared_client(self) -> Any:
        """Its connections come from the channel's pool, so threads may share it."""
        return self._create_client()


def share_clients() -> None:
    """As `use`, unless this process's channels do so already: a worker has its own."""
    if not issubclass(kombu_redis.Transport.Channel, SharedClientChannel):
        use(SharedClientChannel)


def use(channel_class: type[Any]) -> None:
    """Every connection that this process makes to a Redis broker from now on has such channels."""
    kombu_redis.Transport.Channel = channel_class
    # Sentinel's transport has channels of its own kind, which find the primary; ours come before them.
    own, sentinel = (channel_class,), (kombu_redis.SentinelChannel,)
    name = f"Sentinel{channel_class.__name__}"
    bases = sentinel if issubclass(kombu_redis.SentinelChannel, channel_class) else own + sentinel
    setattr(kombu_redis.SentinelTransport, "Channel", type(name, bases, {}))  # noqa: B010  # typed as one class
