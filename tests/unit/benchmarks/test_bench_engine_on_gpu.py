"""What the GPU benchmark builds and times, at a small shape on the CPU; the figures mean nothing here."""

from __future__ import annotations

import pytest

from benchmarks import engine_on_gpu
from benchmarks.bench_engine import _byte_tokenizer

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1200,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


def test_gpu_benchmark_draws_a_model_and_times_steps_against_the_bytes_they_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_on_gpu, "CONTEXT", 20)
    engine, num_bytes = engine_on_gpu.make_engine("tiny", SHAPE, "cpu", _byte_tokenizer)

    timing = engine_on_gpu.time_decoding(engine, SHAPE, 3, num_bytes, rate=1e9)

    block = 32 * (4 + 2 * 2) * 8 + 32 * 32 + 3 * 32 * 48 + 2 * 32
    assert num_bytes == 2 * (2 * block + 32 + 1200 * 32)
    assert timing.floor_seconds == pytest.approx((num_bytes + 3 * (20 + 32) * 2 * 2 * 2 * 2 * 8) / 1e9)
    assert timing.step_seconds > 0
    assert not engine.has_work()
    assert engine_on_gpu.run_engine(engine, [[11, 12, 13]] * 2) > 0
