"""compose.yaml and the files it mounts agree with each other and with the settings of the processes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from api.settings import ApiSettings
from jobs.settings import JobsSettings
from telemetry import names
from workers.settings import WorkerSettings

ROOT = Path(__file__).resolve().parents[3]
INFRA = ROOT / "infra"
BUILT_FROM = {"api": "api", "flower": "api", "worker": "worker", "worker-gpu": "worker"}
WITHOUT_SHELL = {"otel-collector"}
READ_ELSEWHERE = {"THROUGHLINE_TRACE_LINKS_ONLY"}  # telemetry/settings.py


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


COMPOSE = read("compose.yaml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
COLLECTOR = read("infra/otel-collector/config.yaml")
OVERLAY = read("infra/otel-collector/tail-sampling.yaml")
SCRAPES = {one["job_name"]: one for one in read("infra/prometheus/prometheus.yaml")["scrape_configs"]}


def by_default(text: str) -> str:
    """As compose fills a text in where nothing is set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def environment(service: str) -> dict[str, str]:
    return {key: by_default(str(value)) for key, value in SERVICES[service].get("environment", {}).items()}


def dockerfile(service: str) -> str:
    return (INFRA / "docker" / f"{BUILT_FROM[service]}.Dockerfile").read_text(encoding="utf-8")


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def test_published_ports_are_on_loopback_only_and_are_those_of_the_readme() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", ())]

    assert all(port.startswith("127.0.0.1:") for port in published)
    assert {port_of(port.rpartition(":")[0]) for port in published} == {
        8000, 3000, 16686, 5555, 9090, 4317, 4318,
    }  # fmt: skip


@pytest.mark.parametrize("service", SERVICES)
def test_image_that_is_not_built_here_has_a_tag_that_does_not_move(service: str) -> None:
    image = SERVICES[service]["image"]

    assert service in BUILT_FROM or re.fullmatch(r"[\w./-]+:v?\d[\w.-]*", image)


@pytest.mark.parametrize("service", sorted(BUILT_FROM))
def test_image_that_is_built_here_runs_as_a_numbered_user(service: str) -> None:
    users = re.findall(r"^USER (.+)$", dockerfile(service), re.MULTILINE)

    assert users
    assert int(users[-1]) > 0


@pytest.mark.parametrize("service", SERVICES)
def test_service_has_a_health_check_unless_its_image_can_run_none(service: str) -> None:
    is_checked = "healthcheck" in SERVICES[service]
    if service in BUILT_FROM:
        is_checked |= "HEALTHCHECK" in dockerfile(service)

    assert is_checked is (service not in WITHOUT_SHELL)


@pytest.mark.parametrize("service", SERVICES)
def test_service_waits_for_nothing_but_redis(service: str) -> None:
    assert set(SERVICES[service].get("depends_on", {})) <= {"redis"}


def test_password_is_one_everywhere_when_nothing_is_set() -> None:
    password = environment("redis")["REDISCLI_AUTH"]

    assert password
    for service in BUILT_FROM:
        assert environment(service)["THROUGHLINE_REDIS_URL"] == f"redis://:{password}@redis:6379/0"


def test_password_is_no_argument_of_redis() -> None:
    command = " ".join(SERVICES["redis"]["command"])

    assert "--requirepass" not in command
    assert "$$REDISCLI_AUTH" in command, "expanded in the container, not by compose"


@pytest.mark.parametrize("service", ["api", "worker", "worker-gpu"])
def test_settings_of_a_service_are_settings_that_its_process_reads(service: str) -> None:
    classes = (JobsSettings, ApiSettings if service == "api" else WorkerSettings)
    known = {f"THROUGHLINE_{field}".upper() for one in classes for field in one.model_fields}
    set_here = {name for name in environment(service) if name.startswith("THROUGHLINE_")}
    if service == "api":
        known.add("THROUGHLINE_MODEL")  # shared with the workers, harmless here

    assert set_here <= known | READ_ELSEWHERE


def test_workers_of_every_kind_answer_to_the_name_and_port_that_prometheus_looks_up() -> None:
    (lookup,) = SCRAPES["throughline-worker"]["dns_sd_configs"]

    for service in ("worker", "worker-gpu"):
        (name,) = lookup["names"]
        assert name in SERVICES[service]["networks"]["default"]["aliases"]
        assert int(environment(service)["THROUGHLINE_METRICS_PORT"]) == lookup["port"]
        assert environment(service)["THROUGHLINE_METRICS_HOST"] == "0.0.0.0"


def test_gpu_worker_is_asked_for_by_name_and_reserves_a_device() -> None:
    gpu = SERVICES["worker-gpu"]
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]

    assert gpu["profiles"] == ["gpu"]
    assert device["capabilities"] == ["gpu"]
    assert "profiles" not in SERVICES["worker"]


def test_other_targets_are_services_and_ports_that_exist() -> None:
    targets = {
        target
        for scrape in SCRAPES.values()
        for static in scrape.get("static_configs", ())
        for target in static["targets"]
    }
    own = COLLECTOR["service"]["telemetry"]["metrics"]["readers"][0]["pull"]["exporter"]["prometheus"]
    exported = port_of(COLLECTOR["exporters"]["prometheus"]["endpoint"])

    assert targets == {"api:8000", f"otel-collector:{own['port']}", f"otel-collector:{exported}"}


def test_spans_go_to_a_port_of_the_collector_and_from_there_to_jaeger() -> None:
    received = {
        port_of(protocol["endpoint"]) for protocol in COLLECTOR["receivers"]["otlp"]["protocols"].values()
    }
    sent = {
        environment(service)[f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT"]
        for service, signal in (("api", "TRACES"), ("worker", "TRACES"), ("worker", "METRICS"))
    }

    assert sent == {"grpc://otel-collector:4317"}
    assert received == {4317, 4318}
    assert COLLECTOR["exporters"]["otlp_grpc/jaeger"]["endpoint"] == "jaeger:4317"


@pytest.mark.parametrize("overlay", [{}, OVERLAY], ids=["alone", "tail-sampling"])
def test_pipelines_name_parts_that_are_configured_and_limit_memory_first(overlay: dict[str, Any]) -> None:
    configured = COLLECTOR["processors"].keys() | overlay.get("processors", {}).keys()
    overlaid = overlay.get("service", {}).get("pipelines", {})

    for name, pipeline in COLLECTOR["service"]["pipelines"].items():
        merged = pipeline | overlaid.get(name, {})  # as the collector does: maps merge, lists are replaced
        assert set(merged["processors"]) <= configured
        assert merged["processors"][0] == "memory_limiter"
        assert merged["processors"][-1] == "batch"
        assert set(merged["exporters"]) <= COLLECTOR["exporters"].keys()


def test_sampling_policies_ask_for_attributes_that_spans_carry() -> None:
    known = {value for value in vars(names).values() if isinstance(value, str)}
    conditions = [
        condition
        for policy in OVERLAY["processors"]["tail_sampling"]["policies"]
        for condition in policy.get("ottl_condition", {}).get("span", ())
    ]
    asked = {key for condition in conditions for key in re.findall(r'attributes\["([^"]+)"\]', condition)}

    assert asked
    assert asked <= known


def test_mounted_files_exist() -> None:
    mounted = [
        volume.partition(":")[0]
        for service in SERVICES.values()
        for volume in service.get("volumes", ())
        if volume.startswith(".")
    ]

    assert mounted
    assert all((ROOT / path).exists() for path in mounted)


def test_links_of_traces_lead_to_the_published_jaeger() -> None:
    pages = {environment("api")["THROUGHLINE_TRACE_URL_TEMPLATE"].partition("/trace/")[0]}
    sources = read("infra/grafana/provisioning/datasources/datasources.yaml")["datasources"]
    for source in sources:
        for link in source.get("jsonData", {}).get("exemplarTraceIdDestinations", ()):
            pages |= {link["url"].partition("/trace/")[0]} if "url" in link else set()

    assert pages == {"http://127.0.0.1:16686"}
