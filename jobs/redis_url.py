"""Where a Redis is, as its URL says it; the one place that reads such a URL.

    redis://[user:password@]host:port/db        rediss://…  the same over TLS        unix:///path?db=0
    sentinel://[user:password@]host:port,host:port/service[/db]?sentinel_password=…

The last names Sentinels, which are asked for the service's primary at each new connection. User and password
are the primary's; `sentinel_username` and `sentinel_password` those of the Sentinels, where they have some.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit, urlunsplit

from redis.connection import parse_url

SCHEMES = ("redis", "rediss", "unix", "sentinel")
SENTINEL_PORT = 26379
_CERTIFICATE_RULES = ("none", "optional", "required")
_SENTINEL_RULE = "must be sentinel://[user:password@]host:port,host:port/service[/db]"
_SENTINEL_OPTIONS = ("sentinel_username", "sentinel_password")


@dataclass(frozen=True, slots=True)
class SentinelService:
    """A primary that Sentinels name."""

    sentinels: tuple[tuple[str, int], ...]
    """Host and port of each."""
    name: str
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    sentinel_username: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)

    @property
    def sentinel_login(self) -> dict[str, Any]:
        """As keyword arguments of a client of the Sentinels."""
        given = {"username": self.sentinel_username, "password": self.sentinel_password}
        return {name: value for name, value in given.items() if value is not None}


def checked(url: str) -> str:
    """The URL itself.

    Raises:
        ValueError: says the rule it breaks, and nothing of the URL, which may hold a password.
    """
    scheme = url.partition("://")[0]
    if scheme not in SCHEMES or "://" not in url:
        raise ValueError(f"must begin with {', '.join(f'{name}://' for name in SCHEMES[:-1])} or sentinel://")
    if scheme == "sentinel":
        sentinel_service(url)
        return url
    try:
        options: dict[str, Any] = parse_url(url)  # type: ignore[no-untyped-call]  # redis-py's
    except ValueError as error:
        raise ValueError(
            "must have a valid host, a port from 1 to 65535 and options that Redis knows"
        ) from error
    if options.get("ssl_cert_reqs", "required") not in _CERTIFICATE_RULES:
        raise ValueError(f"must have {', '.join(_CERTIFICATE_RULES[:-1])} or required as ssl_cert_reqs")
    return url


def sentinel_service(url: str) -> SentinelService | None:
    """What a `sentinel://` URL names; None for any other.

    Raises:
        ValueError: as `checked`.
    """
    parts = urlsplit(url)
    if parts.scheme != "sentinel":
        return None
    login, _, hosts = parts.netloc.rpartition("@")
    username, _, password = login.partition(":")
    name, _, db = parts.path.removeprefix("/").partition("/")
    if not name or not re.fullmatch(r"\d*", db):
        raise ValueError(f"{_SENTINEL_RULE}: it names no service, or a db that is no number")
    options = parse_qs(parts.query)
    if unknown := sorted(set(options) - set(_SENTINEL_OPTIONS)):
        raise ValueError(
            f"must have no options but {' and '.join(_SENTINEL_OPTIONS)}, not {', '.join(unknown)}"
        )
    return SentinelService(
        sentinels=tuple(map(_address, hosts.split(","))),
        name=unquote(name),
        db=int(db or 0),
        username=unquote(username) or None,
        password=unquote(password) or None,
        **{name: values[0] for name, values in options.items()},
    )


def broker_url(url: str) -> str:
    """The same server, spelt as kombu wants it."""
    if (service := sentinel_service(url)) is not None:
        return ";".join(_kombu_sentinel(service, host, port) for host, port in service.sentinels)
    parts = urlsplit(url)
    if parts.scheme == "unix":
        query = parts.query.replace("db=", "virtual_host=") or "virtual_host=0"
        return f"redis+socket://{parts.path}?{query}"
    if parts.scheme == "rediss" and "ssl_cert_reqs" not in parse_qs(parts.query):
        # Left out, redis-py asks for a valid certificate and kombu for none.
        query = "&".join(filter(None, (parts.query, urlencode({"ssl_cert_reqs": "required"}))))
        return urlunsplit(parts._replace(query=query))
    return url


def broker_options(url: str) -> dict[str, Any]:
    """What kombu is told beside the URL, as transport options."""
    service = sentinel_service(url)
    if service is None:
        return {}
    return {"master_name": service.name, "sentinel_kwargs": service.sentinel_login}


def without_password(url: str) -> str:
    """The URL as it may be shown."""
    shown = re.sub(r"(?<=://)([^/@]*?):[^/@]*@", r"\1:***@", url)
    return re.sub(r"(?<=sentinel_password=)[^&]*", "***", shown)


def _address(text: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port or SENTINEL_PORT
    except ValueError as error:  # a port out of range, or an unclosed bracket
        raise ValueError(f"{_SENTINEL_RULE}: one of its ports is none") from error
    if not host:
        raise ValueError(f"{_SENTINEL_RULE}: one of its hosts is empty")
    return host, port


def _kombu_sentinel(service: SentinelService, host: str, port: int) -> str:
    login = ""
    if service.username or service.password:
        login = f"{quote(service.username or '', safe='')}:{quote(service.password or '', safe='')}@"
    shown = f"[{host}]" if ":" in host else host
    return f"sentinel://{login}{shown}:{port}/{service.db}"
