"""Pieces that model families share."""

from __future__ import annotations
