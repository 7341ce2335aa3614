"""`celery -A benchmarks.noop.worker worker`: the product's worker over an engine that computes nothing."""

from __future__ import annotations

import os

from benchmarks.noop.runtime import NoOpRuntime
from benchmarks.noop.spans import trace_as_the_product
from workers.app import create_worker
from workers.service import SERVICE_NAME

trace_as_the_product(SERVICE_NAME)
app = create_worker(lambda *_: NoOpRuntime(float(os.environ.get("BENCH_TOKEN_SECONDS", "0"))))
