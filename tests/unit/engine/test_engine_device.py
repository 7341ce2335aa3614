"""Where an engine runs, how large its cache comes out, and what it says when memory runs out."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cuda_ops.memory import LargePages
from cuda_ops.native import KernelsInUse
from engine.attention import AttentionMetadata
from engine.config import Dtype, EngineConfig
from engine.core import Engine
from engine.device import MemoryUse, choose_device
from engine.errors import ConfigError, DeviceMemoryError, ModelLoadError, StepError
from engine.kv_cache import KVCacheShape
from engine.largest_step import run_largest_step
from engine.loading import choose_layout, load_for
from engine.models import CausalLM
from engine.models.opt import OPT
from engine.weights import load_model
from tests.unit.engine.engine_factory import GREEDY, make_engine, random_prompt

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
GIB = 1 << 30


@NO_GPU
def test_device_is_the_cpu_when_it_is_left_to_the_machine_and_there_is_no_gpu(opt_folder: Path) -> None:
    assert make_engine(opt_folder, device="auto").model_info.device == "cpu"


@NO_GPU
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_device_that_is_not_there_is_refused_before_anything_is_loaded(device: str) -> None:
    with pytest.raises(ConfigError, match=f"^device='{device}': needs a CUDA device"):
        Engine.from_config(EngineConfig(model="/no/such/folder", device=device))


def test_layout_follows_from_the_dtype_and_the_device() -> None:
    wanted: list[tuple[Dtype, str, str]] = [
        ("int8", "cpu", "int8"),
        ("int8", "cuda:1", "w8a16"),
        ("fp8", "cpu", "fp8"),
        ("fp8", "cuda:1", "fp8"),
        ("bfloat16", "cpu", "packed"),
        ("bfloat16", "cuda:1", "dense"),
    ]
    for dtype, device, layout in wanted:
        config = EngineConfig(model="folder", dtype=dtype, device=device)

        assert choose_layout(config, KernelsInUse("some level")) == layout
        assert config.activation_dtype == "bfloat16"


@pytest.mark.parametrize(("capability", "is_refused"), [((8, 0), True), ((8, 9), False), ((9, 0), False)])
def test_fp8_is_refused_by_name_on_a_gpu_that_does_not_know_it(
    capability: tuple[int, int], is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config = EngineConfig(model="/no/such/folder", dtype="fp8", device="cuda:1")

    # Where it is not refused the next thing that is amiss is told: there is no GPU, or no folder.
    with pytest.raises((ConfigError, ModelLoadError)) as caught:
        load_for(config)

    refusal = "dtype='fp8': needs a GPU of compute capability 8.9 or newer, cuda:1 has 8.0"
    assert (refusal in str(caught.value)) == is_refused


def test_device_stays_as_it_is_when_it_is_named() -> None:
    config = EngineConfig(model="folder")

    assert choose_device(config) is config


def test_memory_left_is_the_share_less_what_others_and_the_largest_step_hold() -> None:
    use = MemoryUse(total=100 * GIB, elsewhere=2 * GIB, peak=30 * GIB)

    assert use.left_within(0.9) == 58 * GIB
    assert use.left_within(0.2) == 0


class Recording:
    """A model that remembers what it was given."""

    def __init__(self, model: CausalLM) -> None:
        self._model = model
        self.config = model.config
        self.steps: list[tuple[Tensor, AttentionMetadata]] = []
        self.num_rows: list[int] = []

    def forward(
        self, input_ids: Tensor, positions: Tensor, kv_cache: Any, metadata: AttentionMetadata
    ) -> Tensor:
        self.steps.append((positions, metadata))
        return self._model.forward(input_ids, positions, kv_cache, metadata)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        self.num_rows.append(len(hidden))
        return self._model.compute_logits(hidden)


@pytest.mark.parametrize(("num_tokens", "lengths"), [(24, [24]), (80, [32, 32, 16])])
def test_largest_step_fills_the_budget_with_prompts_that_end_full_contexts(
    opt_folder: Path, num_tokens: int, lengths: list[int]
) -> None:
    model = Recording(load_model(str(opt_folder), dtype=torch.float32, device=torch.device("cpu")).model)
    shape = KVCacheShape(num_layers=3, num_kv_heads=3, head_dim=16, block_size=4, dtype=torch.float32)

    cache_bytes = run_largest_step(
        model, shape, torch.device("cpu"), num_tokens=num_tokens, max_model_len=32, num_rows=20
    )

    (positions, metadata), *others = model.steps
    assert not others
    assert metadata.query_start.diff().tolist() == lengths
    assert metadata.context_lens.tolist() == [32] * len(lengths)
    assert positions[-1] == 31
    assert len(set(metadata.slot_mapping.tolist())) == num_tokens
    assert model.num_rows == [20]
    assert cache_bytes == num_tokens // 4 * shape.bytes_per_block


@pytest.mark.parametrize(
    ("owner", "name", "setting"),
    [
        (OPT, "load", "dtype"),
        (LargePages, "zeros", "kv_cache_bytes"),
    ],
)
def test_engine_says_what_to_change_when_memory_runs_out_at_the_start(
    opt_folder: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, setting: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    if owner is OPT:
        monkeypatch.setattr(OPT, "__init__", fail)
    else:
        monkeypatch.setattr("engine.kv_cache.LargePages", fail)

    with pytest.raises(DeviceMemoryError, match=f"^cpu ran out of memory.*{setting}") as caught:
        make_engine(opt_folder)

    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_engine_says_what_to_change_when_memory_runs_out_in_a_step_and_refuses_to_go_on(
    opt_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine = make_engine(opt_folder)
    engine.add_request("r", random_prompt(5), GREEDY)
    monkeypatch.setattr(OPT, "forward", fail)

    with pytest.raises(DeviceMemoryError, match="gpu_memory_share"):
        engine.step()
    with pytest.raises(StepError, match="earlier step"):
        engine.step()


def test_engine_refuses_a_cache_of_less_than_one_block_by_the_name_of_the_setting(opt_folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^kv_cache_bytes=100: must leave \d+ bytes, one block of 4 tokens"
    ):
        make_engine(opt_folder, num_blocks=None, kv_cache_bytes=100)
