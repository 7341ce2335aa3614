"""The ops in C++ for the CPU: sources, and what compiles them."""

from __future__ import annotations
