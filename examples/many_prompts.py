"""Many prompts through the queue: submit them all, then collect them in order.

    python examples/many_prompts.py [URL] < prompts.txt

Every prompt is a job of its own, so they are batched with each other and with everybody else's, and each
survives a crash of a worker.
"""

from __future__ import annotations

import sys

import httpx

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
MODEL = "throughline-tiny"


def submit(client: httpx.Client, prompt: str) -> str:
    """Return the job's id; once there is one, the job will be run."""
    answer = client.post("/v1/jobs", json={"model": MODEL, "prompt": prompt, "max_tokens": 16})
    answer.raise_for_status()
    return str(answer.json()["id"])


def wait(client: httpx.Client, job_id: str) -> str:
    """Return the completion; the server holds each poll open until the job ends, or 30 s have passed."""
    while True:
        job = client.get(f"/v1/jobs/{job_id}", params={"wait": 30}).raise_for_status().json()
        if job["done"]:
            break
    if job["status"] != "completed":
        raise SystemExit(f"{job_id} ended as {job['status']}: {job['error']}")
    return str(job["result"]["choices"][0]["text"])


def main() -> None:
    prompts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    with httpx.Client(base_url=URL, timeout=60) as client:
        job_ids = [submit(client, prompt) for prompt in prompts]
        for prompt, job_id in zip(prompts, job_ids, strict=True):
            print(f"{prompt}{wait(client, job_id)}")


if __name__ == "__main__":
    main()
