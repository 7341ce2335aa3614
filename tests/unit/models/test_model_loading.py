"""What a model folder may hold, and what is said of one that is broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import ModelLoadError
from engine.weights import LoadedModel, load_model
from tests.support.model_folders import make_model_folder
from tests.support.paged_driver import PagedDriver, PagedSequence

torch.set_num_threads(1)

PROMPT = list(range(5, 25))
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def opt_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder("opt", tmp_path_factory.mktemp("opt"))


@pytest.fixture(scope="module")
def sharded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder("llama", tmp_path_factory.mktemp("sharded"), max_shard_size="100KB")


@pytest.fixture
def folder(opt_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(opt_folder, tmp_path / "model")


def load(folder: Path, dtype: torch.dtype = torch.float32) -> LoadedModel:
    return load_model(str(folder), dtype=dtype, device=torch.device("cpu"))


def logits_of(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.inference_mode():
        driver = PagedDriver(load(folder, dtype).model, dtype=dtype)
        return driver.run([(PagedSequence(PROMPT), len(PROMPT))])[0]


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file or the tensors of a safetensors file in place."""
    if path.suffix == ".json":
        fields = json.loads(path.read_text())
        change(fields)
        path.write_text(json.dumps(fields))
        return
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def as_pickle(folder: Path, *, is_zip: bool) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)


def test_sharded_checkpoint_gives_the_same_logits_as_a_single_file(
    sharded_folder: Path, tmp_path: Path
) -> None:
    single = make_model_folder("llama", tmp_path)

    assert (sharded_folder / INDEX).is_file()
    assert torch.equal(logits_of(sharded_folder), logits_of(single))


@pytest.mark.parametrize("is_zip", [True, False])
def test_pickled_checkpoint_gives_the_same_logits_as_safetensors(folder: Path, is_zip: bool) -> None:
    expected = logits_of(folder)

    as_pickle(folder, is_zip=is_zip)

    assert torch.equal(logits_of(folder), expected)


def test_checkpoint_of_the_bare_decoder_loads_when_its_names_lack_the_prefix(folder: Path) -> None:
    expected = logits_of(folder)

    def strip(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    rewrite(folder / WEIGHTS, strip)

    assert torch.equal(logits_of(folder), expected)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_checkpoint_of_another_dtype_is_converted(folder: Path, stored: torch.dtype) -> None:
    def convert(tensors: dict[str, Any]) -> None:
        tensors.update({name: tensor.to(stored) for name, tensor in tensors.items()})

    def widen(tensors: dict[str, Any]) -> None:
        tensors.update({name: tensor.float() for name, tensor in tensors.items()})

    rewrite(folder / WEIGHTS, convert)
    converted = logits_of(folder)
    rewrite(folder / WEIGHTS, widen)

    assert torch.equal(converted, logits_of(folder))


def test_loaded_weights_are_unharmed_when_the_file_is_overwritten(folder: Path) -> None:
    expected = logits_of(folder)
    loaded = load(folder)

    (folder / WEIGHTS).write_bytes(b"\0" * (folder / WEIGHTS).stat().st_size)

    with torch.inference_mode():
        (logits,) = PagedDriver(loaded.model).run([(PagedSequence(PROMPT), len(PROMPT))])
    assert torch.equal(logits, expected)


def test_end_tokens_come_from_the_generation_config_before_the_config(folder: Path) -> None:
    assert load(folder).generation_config.eos_token_ids == (2,)

    rewrite(folder / "generation_config.json", lambda fields: fields.update(eos_token_id=[2, 7]))

    assert load(folder).generation_config.eos_token_ids == (2, 7)


def test_end_token_comes_from_the_tokenizer_when_no_config_names_one(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    rewrite(folder / "config.json", lambda fields: fields.update(eos_token_id=None))

    assert load(folder).generation_config.eos_token_ids == (2,)


@dataclass
class Told:
    stages: list[str] = field(default_factory=list)
    weights: list[tuple[int, int]] = field(default_factory=list)

    def on_stage(self, what: str) -> None:
        self.stages.append(what)

    def on_weights(self, num_bytes: int, total_bytes: int) -> None:
        self.weights.append((num_bytes, total_bytes))


def test_loading_is_told_by_stage_and_by_the_bytes_of_all_parts(sharded_folder: Path) -> None:
    told = Told()

    load_model(str(sharded_folder), dtype=torch.float32, device=torch.device("cpu"), observer=told)

    total = sum(path.stat().st_size for path in sharded_folder.glob("*.safetensors"))
    counts = [num_bytes for num_bytes, _ in told.weights]
    assert told.stages[-1] == "loading the weights of LlamaForCausalLM"
    assert {of for _, of in told.weights} == {total}
    assert len(set(counts)) > 10
    assert counts == sorted(counts)
    assert counts[-1] == total
    assert counts[-2] > 0.9 * total, "the last tensor left a tenth of the files unread"


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def set_field(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / "config.json", lambda config: config.update(fields))


def change_tensors(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / WEIGHTS, change)


def truncate(name: str, keep: float) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])

    return cut


def cut_pickle(folder: Path) -> None:
    as_pickle(folder, is_zip=True)
    truncate("pytorch_model.bin", 0.5)(folder)


EMBEDDING = "model.decoder.embed_tokens.weight"
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (remove("config.json"), r"config\.json: the file is missing"),
    "config cut": (truncate("config.json", 0.5), r"config\.json: is not valid JSON"),
    "config no object": (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object"),
    "architecture": (
        set_field(architectures=["BertModel"]),
        r"architectures=\['BertModel'\] is not supported, these are: OPTForCausalLM, GPT2LMHeadModel, Gemma3",
    ),
    "no architecture": (set_field(architectures=None), r"architectures=\[\] is not supported"),
    "size missing": (set_field(hidden_size=None), r"config\.json: hidden_size is missing"),
    "size no number": (set_field(ffn_dim="80"), "ffn_dim='80': must be a whole number of at least 1"),
    "heads do not divide": (set_field(num_attention_heads=5), "hidden_size=48: must be a multiple"),
    "activation": (set_field(activation_function="swish"), "function='swish': must be one of relu, gelu"),
    "eos": (set_field(eos_token_id="</s>"), "eos_token_id='</s>': must be a token id"),
    "no weights": (remove(WEIGHTS), "holds no weights"),
    "weights cut in the header": (truncate(WEIGHTS, 0.001), "is not a whole safetensors file"),
    "weights cut in the data": (truncate(WEIGHTS, 0.7), "is not a whole safetensors file"),
    "weights empty": (truncate(WEIGHTS, 0.0), "is not a whole safetensors file"),
    "pickle cut": (cut_pickle, r"pytorch_model\.bin: is not a whole file of tensors"),
    "tensor missing": (
        change_tensors(lambda tensors: tensors.pop("model.decoder.layers.1.fc1.bias")),
        r"tensor decoder\.layers\.1\.fc1\.bias is missing",
    ),
    "tensor too many": (
        change_tensors(lambda tensors: tensors.update(stranger=torch.zeros(1))),
        r"model\.safetensors: holds 1 tensor\(s\) that the model has no place for, the first is stranger",
    ),
    "tensor misshaped": (
        change_tensors(lambda tensors: tensors.update({EMBEDDING: torch.zeros(384, 47)})),
        r"tensor decoder\.embed_tokens\.weight has shape \[384, 47\], the config asks for \[384, 48\]",
    ),
    "tensor of integers": (
        change_tensors(lambda tensors: tensors.update({EMBEDDING: torch.zeros(384, 48, dtype=torch.int8)})),
        r"tensor decoder\.embed_tokens\.weight is torch\.int8, which is not supported",
    ),
    "no tokenizer": (remove("tokenizer.json"), r"tokenizer\.json is missing, and so is vocab\.json"),
    "tokenizer cut": (truncate("tokenizer.json", 0.5), r"tokenizer\.json: is not a tokenizer"),
    "tokenizer too large": (set_field(vocab_size=100), "vocab_size=100: must be at least the tok"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folder_is_refused_in_one_line_that_says_what_is_wrong(folder: Path, name: str) -> None:
    break_it, message = BROKEN[name]
    break_it(folder)

    with pytest.raises(ModelLoadError, match=message) as caught:
        load(folder)

    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not caught.value.retryable


def test_shard_that_is_missing_is_named_with_the_index(sharded_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sharded_folder, tmp_path / "model")
    lost = sorted(folder.glob("model-*.safetensors"))[1]
    lost.unlink()

    with pytest.raises(ModelLoadError, match=rf"{lost.name}: the file is missing, {INDEX} names it"):
        load(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_key_value_heads": 4}, "num_attention_heads=6: must be a multiple of num_key_value_heads=4"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': only silu is supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn': only default, linear and llama3"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters: factor is missing"),
    ],
)
def test_llama_config_that_is_not_supported_is_refused(
    sharded_folder: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    folder = shutil.copytree(sharded_folder, tmp_path / "model")
    set_field(**fields)(folder)

    with pytest.raises(ModelLoadError, match=message):
        load(folder)


def test_old_spelling_of_rotary_scaling_means_the_same(tmp_path: Path) -> None:
    folder = make_model_folder("llama3-rope", tmp_path)
    expected = logits_of(folder)

    def respell(config: dict[str, Any]) -> None:
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = rope

    rewrite(folder / "config.json", respell)

    assert torch.equal(logits_of(folder), expected)


def test_windows_of_old_qwen_configs_begin_at_the_named_layer(tmp_path: Path) -> None:
    folder = make_model_folder("qwen2-window", tmp_path)
    expected = logits_of(folder)

    rewrite(folder / "config.json", lambda config: config.pop("layer_types"))

    assert torch.equal(logits_of(folder), expected)
    rewrite(folder / "config.json", lambda config: config.update(max_window_layers=2))
    assert not torch.equal(logits_of(folder), expected)


def test_old_spelling_of_gemmas_two_rotary_bases_and_windows_means_the_same(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    folder = make_model_folder("gemma3", tmp_path, layer_types=kinds)
    expected = logits_of(folder)

    def respell(config: dict[str, Any]) -> None:
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope["full_attention"]["rope_theta"]
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        del config["layer_types"]
        config["sliding_window_pattern"] = 2

    rewrite(folder / "config.json", respell)

    assert torch.equal(logits_of(folder), expected)
    rewrite(folder / "config.json", lambda config: config.update(rope_local_base_freq=100.0))
    assert not torch.equal(logits_of(folder), expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"attn_logit_softcapping": 50.0},
            "attn_logit_softcapping=50.0: a soft cap of attention is not supp",
        ),
        ({"final_logit_softcapping": -1.0}, "final_logit_softcapping=-1.0: must be"),
        ({"hidden_activation": "silu"}, "hidden_activation='silu': only gelu_pytorch_tanh"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True: only causal"),
        ({"layer_types": ["full_attention"]}, "must name 3 layers"),
    ],
)
def test_gemma_config_that_is_not_supported_is_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    folder = make_model_folder("gemma3", tmp_path)
    set_field(**fields)(folder)

    with pytest.raises(ModelLoadError, match=message):
        load(folder)
