"""What an op refuses, and what choosing its kernels does.

OpError
├── OpInputError             shapes or dtypes that do not fit together; not retryable, the caller's bug
├── KernelsUnavailableError  native kernels were asked for and cannot be had; not retryable
├── KernelCompileError       a GPU kernel does not compile here; not retryable
├── NotRecordableError       a function cannot be done again from a recording; not retryable
└── RecordedCallError        what a recording read leads outside the cache; not retryable, the caller's bug
"""

from __future__ import annotations


class OpError(Exception):
    """Base of everything an op raises by itself."""


class OpInputError(OpError):
    """Names the op and the rule that its arguments break; holds shapes and dtypes, never data."""

    def __init__(self, op: str, problem: str) -> None:
        super().__init__(f"{op}: {problem}")
        self.op = op
        self.problem = problem

    def __reduce__(self) -> tuple[type[OpInputError], tuple[str, str]]:
        return type(self), (self.op, self.problem)


class KernelsUnavailableError(OpError):
    """Says what is missing, and where known how to get it."""


class KernelCompileError(OpError):
    """The compiler refused a kernel: our bug, or a compiler that is too old for the device.

    Attributes:
        variant: which kernel, with which constants.
        arch: compiled for what.
        log: what the compiler said.
    """

    def __init__(self, variant: str, arch: str, log: str) -> None:
        super().__init__(f"the compiler refused {variant} for {arch}:\n{log}")
        self.variant = variant
        self.arch = arch
        self.log = log

    def __reduce__(self) -> tuple[type[KernelCompileError], tuple[str, str, str]]:
        return type(self), (self.variant, self.arch, self.log)


class NotRecordableError(OpError):
    """Names the op whose result decides what is done next."""

    def __init__(self, op: str) -> None:
        super().__init__(f"{op} cannot be recorded: what follows may depend on its numbers")
        self.op = op

    def __reduce__(self) -> tuple[type[NotRecordableError], tuple[str]]:
        return type(self), (self.op,)


class RecordedCallError(OpError):
    """Says which op read what; holds no data."""
