"""What can go wrong at the front door.

CliError                    a message for the person at the terminal; exit code 1
├── NoRedisError            no server to talk to and none to start
├── RedisUnreachableError   the server that was named does not answer
├── RedisStartError         the server we started never became ready
├── PortInUseError          the API's port belongs to somebody else
├── StateFolderError        the state folder is in use, or cannot be used
├── TraceViewerError        the trace viewer cannot listen, or cannot be read
├── TraceNotFoundError      there is a viewer, but it holds no span of what was asked for
├── StackError              the stack could not be started or kept up
├── ApiError                the API refused, or answered something else than its contract
│   └── ApiUnreachableError nothing listens at the URL
├── NoBenchmarksError       the project lies here without its benchmarks folder
└── DemoError               a step of the demo did not end as it must
"""

from __future__ import annotations


class CliError(Exception):
    """Base of all errors whose message is meant to be read, without a traceback."""


class NoRedisError(CliError):
    """No Redis was named and no server binary could be found."""


class RedisUnreachableError(CliError):
    """The Redis that was named by an option or by the environment does not answer."""


class RedisStartError(CliError):
    """The embedded server ended, or did not answer in time, while it was being started."""


class PortInUseError(CliError):
    """Another process listens on the port asked for."""


class StateFolderError(CliError):
    """Another stack holds the state folder, or it cannot be made private to this user."""


class TraceViewerError(CliError):
    """The trace viewer could not be started, is not running, or answers something else than its contract."""


class TraceNotFoundError(CliError):
    """The viewer holds no span of the job or trace."""


class StackError(CliError):
    """A part that the stack cannot live without does not stay up."""


class ApiError(CliError):
    """The API answered with an error.

    Attributes:
        status: The HTTP status.
        code: The stable code of the OpenAI error object; empty where the answer held none.
        retry_after_seconds: What the answer asked for, or `None`.
    """

    def __init__(self, message: str, *, status: int, code: str, retry_after_seconds: float | None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after_seconds = retry_after_seconds


class ApiUnreachableError(CliError):
    """No HTTP answer came at all."""


class DemoError(CliError):
    """A step of the demo failed; the message names the step and the reason."""


class NoBenchmarksError(CliError):
    """The packages are here, the checkout they come from is not."""
