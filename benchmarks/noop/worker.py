"""`celery -A benchmarks.noop.worker worker`: the product's worker over an engine that computes nothing."""

from __future__ import annotations

import os

from benchmarks.noop.runtime import NoOpRuntime
from benchmarks.noop.spans import trace_into_nothing
from workers.app import create_worker

trace_into_nothing()
app = create_worker(lambda *_: NoOpRuntime(float(os.environ.get("BENCH_TOKEN_SECONDS", "0"))))
