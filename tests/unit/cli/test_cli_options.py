from __future__ import annotations

import subprocess
import sys

import pytest
from click.testing import CliRunner

from cli.__main__ import _COMMANDS, _throughline
from cli.commands.submit import _given, _read_prompts

HEAVY = (
    "torch",
    "engine",
    "fastapi",
    "uvicorn",
    "celery",
    "redis",
    "httpx",
    "opentelemetry",
    "rich",
    "asyncio",
)


def refusal(*arguments: str) -> str:
    result = CliRunner().invoke(_throughline, arguments)
    assert result.exit_code == 2
    return result.output


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["up", "--port", "70000"], "'--port': 70000 is not in the range 1<=x<=65535"),
        (["up", "--workers", "0"], "'--workers': 0 is not in the range 1<=x<=64"),
        (["up", "--dtype", "int3"], "'--dtype': 'int3' is not one of 'float32', 'bfloat16'"),
        (["up", "--device", "tpu"], "'--device': 'tpu' must be cpu, cuda, cuda:N or auto"),
        (["up", "--trace-steps", "1.5"], "'--trace-steps': 1.5 is not in the range 0<=x<=1"),
        (["up", "--speculative-tokens", "65"], "'--speculative-tokens': 65 is not in the range 0<=x<=64"),
        (["worker", "--trace-steps", "nan"], "'--trace-steps': nan is not a finite number"),
        (["worker", "--trace-steps", "few"], "'--trace-steps': 'few' is not a valid number"),
        (["worker", "--trace-slow-steps", "0"], "'--trace-slow-steps': 0.0 is not in the range x>0"),
        (["up", "--trace-slow-steps", "inf"], "'--trace-slow-steps': inf is not a finite number"),
        (
            ["up", "--redis-url", "http://x"],
            "'--redis-url': 'http://x' must begin with redis:// or rediss:// or unix:// or sentinel:// "
            "or sentinels://",
        ),
        (["up", "--redis-url", "redis://h:0"], "'redis://h:0' names no host, or no valid port (1-65535)"),
        (["up", "--redis-url", "redis://h:99999"], "names no host, or no valid port"),
        (["up", "--redis-url", "unix://relative"], "names no host, or no valid port"),
        (["up", "--otlp-traces-endpoint", "ftp://x:1"], "'ftp://x:1' must begin with grpc://"),
        (["up", "--served-model-name", "a,b"], "'a,b' must not be empty or hold a comma"),
        (
            ["submit", "x", "--url", "localhost:8000"],
            "'--url': 'localhost:8000' must begin with http:// or https://",
        ),
        (["submit", "x", "--top-p", "0"], "'--top-p': 0.0 is not in the range"),
        (["api", "--trace-url-template", "http://h/trace/1"], "'http://h/trace/1' must hold {trace_id}"),
        (["nonsense"], "No such command 'nonsense'"),
    ],
)
def test_bad_value_is_refused_with_option_value_and_rule(arguments: list[str], rule: str) -> None:
    assert rule in " ".join(refusal(*arguments).split())


@pytest.mark.parametrize("endpoint", ["grpc://h:4317", "http://h:4318/v1/traces", "h:4317", "https://h"])
def test_otlp_endpoint_is_taken_in_each_of_its_spellings(endpoint: str) -> None:
    from cli.options import OTLP_URL

    assert OTLP_URL(endpoint) == endpoint


@pytest.mark.parametrize("name", _COMMANDS)
def test_help_of_each_command_holds_examples(name: str) -> None:
    result = CliRunner().invoke(_throughline, [name, "--help"])

    assert result.exit_code == 0
    examples = result.output.partition("Examples:\n")[2].splitlines()
    assert any(
        line.startswith(("    throughline", "    REDIS_URL", "    cat", "    opentelemetry"))
        for line in examples
    )
    assert f"throughline {name}" in "\n".join(examples)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from click.testing import CliRunner; before = set(sys.modules);"
        "from cli.__main__ import _throughline;"
        "result = CliRunner().invoke(_throughline, ['--help']); assert result.exit_code == 0, result.output;"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )

    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()

    assert set(HEAVY) & set(loaded) == set()
    assert "cli" in loaded


def test_prompts_are_the_lines_that_are_not_blank(tmp_path: object) -> None:
    from io import StringIO

    assert _read_prompts(None, StringIO(" one\r\n\n  \ntwo ")) == [" one", "two "]
    assert _read_prompts("  as it is ", None) == ["  as it is "]


def test_only_what_was_given_is_sent() -> None:
    sampling = {"max_tokens": None, "temperature": 0.0, "seed": 0, "stop": (), "n": 2}

    assert _given(sampling) == {"temperature": 0.0, "seed": 0, "n": 2}


@pytest.mark.parametrize(("arguments", "stdin"), [(["x", "--file", "-"], "y\n"), ([], " \n")])
def test_submit_is_refused_when_the_prompt_is_ambiguous_or_absent(arguments: list[str], stdin: str) -> None:
    result = CliRunner().invoke(_throughline, ["submit", *arguments], input=stdin)

    assert result.exit_code == 2
