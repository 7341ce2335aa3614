"""An engine on a GPU: graphs, steps launched ahead and two ranks change nothing that comes out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.model_folders import make_model_folder
from tests.unit.engine.engine_factory import GREEDY, generate, make_engine, random_prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SAMPLED = replace(GREEDY, temperature=0.8, top_p=0.9, seed=3)
REQUESTS = {str(n): (random_prompt(4 + 9 * n, n), SAMPLED if n % 3 == 2 else GREEDY) for n in range(9)}
PLAIN = {"device": "cuda", "decode_graphs": "off", "async_steps": "off"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder("qwen3", tmp_path_factory.mktemp("qwen3"), head_dim=64)


@pytest.mark.parametrize("switches", [{"decode_graphs": "on"}, {"async_steps": "on"}, {}])
def test_gpu_engine_gives_the_same_tokens_with_graphs_and_steps_launched_ahead(
    folder: Path, switches: dict[str, str]
) -> None:
    plain = generate(make_engine(folder, **PLAIN), REQUESTS)
    fast = generate(
        make_engine(folder, **({"device": "cuda"} if not switches else PLAIN | switches)), REQUESTS
    )

    assert [fast.tokens(id) for id in REQUESTS] == [plain.tokens(id) for id in REQUESTS]


def test_gpu_engine_gives_the_greedy_tokens_of_the_cpu(folder: Path) -> None:
    greedy = {id: request for id, request in REQUESTS.items() if request[1] is GREEDY}

    on_gpu = generate(make_engine(folder, device="auto"), greedy)

    on_cpu = generate(make_engine(folder), greedy)
    assert [on_gpu.tokens(id) for id in greedy] == [on_cpu.tokens(id) for id in greedy]


def test_gpu_cache_is_sized_by_the_share_of_the_memory(folder: Path) -> None:
    config = {"device": "cuda", "num_blocks": None, "max_num_sequences": 64, "max_num_batched_tokens": 64}

    small, large = (
        make_engine(folder, gpu_memory_share=share, **config).model_info.num_blocks for share in (0.3, 0.9)
    )

    assert 0 < small <= large
    # No more than all sequences at their full length can use, however large the card.
    assert large <= 64 * 64


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_two_gpus_give_the_tokens_of_one(folder: Path) -> None:
    shared = make_engine(folder, device="cuda", tensor_parallel_size=2)
    try:
        together = generate(shared, REQUESTS)
    finally:
        shared.close()

    alone = generate(make_engine(folder, device="cuda"), REQUESTS)

    assert [together.tokens(id) for id in REQUESTS] == [alone.tokens(id) for id in REQUESTS]
