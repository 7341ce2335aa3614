# The HTTP process, and Flower: no torch, no model. Build from the repository's root:
#   docker build -f infra/docker/api.Dockerfile -t throughline-api .
FROM python:3.11-slim

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=/app PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /app

# The dependencies alone, so that a change of code does not install them again: without sources beside it,
# the project is its metadata and its console script.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN pip install --no-cache-dir --constraint constraints.txt . && rm -rf build ./*.egg-info

COPY api api
COPY cli cli
COPY jobs jobs
COPY telemetry telemetry

RUN useradd --create-home --uid 10001 throughline
# By number, so that a cluster that asks for non-root can see it.
USER 10001
EXPOSE 8000

HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/live', timeout=3)"]
ENTRYPOINT ["throughline"]
CMD ["api", "--host", "0.0.0.0"]
