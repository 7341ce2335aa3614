from __future__ import annotations

import pytest
from pydantic import SecretStr

from jobs.errors import SettingsError
from jobs.redis_url import (
    SentinelService,
    broker_options,
    broker_tls,
    broker_url,
    checked,
    sentinel_service,
    without_password,
)
from jobs.settings import JobsSettings, read_settings

SENTINELS = "sentinel://us%40r:p%2Fw@one:1001,[::1],two/prime/3?sentinel_username=s&sentinel_password=w%26w"


def test_sentinel_url_names_hosts_service_database_and_both_logins() -> None:
    assert sentinel_service(SENTINELS) == SentinelService(
        sentinels=(("one", 1001), ("::1", 26379), ("two", 26379)),
        name="prime",
        db=3,
        username="us@r",
        password="p/w",
        sentinel_username="s",
        sentinel_password="w&w",
    )


def test_sentinel_url_needs_no_more_than_a_host_and_a_service() -> None:
    service = sentinel_service("sentinel://one/prime")

    assert service == SentinelService((("one", 26379),), "prime")
    assert service.sentinel_options == {}


def test_sentinels_over_tls_ask_for_a_valid_certificate_unless_told_otherwise() -> None:
    service = sentinel_service("sentinels://one/prime?sentinel_password=s&ssl_ca_certs=/ca.pem")
    trusting = sentinel_service("sentinels://one/prime?ssl_cert_reqs=none&ssl_check_hostname=false")

    assert service is not None
    tls = {"ssl_cert_reqs": "required", "ssl_ca_certs": "/ca.pem"}
    assert service.sentinel_options == {"password": "s", "ssl": True, **tls}
    assert service.primary_options == {"username": None, "password": None, "db": 0, "ssl": True, **tls}
    assert trusting is not None
    assert trusting.tls == {"ssl_cert_reqs": "none", "ssl_check_hostname": False}


def test_broker_is_told_of_tls_to_the_sentinels_and_to_the_primary() -> None:
    url = "sentinels://one,two/prime?ssl_ca_certs=/ca.pem"
    tls = {"ssl_cert_reqs": "required", "ssl_ca_certs": "/ca.pem"}

    assert broker_url(url) == "sentinel://one:26379/0;sentinel://two:26379/0"
    assert broker_options(url) == {"master_name": "prime", "sentinel_kwargs": {"ssl": True, **tls}}
    assert broker_tls(url) == tls
    assert broker_tls(SENTINELS) is None
    assert broker_tls("rediss://one/0") is None


def test_passwords_are_in_no_text_of_a_service_or_url() -> None:
    assert "w&w" not in repr(sentinel_service(SENTINELS))
    assert "p/w" not in repr(sentinel_service(SENTINELS))
    shown = without_password(SENTINELS)
    assert (
        shown == "sentinel://us%40r:***@one:1001,[::1],two/prime/3?sentinel_username=s&sentinel_password=***"
    )


def test_broker_is_told_of_every_sentinel_with_the_primarys_login() -> None:
    login = "us%40r:p%2Fw@"
    assert broker_url(SENTINELS).split(";") == [
        f"sentinel://{login}one:1001/3",
        f"sentinel://{login}[::1]:26379/3",
        f"sentinel://{login}two:26379/3",
    ]
    assert broker_options(SENTINELS) == {
        "master_name": "prime",
        "sentinel_kwargs": {"username": "s", "password": "w&w"},
    }


@pytest.mark.parametrize(
    ("url", "spelt"),
    [
        ("redis://h:1/2", "redis://h:1/2"),
        ("unix:///a/b.sock?db=2", "redis+socket:///a/b.sock?virtual_host=2"),
        ("unix:///a/b.sock", "redis+socket:///a/b.sock?virtual_host=0"),
        ("rediss://h/0", "rediss://h/0?ssl_cert_reqs=required"),
        ("rediss://h/0?ssl_ca_certs=/c", "rediss://h/0?ssl_ca_certs=/c&ssl_cert_reqs=required"),
        ("rediss://h/0?ssl_cert_reqs=none", "rediss://h/0?ssl_cert_reqs=none"),
    ],
)
def test_broker_gets_the_same_server_in_kombus_words_and_checks_certificates(url: str, spelt: str) -> None:
    assert broker_url(url) == spelt
    assert broker_options(url) == {}


@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("http://h", "must begin with redis://, rediss://, unix://, sentinel:// or sentinels://"),
        ("h:6379", "must begin with"),
        ("redis://h:99999/0", "a port from 1 to 65535"),
        ("rediss://h/0?ssl_cert_reqs=never", "none, optional or required as ssl_cert_reqs"),
        ("sentinel://h:26379", "names no service"),
        ("sentinel://h/prime/x", "a db that is no number"),
        ("sentinel://h:0x1/prime", "one of its ports is none"),
        ("sentinel://a,,b/prime", "one of its hosts is empty"),
        ("sentinels://h/prime?ssl_cert_reqs=never", "none, optional or required as ssl_cert_reqs"),
        ("sentinel://h/prime?ssl_ca_certs=/ca.pem", "no options but sentinel_username and"),
        ("sentinel://h/prime?master=x", "no options but sentinel_username and sentinel_password, not master"),
    ],
)
def test_url_is_refused_with_its_rule(url: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        checked(url)


def test_refused_url_is_named_by_its_variable_and_not_shown() -> None:
    with pytest.raises(SettingsError, match=r"_URL=\(hidden\): must be sentinel://") as refused:
        read_settings(JobsSettings, redis_url=SecretStr("sentinel://:secret@h"))

    assert "secret" not in str(refused.value)
