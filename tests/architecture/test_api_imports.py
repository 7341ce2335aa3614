"""The API serves every model and loads none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_api_loads_no_torch_and_no_other_side_of_the_queue() -> None:
    script = "import api.app, sys; print(*{name.partition('.')[0] for name in sys.modules})"

    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )

    loaded = set(done.stdout.split())
    assert "api" in loaded
    assert not loaded & {"torch", "transformers", "engine", "workers", "cuda_ops", "cli"}
