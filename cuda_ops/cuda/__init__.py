"""The ops in CUDA C++: sources compiled at first use, what launches them, and the ops' side of them."""

from __future__ import annotations
