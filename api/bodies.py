"""From the bytes of a request to a checked body, or to an error that names field, value and rule."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json

from api.errors import InvalidRequest, MalformedBody, UnsupportedMediaType

Body = TypeVar("Body", bound=BaseModel)


def check_content_type(content_type: str | None) -> None:
    """JSON or unsaid; a form or plain text is refused rather than guessed at."""
    kind = (content_type or "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise UnsupportedMediaType("the body must be JSON: send Content-Type: application/json")


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in the body.

    pydantic's parser is used for what it refuses: invalid UTF-8, lone surrogates, NaN, deep nesting.

    Raises:
        MalformedBody: says where the JSON breaks, never what it holds.
    """
    try:
        document = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise MalformedBody(f"the body is not valid JSON in UTF-8: {error}") from None
    if not isinstance(document, dict):
        raise MalformedBody(f"the body must be a JSON object, not {type(document).__name__}")
    return document


def validate(body_class: type[Body], document: dict[str, Any]) -> Body:
    """Raises InvalidRequest for the first field that breaks its rule."""
    try:
        return body_class.model_validate(document)
    except ValidationError as error:
        raise invalid_request(error.errors(include_url=False, include_context=False)) from None


def invalid_request(faults: Sequence[ErrorDetails | Mapping[str, Any]]) -> InvalidRequest:
    """The first of pydantic's faults in our words.

    Keys of the client's own objects (metadata, logit_bias) are left out of the path: they are its text.
    """
    fault = faults[0]
    field, *below = fault["loc"]
    param = str(field) + "".join(f"[{part}]" for part in below if isinstance(part, int))
    if fault["type"] == "missing":
        return InvalidRequest.missing(param)
    return InvalidRequest(param, fault["input"], _rule(fault["msg"]))


def fingerprint(route: str, document: dict[str, Any]) -> str:
    """Equal for bodies that differ only in spacing or the order of their fields."""
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(route.encode() + b"\n" + canonical).hexdigest()


def _rule(message: str) -> str:
    rule = message.removeprefix("Value error, ")
    for start in ("Input should be ", "Input should have ", "Input should "):
        if rule.startswith(start):
            return f"must {'have' if 'have' in start else 'be'} {rule.removeprefix(start)}"
    return rule[:1].lower() + rule[1:]
