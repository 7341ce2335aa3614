"""Where a Redis is, as its URL says it; the one place that reads such a URL.

    redis://[user:password@]host:port/db        rediss://…  the same over TLS        unix:///path?db=0
    sentinel://[user:password@]host:port,host:port/service[/db]?sentinel_password=…
    sentinels://…?ssl_ca_certs=…  the same over TLS, to the Sentinels and to the primary alike

The last two name Sentinels, which are asked for the service's primary at each new connection. User and
password are the primary's; `sentinel_username` and `sentinel_password` the Sentinels', where they have some.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit, urlunsplit

from redis.connection import parse_url

SENTINEL_SCHEMES = ("sentinel", "sentinels")
SCHEMES = ("redis", "rediss", "unix", *SENTINEL_SCHEMES)
SENTINEL_PORT = 26379
_CERTIFICATE_RULES = ("none", "optional", "required")
_SENTINEL_RULE = "must be sentinel://[user:password@]host:port,host:port/service[/db]"
_SENTINEL_OPTIONS = ("sentinel_username", "sentinel_password")
_TLS_OPTIONS = ("ssl_ca_certs", "ssl_cert_reqs", "ssl_certfile", "ssl_check_hostname", "ssl_keyfile")


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
    tls: Mapping[str, Any] | None = None
    """redis-py's options of a TLS connection, to Sentinels and primary alike; None where there is none."""

    @property
    def sentinel_options(self) -> dict[str, Any]:
        """Login and TLS, as keyword arguments of a client of the Sentinels."""
        given = {"username": self.sentinel_username, "password": self.sentinel_password}
        return {name: value for name, value in given.items() if value is not None} | self._tls_options

    @property
    def primary_options(self) -> dict[str, Any]:
        """Login, database and TLS, as keyword arguments of a client of the primary."""
        return {"username": self.username, "password": self.password, "db": self.db} | self._tls_options

    @property
    def _tls_options(self) -> dict[str, Any]:
        return {} if self.tls is None else {"ssl": True, **self.tls}


def checked(url: str) -> str:
    """The URL itself.

    Raises:
        ValueError: says the rule it breaks, and nothing of the URL, which may hold a password.
    """
    scheme = url.partition("://")[0]
    if scheme not in SCHEMES or "://" not in url:
        raise ValueError(
            f"must begin with {', '.join(f'{name}://' for name in SCHEMES[:-1])} or {SCHEMES[-1]}://"
        )
    if sentinel_service(url) is None:
        _redis_options(url)
    return url


def _redis_options(url: str) -> dict[str, Any]:
    """As redis-py reads them. Raises ValueError as `checked`."""
    try:
        options: dict[str, Any] = parse_url(url)  # type: ignore[no-untyped-call]  # redis-py's
    except ValueError as error:
        raise ValueError(
            "must have a valid host, a port from 1 to 65535 and options that Redis knows"
        ) from error
    if options.get("ssl_cert_reqs", "required") not in _CERTIFICATE_RULES:
        raise ValueError(f"must have {', '.join(_CERTIFICATE_RULES[:-1])} or required as ssl_cert_reqs")
    return options


def sentinel_service(url: str) -> SentinelService | None:
    """What a `sentinel://` or `sentinels://` URL names; None for any other.

    Raises:
        ValueError: as `checked`.
    """
    parts = urlsplit(url)
    if parts.scheme not in SENTINEL_SCHEMES:
        return None
    login, _, hosts = parts.netloc.rpartition("@")
    username, _, password = login.partition(":")
    name, _, db = parts.path.removeprefix("/").partition("/")
    if not name or not re.fullmatch(r"\d*", db):
        raise ValueError(f"{_SENTINEL_RULE}: it names no service, or a db that is no number")
    options = {name: values[0] for name, values in parse_qs(parts.query).items()}
    has_tls = parts.scheme == "sentinels"
    known = _SENTINEL_OPTIONS + (_TLS_OPTIONS if has_tls else ())
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"must have no options but {', '.join(known[:-1])} and {known[-1]}, not {', '.join(unknown)}"
        )
    return SentinelService(
        sentinels=tuple(map(_address, hosts.split(","))),
        name=unquote(name),
        db=int(db or 0),
        username=unquote(username) or None,
        password=unquote(password) or None,
        tls=_tls(options) if has_tls else None,
        **{name: value for name, value in options.items() if name in _SENTINEL_OPTIONS},
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
    return {"master_name": service.name, "sentinel_kwargs": service.sentinel_options}


def broker_tls(url: str) -> dict[str, Any] | None:
    """Celery's `broker_use_ssl`, where the URL that kombu is given cannot say it."""
    service = sentinel_service(url)
    return None if service is None or service.tls is None else dict(service.tls)


def without_password(url: str) -> str:
    """The URL as it may be shown."""
    shown = re.sub(r"(?<=://)([^/@]*?):[^/@]*@", r"\1:***@", url)
    return re.sub(r"(?<=sentinel_password=)[^&]*", "***", shown)


def _tls(options: Mapping[str, str]) -> dict[str, Any]:
    """Asks for a valid certificate unless it is told otherwise: left out, kombu asks for none."""
    query = urlencode({name: value for name, value in options.items() if name in _TLS_OPTIONS})
    read = _redis_options(f"rediss://host?{query}")
    return {"ssl_cert_reqs": "required"} | {name: read[name] for name in _TLS_OPTIONS if name in read}


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
