"""What one of a float8 cache's numbers stands for, as a checkpoint says it, for each layer.

A checkpoint that was quantised for such a cache has two numbers a layer; without them both are 1, as in vLLM.
"""

from __future__ import annotations

from cuda_ops.kv_cache import Scales
from engine.checkpoint import Checkpoint


def take_cache_scales(checkpoint: Checkpoint, attention: str) -> Scales:
    """Take the scales of one layer's keys and values.

    Args:
        checkpoint: holds them under one of the names that vLLM knows, or not at all.
        attention: the layer's attention, e.g. `layers.0.self_attn`.

    Raises:
        ModelLoadError: a scale is no single number above 0.
    """
    # Of old, one number for both.
    both = checkpoint.take_scale(f"{attention}.kv_scale", 1.0)
    key, value = (_take(checkpoint, attention, part, both) for part in "kv")
    return key, value


def _take(checkpoint: Checkpoint, attention: str, part: str, default: float) -> float:
    for place in ("", f"{part}_proj.", "attn."):
        default = checkpoint.take_scale(f"{attention}.{place}{part}_scale", default)
    return default
