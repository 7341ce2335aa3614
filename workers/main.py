"""`celery -A workers.main worker`: an ordinary Celery worker whose tasks share one engine."""

from __future__ import annotations

from workers.app import create_worker

app = create_worker()
