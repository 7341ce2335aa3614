"""An engine on a GPU: graphs, steps launched ahead and two ranks change nothing that comes out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.coded_folders import CodedFormat, write_coded_folder
from tests.support.model_folders import make_model_folder
from tests.unit.engine.engine_factory import GREEDY, generate, make_engine, random_prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SAMPLED = replace(GREEDY, temperature=0.8, top_p=0.9, seed=3)
KINDS = (GREEDY, replace(GREEDY, logprobs=5), SAMPLED)
REQUESTS = {str(n): (random_prompt(4 + 9 * n, n), KINDS[n % 3]) for n in range(9)}
PLAIN = {"device": "cuda", "decode_graphs": "off", "async_steps": "off"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder("qwen3", tmp_path_factory.mktemp("qwen3"), head_dim=64)


@pytest.mark.parametrize("cache", ["auto", "fp8"])
@pytest.mark.parametrize("switches", [{"decode_graphs": "on"}, {"async_steps": "on"}, {}])
def test_gpu_engine_gives_the_same_tokens_with_graphs_and_steps_launched_ahead(
    folder: Path, switches: dict[str, str], cache: str
) -> None:
    config = {"device": "cuda"} if not switches else PLAIN | switches
    plain = generate(make_engine(folder, kv_cache_dtype=cache, **PLAIN), REQUESTS)
    fast = generate(make_engine(folder, kv_cache_dtype=cache, **config), REQUESTS)

    assert [fast.tokens(id) for id in REQUESTS] == [plain.tokens(id) for id in REQUESTS]


def test_gpu_engine_over_a_float8_cache_is_near_the_one_over_bfloat16(folder: Path) -> None:
    """With the kernels that serve it: the first token comes from the whole prompt's keys and values."""
    config = {"device": "cuda", "dtype": "bfloat16", "block_size": 16}
    wanted = {"a": (random_prompt(50), replace(GREEDY, max_tokens=1, logprobs=1))}

    tops = []
    for cache in ("auto", "fp8"):
        output = generate(make_engine(folder, kv_cache_dtype=cache, **config), wanted).outputs["a"]
        logprobs = output.completions[0].logprobs
        assert logprobs is not None
        assert logprobs.top_logprobs[0] is not None
        tops.append(max(logprobs.top_logprobs[0].values()))

    assert tops[1] == pytest.approx(tops[0], abs=1.0)


def test_gpu_engine_gives_the_greedy_tokens_of_the_cpu(folder: Path) -> None:
    greedy = {id: request for id, request in REQUESTS.items() if request[1] is GREEDY}

    on_gpu = generate(make_engine(folder, device="auto"), greedy)

    on_cpu = generate(make_engine(folder), greedy)
    assert [on_gpu.tokens(id) for id in greedy] == [on_cpu.tokens(id) for id in greedy]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "fp8"])
def test_gpu_engine_gives_the_same_tokens_with_graphs_over_weights_of_few_bits(
    dtype: str, folder: Path, tmp_path: Path
) -> None:
    if dtype == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this device does not know e4m3")
    if dtype == "bfloat16":
        wide = make_model_folder(
            "qwen3", tmp_path / "wide", head_dim=64, hidden_size=64, intermediate_size=128
        )
        folder, _ = write_coded_folder(wide, CodedFormat("awq"), tmp_path)
    plain = generate(make_engine(folder, dtype=dtype, **PLAIN), REQUESTS)

    fast = generate(make_engine(folder, dtype=dtype, device="cuda"), REQUESTS)

    assert [fast.tokens(id) for id in REQUESTS] == [plain.tokens(id) for id in REQUESTS]


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
