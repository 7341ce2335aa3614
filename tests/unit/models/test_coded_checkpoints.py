"""AWQ and GPTQ folders against `transformers` on the plain folder that they stand for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from cuda_ops.float8 import Float8Weight
from cuda_ops.native import use_kernels
from cuda_ops.quantised import QuantisedWeight
from engine.checkpoint import Checkpoint, WeightLayout
from engine.errors import ModelLoadError
from engine.layers.linear import Linear
from engine.model_config import ConfigFields
from engine.quantisation import Quantisation, read_quantisation
from engine.shard import Shard
from engine.weights import LoadedModel, load_model
from tests.support.coded_folders import CodedFormat, encode, write_coded_folder, write_float8_folder
from tests.support.emulated_kernels import EmulatedLauncher, registered, require_compiler
from tests.support.model_folders import make_model_folder
from tests.support.paged_driver import PagedDriver, PagedSequence
from tests.unit.engine.engine_factory import GREEDY, generate, make_engine, random_prompt

torch.set_num_threads(1)

TOLERANCE = 1e-3
PROMPT = list(range(5, 25))
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
METHODS = ("awq", "gptq", "fp8")
FORMATS = (
    CodedFormat("awq"),
    CodedFormat("awq", group_size=-1),
    CodedFormat("gptq", group_size=64),
    CodedFormat("gptq", is_symmetric=True),
    CodedFormat("gptq", is_shuffled=True),
    CodedFormat("gptq", is_shuffled=True, group_size=-1),
    CodedFormat("gptq", bits=8, is_shuffled=True),
    CodedFormat("gptq", bits=8, group_size=-1, is_symmetric=True),
    CodedFormat("gptq", checkpoint_format="gptq_v2"),
)


E4M3 = {"num_bits": 8, "type": "float"}
COMPRESSED: dict[str, Any] = {"quant_method": "compressed-tensors", "format": "float-quantized"}
FLOAT8_CONFIGS = {
    "fp8": {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
    "compressed-tensors": COMPRESSED
    | {"config_groups": {"g": {"weights": E4M3 | {"strategy": "channel"}, "input_activations": E4M3}}},
}


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    use_kernels("reference")
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder("qwen2", tmp_path_factory.mktemp("plain"), **SHAPE)


def load(folder: Path, **options: Any) -> LoadedModel:
    settings = {"dtype": torch.float32, "device": torch.device("cpu")} | options
    return load_model(str(folder), **settings)


def logits_of(loaded: LoadedModel, dtype: torch.dtype = torch.float32) -> Tensor:
    return PagedDriver(loaded.model, dtype=dtype, block_size=16, num_blocks=8).run(
        [(PagedSequence(PROMPT), len(PROMPT))]
    )[0]


def oracle_logits(folder: Path) -> Tensor:
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits: Tensor = oracle(torch.tensor([PROMPT])).logits[0]
    return logits


@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_widened_checkpoint_gives_the_oracles_logits(
    form: CodedFormat, layout: WeightLayout, plain: Path, tmp_path: Path
) -> None:
    coded, valued = write_coded_folder(plain, form, tmp_path)

    ours = logits_of(load(coded, layout=layout))

    assert (ours - oracle_logits(valued)).abs().max() < TOLERANCE


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_checkpoint_kept_as_codes_gives_the_oracles_logits(
    form: CodedFormat, plain: Path, tmp_path: Path
) -> None:
    coded, valued = write_coded_folder(plain, form, tmp_path, has_biases=True)

    loaded = load(coded, keeps=METHODS)

    assert (logits_of(loaded) - oracle_logits(valued)).abs().max() < TOLERANCE
    assert loaded.num_parameters == load(valued).num_parameters


def test_checkpoint_kept_as_codes_runs_the_gpus_kernels(plain: Path, tmp_path: Path) -> None:
    require_compiler()
    coded, _ = write_coded_folder(plain, CodedFormat("awq"), tmp_path)
    loaded = load(coded, keeps=METHODS, dtype=torch.bfloat16)
    expected = logits_of(loaded, torch.bfloat16)
    launched: list[str] = []

    class Counting(EmulatedLauncher):
        def launch(self, variant: Any, *rest: Any) -> None:
            launched.append(variant.source)
            EmulatedLauncher.launch(self, variant, *rest)

    with registered(Counting()):
        actual = logits_of(loaded, torch.bfloat16)

    # Two fused and two plain products in each of the layers.
    assert launched.count("quantised_linear") >= 4 * loaded.config.num_layers
    # Both round each layer's results once, in other places.
    assert (actual - expected).abs().max() <= 0.05 * expected.abs().max()


LAYER = CodedFormat("gptq", group_size=32)


def open_layer(path: Path, form: CodedFormat, weight: Tensor, **options: Any) -> tuple[Checkpoint, Tensor]:
    stored, values = encode(weight, form)
    save_file(
        {f"layer.{part}": tensor.contiguous() for part, tensor in stored.items()}, path / "model.safetensors"
    )
    quantisation = Quantisation(
        form.method, form.bits, max(form.group_size, 0), zero_offset=int(form.method == "gptq")
    )
    settings: dict[str, Any] = {
        "name_prefix": "", "dtype": torch.float32, "device": torch.device("cpu"),
        "quantisation": quantisation, "keeps_codes": True,
    }  # fmt: skip
    return Checkpoint.open(path, **(settings | options)), values


@pytest.mark.parametrize("keeps_codes", [True, False])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("form", [CodedFormat("awq"), LAYER, CodedFormat("gptq", is_shuffled=True)], ids=str)
def test_rank_takes_its_share_of_outputs_or_of_inputs(
    form: CodedFormat, rank: int, keeps_codes: bool, tmp_path: Path
) -> None:
    weight, x = torch.randn(48, 128), torch.randn(3, 128)
    own_rows, own_columns = slice(rank * 24, rank * 24 + 24), slice(rank * 64, rank * 64 + 64)
    options = {"shard": Shard(rank, 2), "keeps_codes": keeps_codes}

    checkpoint, values = open_layer(tmp_path, form, weight, **options)
    by_outputs = Linear.load_fused(checkpoint, [("layer", 48)], 128, has_bias=False)
    checkpoint, _ = open_layer(tmp_path, form, weight, **options)
    by_inputs = Linear.load_summed(checkpoint, "layer", 48, 128, has_bias=False)

    assert isinstance(by_outputs.weight, QuantisedWeight) == keeps_codes
    # Inputs of a shuffled layer that are a rank's come from parts of groups: their values are taken.
    assert isinstance(by_inputs.weight, QuantisedWeight) == (keeps_codes and not form.is_shuffled)
    assert torch.allclose(by_outputs(x), x @ values[own_rows].T, atol=1e-4)
    assert torch.allclose(
        by_inputs._multiply(x[:, own_columns], has_relu=False, gives_float32=False),
        x[:, own_columns] @ values[:, own_columns].T,
        atol=1e-4,
    )


def test_kept_codes_take_half_a_byte_an_element_and_what_their_groups_add(tmp_path: Path) -> None:
    checkpoint, _ = open_layer(tmp_path, CodedFormat("awq", group_size=128), torch.randn(64, 256))
    read: list[int] = []
    checkpoint.on_read = read.append

    weight = checkpoint.take_coded([("layer.weight", 64)], 256)

    assert weight is not None
    assert weight.nbytes == 64 * 256 // 2 + 2 * 64 * (2 + 1)
    assert read == [weight.nbytes]


def test_layers_whose_inputs_are_grouped_differently_are_widened_to_be_stacked(tmp_path: Path) -> None:
    form = CodedFormat("gptq", is_shuffled=True)
    first, values = encode(torch.randn(16, 64), form)
    second = first | {"g_idx": first["g_idx"].flip(0).contiguous()}
    tensors = {
        f"{name}.{part}": one.clone()
        for name, parts in (("a", first), ("b", second))
        for part, one in parts.items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(
        tmp_path, name_prefix="", dtype=torch.float32, device=torch.device("cpu"), layout="packed",
        quantisation=Quantisation("gptq", 4, 32, 1), keeps_codes=True,
    )  # fmt: skip

    layer = Linear.load_fused(checkpoint, [("a", 16), ("b", 16)], 64, has_bias=False)

    assert not isinstance(layer.weight, QuantisedWeight)
    x = torch.randn(2, 64)
    assert torch.allclose(layer(x)[:, :16], x @ values.T, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "quant_method='bitsandbytes': only awq, gptq, fp8, compressed-tensors are served",
        ),
        ({"quant_method": "fp8", "weight_block_size": [8, 8]}, "weight_block_size=[8, 8]: must be absent"),
        (COMPRESSED | {"format": "pack-quantized"}, "format='pack-quantized': must be float-quantized"),
        (
            COMPRESSED | {"config_groups": {"g": {"weights": E4M3 | {"strategy": "channel"}}}},
            "config_groups: g: input_activations=None: must be of 8 bits and type float",
        ),
        (
            COMPRESSED
            | {"config_groups": {"g": {"weights": E4M3 | {"strategy": "block"}, "input_activations": E4M3}}},
            "config_groups: g: weights: strategy='block': must be tensor or channel",
        ),
        ({"quant_method": "awq", "bits": 3}, "bits=3: must be 4 with awq"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version='gemv': must be gemm"),
        ({"quant_method": "awq", "bits": 4, "zero_point": False}, "zero_point=False: must be true"),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 48},
            "group_size=48: must be one of 32, 64, 128, -1",
        ),
        ({"quant_method": "gptq", "bits": 2}, "bits=2: must be 4 or 8"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"x": {}}}, "dynamic={'x': {}}: must be absent"),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 64, "checkpoint_format": "marlin"},
            "checkpoint_format='marlin': must be gptq or gptq_v2",
        ),
    ],
)
def test_what_is_not_served_is_refused_by_field_value_and_rule(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError) as caught:
        read_quantisation(ConfigFields("config.json", {"quantization_config": config}))

    assert f"config.json: quantization_config: {message}" in str(caught.value)


@pytest.mark.parametrize(
    ("part", "changed", "message"),
    [
        ("qzeros", None, "qzeros is missing"),
        (
            "scales",
            torch.zeros(3, 64),
            "scales has shape [3, 64], gptq, 4 bits, groups of 32 asks for [2, 64]",
        ),
        ("qweight", torch.zeros(8, 64), "qweight is torch.float32, must be int32"),
        ("g_idx", torch.full((64,), 2, dtype=torch.int32), "g_idx must name groups below 2"),
    ],
)
def test_broken_layer_is_refused_by_its_tensor(
    part: str, changed: Tensor | None, message: str, plain: Path, tmp_path: Path
) -> None:
    coded, _ = write_coded_folder(plain, LAYER, tmp_path)
    tensors = load_file(coded / "model.safetensors")
    name = next(name for name in tensors if name.endswith(f"q_proj.{part}"))
    del tensors[name]
    save_file(tensors if changed is None else tensors | {name: changed}, coded / "model.safetensors")

    with pytest.raises(ModelLoadError) as caught:
        load(coded)

    assert f"self_attn.q_proj.{message}" in str(caught.value)


def test_model_without_layers_of_outputs_by_inputs_and_folder_without_codes_are_refused(
    tmp_path: Path,
) -> None:
    gpt2 = make_model_folder("gpt2", tmp_path / "gpt2")
    llama = make_model_folder("llama", tmp_path / "llama")
    for folder, message in (
        (gpt2, "GPT2LMHeadModel is served with plain weights only"),
        (llama, "holds no qweight, the config says awq, 4 bits, groups of 32"),
    ):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps(config | {"quantization_config": CodedFormat("awq").config})
        )

        with pytest.raises(ModelLoadError, match=message):
            load(folder)


def test_bias_that_is_not_zero_and_has_no_place_is_told(plain: Path, tmp_path: Path) -> None:
    coded, _ = write_coded_folder(plain, LAYER, tmp_path, has_biases=True)
    tensors = load_file(coded / "model.safetensors")
    name = next(name for name in tensors if name.endswith("o_proj.bias"))
    tensors[name][3] = 1.0
    save_file(tensors, coded / "model.safetensors")

    with pytest.raises(ModelLoadError, match=r"the first is .*o_proj\.bias"):
        load(coded)


@pytest.mark.parametrize("method", FLOAT8_CONFIGS)
def test_float8_checkpoint_gives_the_oracles_logits_when_widened_and_nearly_when_kept(
    method: str, plain: Path, tmp_path: Path
) -> None:
    coded, valued = write_float8_folder(
        plain, FLOAT8_CONFIGS[method], tmp_path, per_output=method == "compressed-tensors"
    )
    exact = oracle_logits(valued)

    widened, kept = logits_of(load(coded, layout="packed")), logits_of(load(coded, keeps=METHODS))

    assert (widened - exact).abs().max() < TOLERANCE
    # Rounding rows to three bits moves logits by a part of how much they vary.
    assert TOLERANCE < (kept - exact).norm() < 0.6 * (exact - exact.mean()).norm()


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_takes_its_share_of_a_float8_layer(rank: int, tmp_path: Path) -> None:
    weight = (torch.randn(32, 64) * 20).to(torch.float8_e4m3fn)
    scales = torch.rand(32, 1) + 0.5
    save_file({"layer.weight": weight, "layer.weight_scale": scales}, tmp_path / "model.safetensors")
    own = slice(rank * 16, rank * 16 + 16)

    def open_share() -> Checkpoint:
        return Checkpoint.open(
            tmp_path, name_prefix="", dtype=torch.bfloat16, device=torch.device("cpu"),
            shard=Shard(rank, 2), quantisation=Quantisation("fp8", 8, 0), keeps_codes=True,
        )  # fmt: skip

    by_outputs = Linear.load_fused(open_share(), [("layer", 32)], 64, has_bias=False).weight
    by_inputs = Linear.load_summed(open_share(), "layer", 32, 64, has_bias=False).weight

    assert isinstance(by_outputs, Float8Weight)
    assert torch.equal(by_outputs.values.float(), weight.float()[own])
    assert torch.equal(by_outputs.scales, scales[own, 0])
    assert isinstance(by_inputs, Float8Weight)
    assert torch.equal(by_inputs.values.float(), weight.float()[:, rank * 32 : rank * 32 + 32])
    assert torch.equal(by_inputs.scales, scales[:, 0])


def test_float8_layer_of_another_type_or_form_is_refused_by_its_tensor(plain: Path, tmp_path: Path) -> None:
    coded, _ = write_float8_folder(plain, FLOAT8_CONFIGS["fp8"], tmp_path, per_output=False)
    tensors = load_file(coded / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    for change, message in (
        ({name: tensors[name].float()}, "q_proj.weight is torch.float32, must be torch.float8_e4m3fn"),
        ({f"{name}_scale": torch.ones(3)}, r"q_proj.weight_scale has shape \[3\]: must be one number"),
    ):
        save_file(tensors | change, coded / "model.safetensors")

        with pytest.raises(ModelLoadError, match=message):
            load(coded)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_engine_gives_the_tokens_of_the_values_that_codes_stand_for(
    num_ranks: int, plain: Path, tmp_path: Path
) -> None:
    coded, valued = write_coded_folder(plain, CodedFormat("gptq", is_shuffled=True), tmp_path)
    requests = {str(n): (random_prompt(4 + 9 * n, n), GREEDY) for n in range(3)}
    shared = make_engine(coded, tensor_parallel_size=num_ranks)
    try:
        actual = generate(shared, requests)
    finally:
        shared.close()

    expected = generate(make_engine(valued), requests)

    assert [actual.tokens(id) for id in requests] == [expected.tokens(id) for id in requests]
