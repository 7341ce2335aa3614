"""What the dashboard and the alerts ask for is what the processes show, under the names Prometheus sees."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from opentelemetry.metrics import Observation
from prometheus_client.parser import text_string_to_metric_families

from telemetry import metrics
from telemetry.meter import build_metrics
from telemetry.settings import TelemetrySettings

INFRA = Path(__file__).resolve().parents[3] / "infra"
DASHBOARD = INFRA / "grafana" / "dashboards" / "throughline.json"
PROMETHEUS = yaml.safe_load((INFRA / "prometheus" / "prometheus.yaml").read_text(encoding="utf-8"))
ALERTS = yaml.safe_load((INFRA / "prometheus" / "alerts.yaml").read_text(encoding="utf-8"))

ADDED_BY_PROMETHEUS = {"job", "instance", "le"}
SELECTOR = re.compile(r"\{([^{}]*)\}")
GROUPING = re.compile(r"\bby\s*\(([^)]*)\)")
RANGE = re.compile(r"\[[^\]]*\]|\boffset\s+\w+")
WORD = re.compile(r"\b[a-z_][a-z0-9_]*")
LABEL = re.compile(r"([a-z_][a-z0-9_]*)\s*(?:=~|!~|!=|=)")
PROMQL = {"absent", "histogram_quantile", "increase", "max", "or", "rate", "sum", "unless"}


@cache
def shown_series() -> dict[str, frozenset[str]]:
    """Every sample name that our exporter writes for METRICS, with its labels."""
    own = build_metrics("test", TelemetrySettings(), {})
    for shape in metrics.METRICS:
        attributes = dict.fromkeys((*shape.required, *shape.optional), "x")
        match shape.kind:
            case "counter":
                metrics.counter(own.meter, shape.name).add(1, attributes)
            case "histogram":
                metrics.histogram(own.meter, shape.name).record(1.0, attributes)
            case "gauge":
                metrics.watch(own.meter, shape.name, lambda a=attributes: [Observation(1, a)])
    text = own.render().decode()
    own.shutdown()
    return {
        sample.name: frozenset(sample.labels)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def panels() -> list[dict[str, Any]]:
    board: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return list(board["panels"])


def expressions() -> Iterator[tuple[str, str]]:
    for panel in panels():
        for target in panel.get("targets", ()):
            yield f"panel {panel['title']}", target["expr"]
    for group in ALERTS["groups"]:
        for rule in group["rules"]:
            yield f"alert {rule['alert']}", rule["expr"]


def labels_of(name: str) -> frozenset[str]:
    """Labels of a series; those of the collector come under a prefix of their own."""
    if name == "up":
        return frozenset(ADDED_BY_PROMETHEUS)
    shown = shown_series()
    name = name.removeprefix("otlp_")
    assert name in shown, f"no process shows {name}"
    return shown[name] | ADDED_BY_PROMETHEUS


def series_in(expression: str) -> set[str]:
    """What is left of an expression without its selectors, groupings, times and the language's own words."""
    bare = SELECTOR.sub(" ", GROUPING.sub(" ", RANGE.sub(" ", expression)))
    return set(WORD.findall(bare)) - PROMQL


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_query_asks_for_series_and_labels_that_a_process_shows(where: str, expression: str) -> None:
    series = series_in(expression)
    known = frozenset().union(*(labels_of(name) for name in series))
    selected = {label for selector in SELECTOR.findall(expression) for label in LABEL.findall(selector)}
    grouped = {label.strip() for labels in GROUPING.findall(expression) for label in labels.split(",")}

    assert series, where
    assert selected <= known, f"{where} selects by {selected - known}"
    assert grouped <= known, f"{where} groups by {grouped - known}"


def test_every_metric_of_the_workers_and_queues_is_on_the_dashboard() -> None:
    asked = " ".join(expression for where, expression in expressions() if where.startswith("panel"))
    shown = shown_series()

    for shape in metrics.METRICS:
        stem = shape.name.replace(".", "_")
        assert any(name.startswith(stem) and name in asked for name in shown), f"{shape.name} is on no panel"


def test_jobs_that_queries_name_are_jobs_that_prometheus_scrapes() -> None:
    scraped = {config["job_name"] for config in PROMETHEUS["scrape_configs"]}
    named = {job for _, expression in expressions() for job in re.findall(r'\bjob="([^"]+)"', expression)}

    assert named <= scraped


def test_panels_have_a_title_a_unit_and_a_word_on_how_to_read_them() -> None:
    for panel in panels():
        if panel["type"] == "row":
            continue
        assert panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]


def test_panels_lie_side_by_side_without_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        at = panel["gridPos"]
        cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells


def test_panels_ask_data_sources_that_are_provisioned() -> None:
    path = INFRA / "grafana" / "provisioning" / "datasources" / "datasources.yaml"
    provisioned = {
        source["uid"] for source in yaml.safe_load(path.read_text(encoding="utf-8"))["datasources"]
    }

    asked = {panel["datasource"]["uid"] for panel in panels() if panel["type"] != "row"}

    assert asked <= provisioned


def test_exemplars_are_asked_for_where_only_the_collector_has_them() -> None:
    for panel in panels():
        for target in panel.get("targets", ()):
            assert target.get("exemplar", False) == ("otlp_" in target["expr"]), panel["title"]
