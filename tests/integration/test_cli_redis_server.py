from __future__ import annotations

import pytest
import redis

from cli.errors import RedisUnreachableError
from cli.stack import redis_server
from tests.support.valkey import running_valkey, valkey_server


@pytest.mark.parametrize("tcp", [False, True])
def test_embedded_server_answers_and_evicts_nothing_when_started(tcp: bool) -> None:
    with valkey_server(tcp=tcp) as url, redis.Redis.from_url(url, decode_responses=True) as client:
        assert client.ping()
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        settings = client.config_get("append*")
        assert (settings["appendonly"], settings["appendfsync"]) == ("yes", "everysec")


def test_embedded_server_keeps_what_it_acknowledged_when_killed() -> None:
    with running_valkey() as server:
        with redis.Redis.from_url(server.url) as client:
            client.set("job", "kept")
        server.kill()
        server.start()

        with redis.Redis.from_url(server.url) as client:
            assert client.get("job") == b"kept"


def test_ping_names_the_url_without_its_password_when_the_server_is_gone() -> None:
    with pytest.raises(
        RedisUnreachableError, match=r"redis://me:\*\*\*@127\.0\.0\.1:1/0 does not answer"
    ) as caught:
        redis_server.ping("redis://me:secret@127.0.0.1:1/0")

    assert "secret" not in str(caught.value)


def test_ping_gives_up_when_the_server_hangs() -> None:
    with running_valkey() as server:
        server.pause()
        with pytest.raises(RedisUnreachableError):
            redis_server.ping(server.url, timeout_seconds=0.2)
        server.resume()
        redis_server.ping(server.url)
