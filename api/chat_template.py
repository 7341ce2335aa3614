"""Messages to one prompt, by the Jinja template that a model brings.

The template comes with a model's folder, so it is run in Jinja's sandbox, with the names that `transformers`
gives it; the texts are those of its `apply_chat_template`. What a template says when it refuses is repeated
only where it stands word for word in the template: it may have put a message into it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from api.errors import InvalidRequest

Message = Mapping[str, Any]
"""With `role` and mostly `content`; what else there may be is the template's business. Plain JSON."""

_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A compiled template; safe to use from several threads."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str | Sequence[str]],
        *,
        clock: Callable[[], datetime] = datetime.now,
    ) -> None:
        """`special_tokens` by their names in `tokenizer_config.json`, such as `bos_token`.

        Raises:
            InvalidRequest: the source is no template.
        """
        environment = _make_environment(clock)
        try:
            self._template = environment.from_string(source)
            self._own_words = _texts_in(environment.parse(source))
        except jinja2.TemplateError as error:
            raise InvalidRequest("chat_template", source, "must be a Jinja template") from error
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text, special tokens included: it is to be encoded without adding any.

        Args:
            messages: at least one; a field that is null counts as absent.
            tools: JSON schemas.
            documents: with `title` and `text`.
            add_generation_prompt: end with what opens the assistant's turn.
            options: further names for the template, such as `enable_thinking`.

        Raises:
            InvalidRequest: there is no message, or the template refuses or cannot take these.
        """
        if not messages:
            raise InvalidRequest("messages", messages, "must have at least one message")
        names = {
            **self._special_tokens,
            **(options or {}),
            "messages": [_complete(message) for message in messages],
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(names)
        except _RefusedError as error:
            said = str(error)
            rule = said if said in self._own_words else "must be what the model's chat template takes"
            raise InvalidRequest("messages", messages, rule) from None
        except Exception as error:  # a template is a program of others: it can raise anything
            rule = f"cannot be rendered by the model's chat template ({type(error).__name__})"
            # Without the cause, whose message may hold a piece of a message.
            raise InvalidRequest("messages", messages, rule) from None


class _RefusedError(jinja2.TemplateError):
    """The template called `raise_exception`."""


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is all there is to it."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's own interface

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _make_environment(clock: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: clock().strftime(form)
    return environment


def _refuse(message: object) -> NoReturn:
    raise _RefusedError(str(message))


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _texts_in(tree: nodes.Template) -> frozenset[str]:
    constants = (node.value for node in tree.find_all(nodes.Const))
    return frozenset(value for value in constants if isinstance(value, str))


def _complete(message: Message) -> dict[str, Any]:
    """Without nulls, and a reasoning text under each of the names that templates know."""
    present = {name: value for name, value in message.items() if value is not None}
    for name in _REASONING_NAMES:
        if name in present:
            return {"thinking": present[name], **present, "reasoning_content": present[name]}
    return present
