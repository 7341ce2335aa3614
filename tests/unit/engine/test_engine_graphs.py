"""Decode steps replayed over buffers of fixed place give what steps run one by one give."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import engine.builtin
from cuda_ops.native import use_kernels
from engine.batch import BatchLayout, ModelInput
from engine.config import EngineConfig
from engine.core import Engine
from engine.graphs import DirectGraph, RecordedGraph, StaticBatch, bucket_sizes, every_size, num_spare_blocks
from tests.support.kernels import built_levels
from tests.support.model_folders import make_model_folder
from tests.unit.engine.engine_factory import GREEDY, generate, make_engine, random_prompt
from tests.unit.engine.test_engine_soak import BEGINNINGS, draw_params


def test_buckets_grow_from_one_to_the_most_sequences_there_can_be() -> None:
    assert bucket_sizes(1) == [1]
    assert bucket_sizes(5) == [1, 2, 4, 5]
    assert bucket_sizes(40) == [1, 2, 4, 8, 16, 24, 32, 40]
    assert bucket_sizes(300)[-4:] == [240, 256, 288, 300]
    assert num_spare_blocks(every_size(300), 16) == 0


@given(max_num_sequences=st.integers(1, 600), block_size=st.integers(1, 32))
def test_spare_blocks_have_a_slot_for_each_row_of_padding(max_num_sequences: int, block_size: int) -> None:
    sizes = bucket_sizes(max_num_sequences)

    assert sizes == sorted(set(sizes))
    most = max((b - a - 1 for a, b in pairwise(sizes)), default=0)
    assert most <= num_spare_blocks(sizes, block_size) * block_size < most + block_size


def _decode_layout(lengths: list[int], block_size: int, max_blocks: int, seed: int) -> BatchLayout:
    """One token each at the end of contexts of these lengths, in blocks of their own."""
    generator = np.random.default_rng(seed)
    num_sequences = len(lengths)
    starts = np.array(lengths, dtype=np.int64) - 1
    blocks = generator.permutation(num_sequences * max_blocks).astype(np.int32)
    width = max(-(-length // block_size) for length in lengths)
    tables = blocks.reshape(num_sequences, max_blocks)[:, :width].copy()
    return BatchLayout(
        starts=starts,
        lengths=np.ones(num_sequences, dtype=np.int64),
        owners=np.arange(num_sequences),
        token_ids=generator.integers(0, 100, num_sequences),
        positions=starts,
        slots=tables[np.arange(num_sequences), starts // block_size].astype(np.int64) * block_size
        + starts % block_size,
        tables=tables,
    )


@given(
    steps=st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=13), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
)
def test_buffers_hold_the_step_and_padding_that_touches_no_live_block(
    steps: list[list[int]], seed: int
) -> None:
    block_size, max_blocks, first_spare = 4, 5, 13 * 5
    buffers = StaticBatch(bucket_sizes(13), max_blocks, block_size, first_spare, torch.device("cpu"))
    for lengths in steps:
        layout = _decode_layout(lengths, block_size, max_blocks, seed)
        size = next(size for size in bucket_sizes(13) if size >= len(lengths))

        buffers.fill(layout, size, None)

        own, plain = buffers.rows(size), ModelInput.of(layout, torch.device("cpu"))
        n, width = layout.tables.shape
        assert torch.equal(own.input_ids[:n], plain.input_ids)
        assert torch.equal(own.positions[:n], plain.positions)
        assert torch.equal(own.metadata.slot_mapping[:n], plain.metadata.slot_mapping)
        assert torch.equal(own.metadata.context_lens[:n], plain.metadata.context_lens)
        assert torch.equal(own.metadata.block_tables[:n, :width], plain.metadata.block_tables)
        assert own.metadata.query_start.tolist() == list(range(size + 1))
        padding = own.metadata.slot_mapping[n:].tolist()
        assert all(slot >= first_spare * block_size for slot in padding)
        assert len(set(padding)) == size - n
        assert own.metadata.context_lens[n:].tolist() == [1] * (size - n)
        assert own.metadata.block_tables[n:, 0].tolist() == [slot // block_size for slot in padding]


def test_graph_reads_its_buffers_anew_and_overwrites_its_result() -> None:
    graph, buffer = DirectGraph(), torch.tensor([1.0])
    graph.capture(lambda: (buffer * 2, buffer * 3))

    first = graph.replay()
    buffer.fill_(5.0)
    second = graph.replay()

    assert [tensor.item() for tensor in second] == [10.0, 15.0]
    assert all(one is other for one, other in zip(first, second, strict=True))


def _spy_on_replays(monkeypatch: pytest.MonkeyPatch, kind: type[DirectGraph | RecordedGraph]) -> list[int]:
    replays: list[int] = []
    replay = kind.replay

    def counted(self: Any) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = replay(self)
        replays.append(len(outputs[0]))
        return outputs

    monkeypatch.setattr(kind, "replay", counted)
    return replays


@pytest.mark.parametrize("kind", ["opt", "gpt2", "qwen3", "mistral", "gemma3"])
def test_engine_on_static_buffers_gives_the_same_greedy_tokens(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model_folder(kind, tmp_path / kind)  # type: ignore[arg-type]  # one of the kinds
    requests = {str(n): (random_prompt(3 + 5 * n, n), GREEDY) for n in range(11)}
    replays = _spy_on_replays(monkeypatch, DirectGraph)

    plain = generate(make_engine(folder, kernels="reference"), requests)
    assert not replays
    replayed = generate(make_engine(folder, kernels="reference", decode_graphs="on"), requests)

    assert [replayed.tokens(id) for id in requests] == [plain.tokens(id) for id in requests]
    assert len(set(replays)) > 1, "only one bucket was ever replayed"


@pytest.mark.parametrize("kind", ["opt", "gpt2", "qwen3", "mistral", "gemma3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_engine_that_replays_recorded_calls_gives_the_same_greedy_tokens(
    kind: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built_levels()
    folder = make_model_folder(kind, tmp_path / kind)  # type: ignore[arg-type]  # one of the kinds
    requests = {str(n): (random_prompt(3 + 5 * n, n), GREEDY) for n in range(7)}
    replays = _spy_on_replays(monkeypatch, RecordedGraph)
    try:
        plain = generate(make_engine(folder, kernels="native", dtype=dtype, decode_graphs="off"), requests)
        assert not replays
        replayed = generate(make_engine(folder, kernels="native", dtype=dtype), requests)
    finally:
        use_kernels("reference")

    assert [replayed.tokens(id) for id in requests] == [plain.tokens(id) for id in requests]
    assert len(replays) > 10
    assert 7 in replays, "not every size has a graph of its own"


@pytest.fixture(scope="module")
def pair() -> tuple[Engine, Engine]:
    """One plain, one replayed, both on a cache too small for what comes."""
    config = {"block_size": 8, "num_blocks": 48, "max_num_sequences": 13, "keeps_prefixes": False}
    folder = engine.builtin.path()
    return make_engine(folder, decode_graphs="off", **config), make_engine(
        folder, decode_graphs="on", **config
    )


@given(seed=st.integers(0, 10_000), num_requests=st.integers(1, 14))
@settings(max_examples=12)
def test_replayed_engine_gives_the_same_with_every_feature_mixed(
    pair: tuple[Engine, Engine], seed: int, num_requests: int
) -> None:
    rng = random.Random(seed)
    encode = pair[0].model_info.tokenizer.encode
    requests = {str(n): (encode(rng.choice(BEGINNINGS)), draw_params(rng)) for n in range(num_requests)}

    plain, replayed = (generate(one, requests) for one in pair)

    for id, (_, params) in requests.items():
        assert replayed.tokens(id) == plain.tokens(id), params
        assert [c.text for c in replayed.outputs[id].completions] == [
            c.text for c in plain.outputs[id].completions
        ]


@dataclass
class Stages:
    said: list[str] = field(default_factory=list)

    def on_stage(self, what: str) -> None:
        self.said.append(what)

    def on_weights(self, num_bytes: int, total_bytes: int) -> None:
        return None


def test_start_tells_of_each_graph_it_captures(opt_folder: Path) -> None:
    config = EngineConfig(
        model=str(opt_folder), kernels="reference", decode_graphs="on", max_num_sequences=5, num_blocks=20
    )
    stages = Stages()

    Engine.from_config(config, loading=stages)

    assert [line for line in stages.said if "graphs" in line] == [
        f"capturing decode graphs: {number} of 4, {size} sequences"
        for number, size in enumerate([5, 4, 2, 1], 1)
    ]
