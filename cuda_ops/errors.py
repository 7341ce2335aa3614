"""What an op refuses.

OpError
└── OpInputError    shapes or dtypes that do not fit together; never retryable, always the caller's bug
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
