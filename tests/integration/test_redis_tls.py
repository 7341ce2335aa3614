"""Redis over TLS, with a certificate that nobody but the test vouches for."""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from jobs.errors import StoreUnavailable
from jobs.model import new_job_id
from jobs.queue import CeleryPublisher, create_celery
from jobs.redis_connection import connect, connect_async, store_errors
from jobs.settings import JobsSettings
from jobs.states import JobState
from tests.support.api_process import running_api
from tests.support.model_folders import make_model_folder
from tests.support.processes import wait_until
from tests.support.queue_lab import MODEL, lab_on
from tests.support.sentinel import running_sentinel
from tests.support.tcp_proxy import TcpProxy
from tests.support.valkey import ValkeyServer, running_valkey


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Certificate and key of 127.0.0.1, in one file."""
    key, path = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made_as = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    where = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(path)]
    subprocess.run(["openssl", *made_as.split(), *where], check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + key.read_bytes())
    return path


@pytest.fixture
def server() -> Iterator[ValkeyServer]:
    with running_valkey(tcp=True) as server:
        yield server


@pytest.fixture
def port(server: ValkeyServer, certificate: Path) -> Iterator[int]:
    """Where the server is reached over TLS; the one that tests have does not speak it itself."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    target_port = int(server.url.rpartition(":")[2].partition("/")[0])
    with TcpProxy(target_port, tls=context) as proxy:
        yield proxy.port


@pytest.mark.slow
async def test_job_runs_when_redis_is_reached_over_tls(
    server: ValkeyServer, port: int, certificate: Path, tmp_path: Path
) -> None:
    make_model_folder("llama", tmp_path / "llama")
    url = f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate}"
    with lab_on(server, url, tmp_path / "llama", tmp_path) as lab:
        worker = lab.start_worker()

        job = lab.wait_final([lab.submit()])[0]

        assert job.state is JobState.COMPLETED, worker.log()
        client = connect_async(lab.settings)
        assert await client.call("EXISTS", lab.keys.job(job.id)) == 1
        await client.aclose()


async def test_server_with_a_certificate_that_nobody_vouches_for_is_refused_by_store_and_broker(
    port: int,
) -> None:
    """kombu would take any certificate where the URL asks for none."""
    settings = JobsSettings(redis_url=SecretStr(f"rediss://127.0.0.1:{port}/0"), socket_timeout_seconds=2)
    client, async_client = connect(settings), connect_async(settings)

    with pytest.raises(StoreUnavailable), store_errors():
        client.ping()
    with pytest.raises(StoreUnavailable), store_errors():
        await async_client.call("PING")
    with pytest.raises(StoreUnavailable):
        CeleryPublisher(create_celery(settings)).publish(new_job_id(), "m.batch", enqueued_at_ns=1)

    client.close()
    await async_client.aclose()


@pytest.mark.slow
async def test_job_runs_when_sentinels_and_the_primary_they_name_are_reached_over_tls(
    certificate: Path, tmp_path: Path
) -> None:
    make_model_folder("llama", tmp_path / "llama")
    with (
        running_sentinel(certificate) as cluster,
        lab_on(cluster.primary, cluster.url, tmp_path / "llama", tmp_path) as lab,
    ):
        worker = lab.start_worker()
        with running_api(lab.environment, tmp_path / "api.log") as api:
            wait_until(lambda: api.get("/health/ready").is_success, timeout_seconds=20, what="a worker")
            body = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 3}
            assert api.post("/v1/completions", json=body).status_code == 200, worker.log()


async def test_sentinel_with_a_certificate_that_nobody_vouches_for_is_refused_by_store_and_broker(
    certificate: Path,
) -> None:
    with running_sentinel(certificate) as cluster:
        url = cluster.url.partition("?")[0]
        settings = JobsSettings(redis_url=SecretStr(url), socket_timeout_seconds=2)
        client, async_client = connect(settings), connect_async(settings)

        with pytest.raises(StoreUnavailable), store_errors():
            client.ping()
        with pytest.raises(StoreUnavailable), store_errors():
            await async_client.call("PING")
        with pytest.raises(StoreUnavailable):
            CeleryPublisher(create_celery(settings)).publish(new_job_id(), "m.batch", enqueued_at_ns=1)

        client.close()
        await async_client.aclose()
