"""Carry a trace of your own into the queue and find it again: send `traceparent`, read `X-Trace-Id`.

    python examples/traced_request.py [URL]

With an OpenTelemetry SDK the two lines that make the header are its propagator's, as in dummy_client.py.
"""

from __future__ import annotations

import secrets
import sys

import httpx

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"


def main() -> None:
    trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    headers = {"traceparent": f"00-{trace_id}-{span_id}-01"}
    body = {"model": "throughline-tiny", "prompt": "San Francisco is a", "max_tokens": 10}
    answer = httpx.post(f"{URL}/v1/completions", json=body, headers=headers, timeout=60).raise_for_status()
    print(answer.json()["choices"][0]["text"])
    print(f"trace {answer.headers['X-Trace-Id']} (sent: {trace_id})")


if __name__ == "__main__":
    main()
