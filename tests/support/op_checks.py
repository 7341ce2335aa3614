"""What torch says of an op's registration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

_CHECKS: Final = (
    "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic",
)  # fmt: skip


def check_registration(overload: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """Hold schema, fake and mutation marks to torch's checks.

    Of arguments in float8, which torch cannot compare, what the schema marks as written is looked at here.
    """
    is_float8 = any(part.dtype == torch.float8_e4m3fn for part in arguments if isinstance(part, Tensor))
    checks = _CHECKS[2 if is_float8 else 0 :]
    results = torch.library.opcheck(overload, tuple(arguments), test_utils=checks)
    assert results == dict.fromkeys(checks, "SUCCESS")
    if is_float8:
        _check_writes(overload, arguments)


def _check_writes(overload: Any, arguments: Sequence[Any]) -> None:
    before = [bytes_of(part) if isinstance(part, Tensor) else None for part in arguments]
    overload(*arguments)
    for described, part, old in zip(overload._schema.arguments, arguments, before, strict=True):
        if old is not None:
            is_written = described.alias_info is not None and described.alias_info.is_write
            assert torch.equal(bytes_of(part), old) != is_written, described.name


def bytes_of(tensor: Tensor) -> Tensor:
    """A copy."""
    return tensor.contiguous().clone().view(torch.uint8)
