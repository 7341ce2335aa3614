from __future__ import annotations

import re
from pathlib import Path

import pytest

from telemetry import names

TABLES = Path(names.__file__).with_name("SPANS.md")


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its two head lines."""
    section = TABLES.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def keys(cell: str) -> tuple[str, ...]:
    return tuple(re.findall(r"`([^`]+)`", cell))


def test_page_lists_the_spans_that_the_code_names() -> None:
    told = [
        names.SpanShape(keys(name)[0], tuple(kinds.split(", ")), made_by, keys(always), keys(sometimes))  # type: ignore[arg-type]  # read from text
        for name, kinds, made_by, always, sometimes in rows("Spans")
    ]

    assert tuple(told) == names.SPANS


def test_page_lists_the_attributes_that_the_code_names() -> None:
    told = {
        names.Attribute(key, value_type, names.Source(source))  # type: ignore[arg-type]  # read from text
        for source, value_type, listed in rows("Attributes")
        for key in keys(listed)
    }

    assert told == set(names.ATTRIBUTES)


def test_every_attribute_of_a_span_has_a_type_and_every_typed_one_a_use() -> None:
    used = {key for shape in names.SPANS for key in (*shape.required, *shape.optional)} | {names.LINK_ROLE}
    typed = [attribute.key for attribute in names.ATTRIBUTES]

    assert used == set(typed)
    assert len(typed) == len(set(typed))


def test_keys_of_our_own_stay_out_of_foreign_namespaces() -> None:
    own = [attribute.key for attribute in names.ATTRIBUTES if attribute.source is names.Source.OWN]

    assert all(key.startswith(("job.", "throughline.")) for key in own)


@pytest.mark.parametrize(
    ("name", "kind", "shape"),
    [
        ("POST /v1/completions", "SERVER", "<method> <route>"),
        ("send models.tiny", "PRODUCER", "send <queue>"),
        ("send models.tiny", "CLIENT", "send <queue>"),
        ("queue models.tiny", "INTERNAL", "queue <queue>"),
        ("text_completion facebook/opt-125m", "INTERNAL", "text_completion <model>"),
        ("engine.decode", "INTERNAL", "engine.decode"),
        ("send models.tiny", "CONSUMER", None),
        ("run/throughline.generate", "CONSUMER", None),
        ("engine.decoded", "INTERNAL", None),
    ],
)
def test_shape_is_found_by_name_and_kind(name: str, kind: str, shape: str | None) -> None:
    found = names.shape_of(name, kind)

    assert (found.name if found else None) == shape
