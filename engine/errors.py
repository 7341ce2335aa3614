"""What can go wrong in the engine, as one tree.

    EngineError                 reason                 retryable
    ├── ConfigError             invalid_config         no    the operator wrote a bad setting
    ├── ModelLoadError          model_load_failed      no    the folder is missing, broken or unsupported
    ├── InvalidRequestError     invalid_request        no    the client asked for what cannot be done
    ├── DeviceMemoryError       out_of_memory          yes   the device has no room; a setting must change
    ├── RankError               rank_lost              yes   a process of a tensor-parallel engine is gone
    ├── StepError               step_failed            yes   the model raised; the engine must be replaced
    └── InvariantError          invariant_broken       yes   our own accounting is wrong; the same

Each error says whether the same call may succeed on a fresh engine (`retryable`) and carries a `reason`
that is the same in metrics, spans and API replies. All of them survive pickling, for they cross a process
boundary. No message holds a prompt or an output.
"""

from __future__ import annotations

from typing import ClassVar, Literal

MemoryStage = Literal["load", "profile", "cache", "capture", "step"]
"""What was being done when the memory ran out."""

_MAX_VALUE_CHARACTERS = 80


class EngineError(Exception):
    reason: ClassVar[str] = "engine_failed"
    retryable: ClassVar[bool] = True


class _FieldError(EngineError):
    """A value that breaks a rule: names the field, the value and the rule."""

    retryable: ClassVar[bool] = False

    def __init__(self, field: str, value: object, rule: str) -> None:
        shown = repr(value)
        if len(shown) > _MAX_VALUE_CHARACTERS:
            shown = shown[:_MAX_VALUE_CHARACTERS] + "…"
        super().__init__(f"{field}={shown}: {rule}")
        self.field = field
        self.value = value
        self.rule = rule

    def __reduce__(self) -> tuple[type[_FieldError], tuple[str, object, str]]:
        return type(self), (self.field, self.value, self.rule)


class ConfigError(_FieldError):
    reason: ClassVar[str] = "invalid_config"


class InvalidRequestError(_FieldError):
    reason: ClassVar[str] = "invalid_request"


class ModelLoadError(EngineError):
    """Says in one line which file or folder, and what is wrong with it."""

    reason: ClassVar[str] = "model_load_failed"
    retryable: ClassVar[bool] = False

    def __init__(self, source: str, problem: str) -> None:
        super().__init__(f"{source}: {problem}")
        self.source = source
        self.problem = problem

    def __reduce__(self) -> tuple[type[ModelLoadError], tuple[str, str]]:
        return type(self), (self.source, self.problem)


class DeviceMemoryError(EngineError):
    """A GPU has no room; says which setting would make some."""

    reason: ClassVar[str] = "out_of_memory"

    def __init__(self, device: str, stage: MemoryStage, remedy: str) -> None:
        super().__init__(f"{device} ran out of memory ({stage}): {remedy}")
        self.device = device
        self.stage = stage
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[DeviceMemoryError], tuple[str, MemoryStage, str]]:
        return type(self), (self.device, self.stage, self.remedy)


class RankError(EngineError):
    """Another process that shares the model has ended or failed; says which and how."""

    reason: ClassVar[str] = "rank_lost"


class StepError(EngineError):
    """A step failed half-way; the engine's state is unknown and every later call refuses."""

    reason: ClassVar[str] = "step_failed"


class InvariantError(EngineError):
    """`check_invariants` found blocks lost, owned twice or miscounted."""

    reason: ClassVar[str] = "invariant_broken"
