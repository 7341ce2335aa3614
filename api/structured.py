"""Structured output: the shapes in which clients ask for it, made one, and tried before it is queued."""

from __future__ import annotations

import asyncio
import json
from typing import Literal, TypedDict

import llguidance

from api.errors import InvalidRequest
from api.schemas import CompletionBody, ResponseFormat, StructuredOutputs

INLINE_CHARACTERS = 2000
"""A structure of up to so many characters is compiled on the event loop: a millisecond at most, mostly."""


class Structure(TypedDict):
    """`engine.sampling.StructuredOutput`, as it looks in JSON."""

    kind: Literal["json_schema", "regex", "choice", "grammar"]
    text: str


_ANY_OBJECT = '{"type": "object"}'
_CONTRADICTED_BY = ("use_beam_search", "bad_words", "min_tokens", "ignore_eos")


def structured_output(body: CompletionBody) -> Structure | None:
    """From vLLM's field or OpenAI's; None where neither asks for any.

    Raises:
        InvalidRequest: both ask, or another field would contradict it.
    """
    found = []
    if body.structured_outputs is not None:
        found.append(_from_vllm(body.structured_outputs))
    if body.response_format is not None and body.response_format.type != "text":
        found.append(_from_openai(body.response_format))
    if not found:
        return None
    if len(found) > 1:
        raise InvalidRequest("response_format", "given", "must be left out beside structured_outputs")
    for name in _CONTRADICTED_BY:
        if getattr(body, name):
            raise InvalidRequest(name, getattr(body, name), "cannot be combined with structured output")
    return found[0]


async def check_structure(structure: Structure | None) -> None:
    """Raises InvalidRequest for a schema, expression or grammar that cannot be followed."""
    if structure is None:
        return
    if len(structure["text"]) <= INLINE_CHARACTERS:
        fault = _fault(structure)
    else:
        fault = await asyncio.to_thread(_fault, structure)
    if fault:
        kind = structure["kind"].replace("_", " ")
        raise InvalidRequest("structured_outputs", structure["kind"], f"must hold a valid {kind}: {fault}")


def _fault(structure: Structure) -> str:
    """Empty if there is none. llguidance's message may be a drawing; its last word says what is wrong."""
    try:
        grammar = llguidance.grammar_from(structure["kind"], structure["text"])
    except ValueError as error:
        return str(error)
    lines = llguidance.LLMatcher.validate_grammar(grammar, None).splitlines()
    reasons = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return reasons[0] if reasons else "".join(lines[:1])


def _from_vllm(given: StructuredOutputs) -> Structure:
    if given.schema_ is not None:
        text = given.schema_ if isinstance(given.schema_, str) else json.dumps(given.schema_)
        return {"kind": "json_schema", "text": text}
    if given.choice is not None:
        return {"kind": "choice", "text": json.dumps(given.choice)}
    if given.regex is not None:
        return {"kind": "regex", "text": given.regex}
    if given.grammar is not None:
        return {"kind": "grammar", "text": given.grammar}
    return {"kind": "json_schema", "text": _ANY_OBJECT}


def _from_openai(given: ResponseFormat) -> Structure:
    if given.json_schema is None:
        return {"kind": "json_schema", "text": _ANY_OBJECT}
    return {"kind": "json_schema", "text": json.dumps(given.json_schema.schema_)}
