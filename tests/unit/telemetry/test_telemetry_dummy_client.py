from __future__ import annotations

import hashlib
from pathlib import Path

CLIENT = Path(__file__).parents[3] / "examples" / "dummy_client.py"


def test_dummy_client_is_the_published_one_byte_for_byte() -> None:
    """vLLM's page on OpenTelemetry gives this script; that it runs unchanged against us is a promise."""
    digest = hashlib.sha256(CLIENT.read_bytes()).hexdigest()

    assert digest == "63ddc5ec5e336365e321fe3806dad3f8d531b53d9336b10960bba6f53cfdd5ab"
