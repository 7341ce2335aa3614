# A worker on the CPU. Build from the repository's root:
#   docker build -f infra/docker/worker.Dockerfile -t throughline-worker .
# TORCH_BACKEND=cu130 (or cu128, …) builds it for a GPU; run that with `--gpus all` and `--device cuda`.
FROM python:3.11-slim AS installed

ARG TORCH_BACKEND=cpu
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=/app PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /app

# uv knows where torch's builds are; where those cannot be reached, pip takes what its own sources have.
COPY pyproject.toml constraints.txt README.md LICENSE ./
# What gets installed is pinned; the installer need not be.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir uv && \
    { UV_HTTP_RETRIES=0 uv pip install --system --no-cache --torch-backend "$TORCH_BACKEND" \
        --constraint constraints.txt '.[worker,cuda]' || \
      pip install --no-cache-dir --constraint constraints.txt '.[worker,cuda]'; } && \
    rm -rf build ./*.egg-info

# The compiler stays behind; what it made of the CPU kernels is copied.
FROM installed AS kernels
# Any g++ of the distribution will do.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY cuda_ops/cpu cuda_ops/cpu
RUN python cuda_ops/cpu/build.py

FROM installed
COPY cli cli
COPY cuda_ops cuda_ops
COPY --from=kernels /app/cuda_ops/cpu/build cuda_ops/cpu/build
COPY engine engine
COPY jobs jobs
COPY telemetry telemetry
COPY workers workers
COPY infra/docker/worker_health.py /usr/local/lib/throughline/worker_health.py

# Models that are downloaded lie in a volume of the user's own.
RUN useradd --create-home --uid 10001 throughline && \
    mkdir -p /home/throughline/.cache/huggingface && chown -R throughline /home/throughline/.cache
# By number, so that a cluster that asks for non-root can see it.
USER 10001

HEALTHCHECK --interval=15s --timeout=10s --start-period=120s --retries=4 \
    CMD ["python", "/usr/local/lib/throughline/worker_health.py"]
ENTRYPOINT ["throughline"]
CMD ["worker"]
