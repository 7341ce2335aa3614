"""The stack's own trace viewer: a receiver in the supervisor's process, and the note that says where it is.

api, worker ──OTLP──▶ Receiver ◀──HTTP── throughline trace
                         └─ its address: trace_viewer.json in the state folder, while it listens
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from cli.errors import TraceViewerError
from cli.stack.state import VIEWER_FILE, StateFolder

# A span of ours is about 2 KiB, and some twelve belong to a job: the last few thousand jobs.
_MAX_SPANS = 50_000
_MAX_BYTES = 128 * 1024 * 1024
_FLUSH_MILLISECONDS = 500


@dataclass(frozen=True, slots=True)
class ViewerAddress:
    """Where a viewer is read, where spans are sent to it, and which API its stack has.

    `read_url` also has a page of each trace: `page_template`.
    """

    read_url: str
    grpc_endpoint: str
    http_endpoint: str
    api_url: str

    @property
    def page_template(self) -> str:
        return f"{self.read_url}/trace/{{trace_id}}"


@contextmanager
def viewing(
    folder: StateFolder, *, api_url: str, http_port: int = 0, grpc_port: int = 0
) -> Iterator[ViewerAddress]:
    """Listen on loopback for the block, and have the state folder say where.

    Raises:
        TraceViewerError: A port cannot be had, or the note cannot be written.
    """
    # Imported here: whoever only asks where the viewer is has no use for gRPC.
    from telemetry.errors import ReceiverError
    from telemetry.receiver import Receiver

    receiver = Receiver(grpc_port=grpc_port, http_port=http_port, max_spans=_MAX_SPANS, max_bytes=_MAX_BYTES)
    try:
        receiver.start()
    except ReceiverError as error:
        raise TraceViewerError(f"--trace-viewer: {error}; name other ports, or none") from error
    try:
        address = ViewerAddress(receiver.read_url, receiver.grpc_endpoint, receiver.http_endpoint, api_url)
        _write(folder.trace_viewer, address)
        yield address
    finally:
        folder.trace_viewer.unlink(missing_ok=True)
        receiver.stop()


def environment(address: ViewerAddress, base: Mapping[str, str]) -> dict[str, str]:
    """Return `base` such that the processes of the stack send their spans to the viewer, and soon."""
    return {
        "OTEL_BSP_SCHEDULE_DELAY": str(_FLUSH_MILLISECONDS),
        "THROUGHLINE_TRACE_URL_TEMPLATE": address.page_template,
        **base,
        "OTEL_SDK_DISABLED": "false",
        "OTEL_TRACES_EXPORTER": "otlp",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": address.grpc_endpoint,
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc",
        "OTEL_EXPORTER_OTLP_TRACES_INSECURE": "true",
    }


def find(state_dir: Path) -> ViewerAddress | None:
    """Return what the folder's note says, `None` where there is none.

    Its stack may have been killed since: whether somebody listens there is not asked.
    """
    path = state_dir / VIEWER_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return ViewerAddress(**{name: str(content[name]) for name in ViewerAddress.__slots__})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TraceViewerError(f"{path}: cannot be read: {error}") from error


def _write(path: Path, address: ViewerAddress) -> None:
    # Written beside and moved, so that nobody reads half of it.
    draft = path.with_suffix(".new")
    try:
        draft.write_text(json.dumps(asdict(address)), encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise TraceViewerError(f"{path}: cannot be written: {error.strerror or error}") from error
