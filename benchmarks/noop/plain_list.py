"""`python -m benchmarks.noop.plain_list`: pops a list and pushes an answer; keeps no promise."""

from __future__ import annotations

import json

from jobs.redis_connection import connect
from jobs.settings import JobsSettings

QUEUE, ANSWERS = "list:jobs", "list:answer:"

if __name__ == "__main__":
    client = connect(JobsSettings())
    while True:
        popped = client.brpop([QUEUE], timeout=1)
        if popped is not None:
            job = json.loads(popped[1])
            client.lpush(ANSWERS + job["client"], json.dumps({"id": job["id"], "text": " nothing"}))
