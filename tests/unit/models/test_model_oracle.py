"""Every architecture against `transformers` on the same random weights, through shuffled pages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from engine.checkpoint import WeightLayout
from engine.models import CausalLM
from engine.weights import load_model
from tests.support.model_folders import MODEL_KINDS, ModelKind, make_model_folder
from tests.support.paged_driver import PagedDriver, PagedSequence

torch.set_num_threads(1)

TOLERANCE = 1e-3
PROMPT_LENGTHS = (1, 5, 13, 30)


@dataclass(frozen=True, slots=True)
class Pair:
    ours: CausalLM
    oracle: Any

    def oracle_logits(self, token_ids: list[int]) -> Tensor:
        logits: Tensor = self.oracle(torch.tensor([token_ids])).logits[0]
        return logits.float()


@pytest.fixture(scope="module", params=MODEL_KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind: ModelKind = request.param
    return make_model_folder(kind, tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def inference_mode() -> Iterator[None]:
    with torch.inference_mode():
        yield


def load_pair(folder: Path, dtype: torch.dtype = torch.float32) -> Pair:
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return Pair(load_model(str(folder), dtype=dtype, device=torch.device("cpu")).model, oracle)


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:
    return load_pair(folder)


def load_as(folder: Path, layout: WeightLayout) -> CausalLM:
    return load_model(str(folder), dtype=torch.float32, device=torch.device("cpu"), layout=layout).model


def make_prompts(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 384, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


def greatest_difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def test_prefill_of_mixed_lengths_gives_the_oracles_logits(pair: Pair) -> None:
    prompts = make_prompts()

    ours = PagedDriver(pair.ours).run([(PagedSequence(prompt), len(prompt)) for prompt in prompts])

    for prompt, logits in zip(prompts, ours, strict=True):
        assert logits.dtype is torch.float32
        assert greatest_difference(logits, pair.oracle_logits(prompt)) < TOLERANCE


def test_prefill_in_chunks_beside_decodes_gives_the_oracles_logits(pair: Pair) -> None:
    driver = PagedDriver(pair.ours, block_size=3)
    decoding, chunked = (PagedSequence(prompt) for prompt in (make_prompts(1)[2], make_prompts(2)[3]))
    got: dict[int, list[Tensor]] = {id(decoding): [], id(chunked): []}
    steps = [[(decoding, 12)], [(decoding, 1), (chunked, 7)], [(chunked, 20)], [(chunked, 3)]]

    for step in steps:
        for (sequence, _), logits in zip(step, driver.run(step), strict=True):
            got[id(sequence)].append(logits)

    for sequence in (decoding, chunked):
        ours = torch.cat(got[id(sequence)])
        assert greatest_difference(ours, pair.oracle_logits(sequence.token_ids)) < TOLERANCE


def test_packed_weights_give_the_oracles_logits(folder: Path, pair: Pair) -> None:
    prompts = make_prompts()

    ours = PagedDriver(load_as(folder, "packed")).run(
        [(PagedSequence(prompt), len(prompt)) for prompt in prompts]
    )

    for prompt, logits in zip(prompts, ours, strict=True):
        assert greatest_difference(logits, pair.oracle_logits(prompt)) < TOLERANCE


@pytest.mark.parametrize(("layout", "most"), [("int8", 0.25), ("w8a16", 0.15), ("fp8", 0.6)])
def test_weights_of_8_bits_move_logits_by_a_fraction_of_their_spread(
    layout: WeightLayout, most: float, folder: Path, pair: Pair
) -> None:
    prompts = make_prompts()

    ours = PagedDriver(load_as(folder, layout)).run(
        [(PagedSequence(prompt), len(prompt)) for prompt in prompts]
    )

    for prompt, logits in zip(prompts, ours, strict=True):
        exact = pair.oracle_logits(prompt)
        # Steps of 1/127 of the largest of 50 make 1 % of noise a layer, the three bits of e4m3 4 %, which a
        # dozen layers without training multiply; a scale or an order that were wrong would move logits by as
        # much as they vary.
        assert 0 < (logits - exact).norm() < most * (exact - exact.mean()).norm()


def test_greedy_decoding_of_a_batch_gives_the_oracles_tokens(pair: Pair) -> None:
    prompts = make_prompts(3)

    ours = PagedDriver(pair.ours, block_size=4).generate(prompts, 16)

    assert ours == [generate_with_oracle(pair, prompt, 16) for prompt in prompts]
    assert len({token for tokens in ours for token in tokens}) > 5, "degenerate weights prove little"


def generate_with_oracle(pair: Pair, prompt: list[int], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(pair.oracle_logits(tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def test_bfloat16_is_as_close_to_float32_as_the_oracles_bfloat16(folder: Path, pair: Pair) -> None:
    """Both round in about the same places, so our error may not be a multiple of theirs."""
    halves = load_pair(folder, torch.bfloat16)
    prompts = make_prompts(4)
    ours = PagedDriver(halves.ours, dtype=torch.bfloat16).run([(PagedSequence(p), len(p)) for p in prompts])

    exact = [pair.oracle_logits(prompt) for prompt in prompts]
    our_error = torch.cat([a - b for a, b in zip(ours, exact, strict=True)]).square().mean().sqrt()
    their_error = (
        torch.cat(
            [halves.oracle_logits(prompt) - logits for prompt, logits in zip(prompts, exact, strict=True)]
        )
        .square()
        .mean()
        .sqrt()
    )

    assert our_error < 1.5 * their_error


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", MODEL_KINDS)
def test_checkpoint_of_half_precision_in_parts_gives_the_oracles_logits(
    kind: ModelKind, stored: torch.dtype, tmp_path: Path
) -> None:
    pair = load_pair(make_model_folder(kind, tmp_path, dtype=stored, max_shard_size="40KB"))
    prompts = make_prompts(5)

    ours = PagedDriver(pair.ours).run([(PagedSequence(prompt), len(prompt)) for prompt in prompts])

    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for prompt, logits in zip(prompts, ours, strict=True):
        assert greatest_difference(logits, pair.oracle_logits(prompt)) < TOLERANCE


_LONG_ROPE = {"rope_type": "linear", "rope_theta": 20000.0, "factor": 4.0}
_GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
VARIANTS: tuple[tuple[ModelKind, dict[str, Any]], ...] = (
    ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    ("opt", {"activation_function": "gelu"}),
    ("opt", {"tie_word_embeddings": False}),
    ("opt", {"_remove_final_layer_norm": True}),
    ("opt-350m-like", {"word_embed_proj_dim": 48}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "n_inner": 72, "activation_function": "gelu"}),
    ("gpt2", {"scale_attn_weights": False, "activation_function": "relu"}),
    ("gpt2", {"tie_word_embeddings": False}),
    ("llama", {"mlp_bias": True, "attention_bias": True, "rms_norm_eps": 1e-3}),
    ("llama", {"rope_parameters": _LONG_ROPE, "num_key_value_heads": 6}),
    ("llama", {"num_key_value_heads": 1, "head_dim": 8}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 1}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 5}),
    ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    ("gemma3", {"rope_parameters": _GEMMA_ROPE, "query_pre_attn_scalar": 256}),
    ("gemma3", {"final_logit_softcapping": 0.5}),
    ("gemma3", {"attention_bias": True, "layer_types": ["full_attention"] * 3}),
)


@pytest.mark.parametrize(("kind", "fields"), VARIANTS, ids=[f"{kind}-{'-'.join(f)}" for kind, f in VARIANTS])
def test_what_a_config_may_change_gives_the_oracles_logits(
    kind: ModelKind, fields: dict[str, Any], tmp_path: Path
) -> None:
    pair = load_pair(make_model_folder(kind, tmp_path, **fields))
    prompts = make_prompts(6)

    ours = PagedDriver(pair.ours).run([(PagedSequence(prompt), len(prompt)) for prompt in prompts])

    for prompt, logits in zip(prompts, ours, strict=True):
        assert greatest_difference(logits, pair.oracle_logits(prompt)) < TOLERANCE
