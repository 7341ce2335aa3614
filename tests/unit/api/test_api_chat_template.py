"""Chat templates against `transformers`, which defines what they mean."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import jinja2
import pytest
import transformers
from tokenizers import Tokenizer, models

from api.chat_template import ChatTemplate
from api.errors import InvalidRequest

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message['content'] is string %}{{ message.content | trim }}{% endif %}
    {{- '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA3 = """{{- bos_token }}
{%- if tools is not none %}
    {{- '<|start_header_id|>system<|end_header_id|>\\n\\nTools:\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- '\\n\\n' }}
    {%- endfor %}
    {{- '<|eot_id|>' }}
{%- endif %}
{%- set ns = namespace(count=0) %}
{%- for message in messages %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
    {%- set header = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' %}
    {{- header }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
    {{ message['content'] | trim }}{{ '<|eot_id|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{{- ns.count }}
{%- for document in documents or [] %}{{ document.title }}: {{ document | tojson }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
MISTRAL = """{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user and assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.first and system_message is defined %}
            {{- ' [INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}
        {%- else %}
            {{- ' [INST] ' + message['content'] + ' [/INST]' }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token }}
    {%- else %}
        {{- raise_exception('Cannot say ' + message['content']) }}
    {%- endif %}
{%- endfor %}"""
THINKING = """{%- for message in messages %}
{{ message.role }}: {% if message.thinking %}<think>{{ message.reasoning_content }}</think>{% endif %}
{%- if message.content is defined %}{{ message.content }}{% else %}nothing{% endif %}
{%- if enable_thinking is defined and enable_thinking %} think{% endif %}
{%- endfor %}"""
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "thinking": THINKING}

TALK = [
    {"role": "system", "content": "Be <b>brief</b> & kind.  "},
    {"role": "user", "content": " Wie heißt die Hauptstadt von Perú?\n"},
    {"role": "assistant", "content": "Lima."},
    {"role": "user", "content": "{{ 7 * 7 }} 你好 \u2028"},
]
REASONED = [
    {"role": "user", "content": None},
    {"role": "assistant", "content": "4", "reasoning": "2 and 2"},
    {"role": "assistant", "content": "5", "thinking": "2 and 3", "name": None},
]
TOOLS = [
    {"type": "function", "function": {"name": "wéather", "parameters": {"type": "object", "b": [1, "<"]}}}
]
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def reference(source: str, messages: list[dict[str, Any]], **names: Any) -> str:
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), **SPECIAL_TOKENS
    )
    tokenizer.chat_template = source
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **names))


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("messages", [TALK, TALK[1:], REASONED], ids=["system", "talk", "reasoned"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_template_renders_what_transformers_does(
    name: str, messages: list[dict[str, Any]], add_generation_prompt: bool
) -> None:
    source = TEMPLATES[name]
    try:
        expected = reference(source, messages, add_generation_prompt=add_generation_prompt)
    except (jinja2.TemplateError, TypeError):
        with pytest.raises(InvalidRequest):
            ChatTemplate(source, SPECIAL_TOKENS).render(messages)
        return

    text = ChatTemplate(source, SPECIAL_TOKENS).render(messages, add_generation_prompt=add_generation_prompt)

    assert text == expected


def test_chat_template_gets_tools_documents_and_options_as_in_transformers() -> None:
    documents = [{"title": "ü", "text": "a < b"}]
    messages = [*TALK, {"role": "skip", "content": "unseen"}]
    expected = reference(LLAMA3, messages, tools=TOOLS, documents=documents)
    expected_thinking = reference(THINKING, TALK, enable_thinking=True)

    assert ChatTemplate(LLAMA3, SPECIAL_TOKENS).render(messages, tools=TOOLS, documents=documents) == expected
    thinking = ChatTemplate(THINKING, SPECIAL_TOKENS).render(TALK, options={"enable_thinking": True})
    assert thinking == expected_thinking
    assert "unseen" not in expected
    assert " think" in thinking


def test_chat_template_tells_the_time_of_its_clock() -> None:
    template = ChatTemplate(
        "{{ strftime_now('%d %b %Y') }}", SPECIAL_TOKENS, clock=lambda: datetime(2026, 11, 22)
    )

    assert template.render(TALK) == "22 Nov 2026"


def test_chat_template_repeats_the_rule_that_the_template_names() -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(MISTRAL, SPECIAL_TOKENS).render([TALK[1], TALK[3]])

    assert caught.value.param == "messages"
    assert "Conversation roles must alternate user and assistant" in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('Cannot say ' + messages[0].content) }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[0].content.nothing.there }}",
        "{{ messages[0][messages[0].content].x }}",
        "{{ messages.append(1) }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ range(100000000) | list }}",
        "{{ 1 / 0 }}",
    ],
)
def test_chat_template_never_tells_what_a_message_says(source: str) -> None:
    messages = [{"role": "user", "content": "a-secret"}]

    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(source, SPECIAL_TOKENS).render(messages)

    assert "messages=" in str(caught.value)
    assert "chat template" in str(caught.value)
    assert "a-secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert messages == [{"role": "user", "content": "a-secret"}]


def test_chat_template_refuses_no_messages_and_no_template() -> None:
    with pytest.raises(InvalidRequest, match="messages"):
        ChatTemplate(CHATML, SPECIAL_TOKENS).render([])
    with pytest.raises(InvalidRequest, match="chat_template"):
        ChatTemplate("{% for message in %}", SPECIAL_TOKENS)
