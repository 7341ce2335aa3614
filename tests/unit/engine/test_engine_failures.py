"""A request that fails inside the engine fails alone: the others' tokens are what they are without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cuda_ops.native import KernelChoice, use_kernels
from engine.config import EngineConfig
from engine.core import Engine
from engine.sampling import SamplingParams
from engine.tokenizer import Tokenizer
from engine.weights import load_model
from tests.support.model_folders import make_model_folder
from tests.unit.engine.engine_factory import GREEDY, Run, generate, make_engine, random_prompt, run_to_end

POISON = 383
SAMPLED = SamplingParams(max_tokens=16, seed=3, ignore_eos=True)
OTHERS = {
    "greedy": (random_prompt(9, 1), GREEDY),
    "drawn": (random_prompt(21, 2), replace(SAMPLED, n=2, top_p=0.9)),
    "beams": (random_prompt(14, 3), replace(GREEDY, n=3, use_beam_search=True)),
    "scored": (random_prompt(30, 4), replace(GREEDY, prompt_logprobs=1, logprobs=2)),
}
KINDS = {
    "greedy": GREEDY,
    "drawn": SAMPLED,
    "from a nucleus": replace(SAMPLED, top_p=0.8),
    "from a few": replace(SAMPLED, top_k=5, n=3),
    "best of": replace(SAMPLED, n=1, best_of=3),
    "beams": replace(GREEDY, n=3, use_beam_search=True),
    "penalised": replace(SAMPLED, repetition_penalty=1.3, logit_bias={5: 3.0}, logprobs=3),
    "scored only": replace(GREEDY, max_tokens=0, echo=True, logprobs=1),
}


@pytest.fixture(scope="module")
def poisoned_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is well until it reads one token, as a checkpoint that overflows for some prompts."""
    folder = make_model_folder("llama", tmp_path_factory.mktemp("poisoned"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][POISON] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def same(run: Run, expected: Run) -> bool:
    return all(
        run.tokens(name) == expected.tokens(name) and run.outputs[name].failure is None for name in OTHERS
    )


@pytest.mark.parametrize("num_speculative_tokens", [0, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_request_whose_logits_are_not_finite_fails_alone(
    poisoned_folder: Path, kind: str, num_speculative_tokens: int
) -> None:
    expected = generate(make_engine(poisoned_folder), OTHERS)
    engine = make_engine(poisoned_folder, num_speculative_tokens=num_speculative_tokens)
    bad = [*random_prompt(8, 5), POISON, *random_prompt(3, 6)]

    run = generate(engine, {"bad": (bad, KINDS[kind]), **OTHERS})

    failure = run.outputs["bad"].failure
    assert failure is not None
    assert (failure.reason, failure.retryable) == ("logits_not_finite", False)
    assert run.outputs["bad"].completions == ()
    assert same(run, expected)
    assert run.steps[-1].stats.num_blocks_used == 0


def test_request_that_meets_its_nan_late_keeps_what_it_had_streamed(poisoned_folder: Path) -> None:
    """The model is made to say the bad token, so that the failure comes with the token after it."""
    params = replace(GREEDY, logit_bias={POISON: 100.0}, n=1)
    engine = make_engine(poisoned_folder)

    run = generate(engine, {"bad": (random_prompt(8, 5), params), **OTHERS})

    assert run.outputs["bad"].failure is not None
    assert run.token_ids["bad", 0] == [POISON]
    assert same(run, generate(make_engine(poisoned_folder), OTHERS))


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_blocks_of_a_failed_request_do_no_harm_to_the_next_owner(
    poisoned_folder: Path, kernels: KernelChoice
) -> None:
    expected = generate(make_engine(poisoned_folder, kernels=kernels), OTHERS)
    engine = make_engine(poisoned_folder, num_blocks=44, kernels=kernels, keeps_prefixes=False)
    generate(engine, {str(i): ([POISON] * 60, GREEDY) for i in range(3)})

    run = generate(engine, OTHERS)
    use_kernels("auto")

    assert same(run, expected)


class BrokenTokenizer(Tokenizer):
    """Cannot decode one token."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        if POISON in ids:
            raise ValueError("a token that cannot be decoded")
        return super().decode(ids, skip_special_tokens)


def make_mute_engine(folder: Path) -> Engine:
    loaded = load_model(str(folder), dtype=torch.float32, device=torch.device("cpu"))
    broken = BrokenTokenizer.from_folder(folder)
    config = EngineConfig(model=str(folder), block_size=4, num_blocks=400, max_num_batched_tokens=256)
    return Engine(replace(loaded, tokenizer=broken), config)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "scored only"])
def test_request_whose_text_cannot_be_made_fails_alone(llama_folder: Path, kind: str) -> None:
    expected = generate(make_engine(llama_folder), OTHERS)
    bad = replace(KINDS[kind], logit_bias={POISON: 100.0}, logprobs=1)

    run = generate(make_mute_engine(llama_folder), {"bad": ([*random_prompt(8, 5), POISON], bad), **OTHERS})

    failure = run.outputs["bad"].failure
    assert failure is not None
    assert failure.reason == "request_failed"
    assert "ValueError" in failure.message
    assert "decoded" not in failure.message, "what was raised may tell the text"
    assert same(run, expected)


def test_request_whose_text_cannot_be_made_can_be_aborted(llama_folder: Path) -> None:
    engine = make_mute_engine(llama_folder)
    engine.add_request("bad", [*random_prompt(8, 5), POISON], SAMPLED)

    assert engine.abort("bad")
    run = run_to_end(engine)

    assert run.outputs["bad"].failure is not None
    assert not engine.has_work()
