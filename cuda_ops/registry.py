"""The one place where an op gets its name, its meaning and its fake.

`Library.define` and `impl`, not `torch.library.custom_op`: a call costs 3 to 6 microseconds of host time
instead of 30 to 40, and a decode step makes a hundred of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

NAMESPACE: Final = "throughline"

# Registrations live as long as this object does. torch.library.Library is untyped, hence the three ignores.
_LIBRARY: Final = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]

# Every implementation and fake has its op's own signature; the schema is what checks them.
Implementation = Callable[..., Any]


def define_op(schema: str, *, reference: Implementation, fake: Implementation) -> Callable[..., Any]:
    """Register an op under `throughline::` and return its callable overload.

    The reference serves every device until a native implementation is registered for that device's dispatch
    key (`torch.library.Library("throughline", "IMPL").impl(name, function, "CPU")`), which then takes
    precedence.

    Args:
        schema: name and signature in torch's schema language; mutated tensors are marked, as in `Tensor(a!)
            out`.
        reference: the meaning in plain torch, see `cuda_ops.reference`.
        fake: returns outputs with the right shape, stride and dtype without reading data; for ops that only
            mutate, returns None.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    overload: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return overload
