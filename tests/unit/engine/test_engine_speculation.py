"""Running tokens ahead of their turn changes how fast tokens come, and nothing else."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

import engine.builtin
from engine.sampling import SamplingParams
from engine.speculation import PromptLookup
from tests.unit.engine.engine_factory import GREEDY, Run, generate, make_engine, random_prompt
from tests.unit.engine.test_engine_soak import BEGINNINGS, draw_params

LONG = replace(GREEDY, max_tokens=40)
# Of random models nothing repeats itself, unless they have little to choose from.
BABBLE = replace(LONG, logit_bias={5: 100.0, 6: 100.0})


def test_lookup_guesses_what_followed_the_longest_run_that_stood_before() -> None:
    after_two = [9, 3, 4, 5]
    after_four = [1, 2, 3, 4, 6]

    assert PromptLookup(2).propose([*after_four, *after_two, 1, 2, 3, 4], 8) == (6, 9)
    assert PromptLookup(2).propose([*after_four, *after_two, 8, 8, 3, 4], 8) == (5, 8)


def test_lookup_goes_on_around_a_circle_shorter_than_its_proposal() -> None:
    assert PromptLookup(7).propose([1, 2, 3, 1, 2, 3, 1, 2], 8) == (3, 1, 2, 3, 1, 2, 3)


def test_lookup_guesses_nothing_where_nothing_stood_before_and_no_more_than_it_may() -> None:
    assert PromptLookup(3).propose([1, 2, 3, 4], 8) == ()
    assert PromptLookup(3).propose([1], 8) == ()
    assert PromptLookup(3).propose([1, 2, 9, 9, 9, 1, 2], 1) == (9,)


def test_lookup_rests_ever_longer_while_it_is_wrong_and_grows_again_when_it_is_right() -> None:
    lookup = PromptLookup(4)
    tokens = [1, 2] * 6

    rests = []
    for _ in range(6):
        assert lookup.propose(tokens, 4)
        lookup.learn(4, 0)
        rests.append(0)
        while not lookup.propose(tokens, 4):
            rests[-1] += 1
    lengths = []
    for _ in range(3):
        proposal = lookup.propose(tokens, 4)
        lookup.learn(len(proposal), len(proposal))
        lengths.append(len(proposal))

    assert rests == [1, 3, 7, 15, 16, 16]
    assert lengths == [1, 2, 4]


def _repetitive_prompt(seed: int) -> list[int]:
    return random_prompt(5, seed) * 5


def _pair(folder: Path, requests: dict[str, tuple[list[int], SamplingParams]], **config: int) -> list[Run]:
    return [
        generate(make_engine(folder, num_speculative_tokens=num_tokens, **config), requests)
        for num_tokens in (0, 6)
    ]


def _counts(run: Run) -> tuple[int, int]:
    steps = [step.stats for step in run.steps]
    return sum(step.num_proposed_tokens for step in steps), sum(step.num_accepted_tokens for step in steps)


def _num_steps(run: Run) -> int:
    return sum(output.phases.num_steps for output in run.outputs.values())


@pytest.mark.parametrize("model", ["opt", "llama", "builtin"])
def test_speculation_gives_the_same_greedy_tokens_in_fewer_steps(
    model: str, opt_folder: Path, llama_folder: Path
) -> None:
    folder = {"opt": opt_folder, "llama": llama_folder, "builtin": engine.builtin.path()}[model]
    prompts = [_repetitive_prompt(seed) for seed in range(4)]
    prompts += [random_prompt(30, seed) for seed in range(4, 8)]
    requests = {str(index): (prompt, BABBLE if index % 2 else LONG) for index, prompt in enumerate(prompts)}

    plain, ahead = _pair(folder, requests)

    assert [ahead.tokens(id) for id in requests] == [plain.tokens(id) for id in requests]
    num_proposed, num_accepted = _counts(ahead)
    assert 0 < num_accepted <= num_proposed
    assert _num_steps(ahead) < _num_steps(plain)
    assert _counts(plain) == (0, 0)


def test_speculation_gives_the_same_with_every_feature_mixed_on_a_cache_too_small() -> None:
    rng = random.Random(7)
    encode = make_engine(engine.builtin.path()).model_info.tokenizer.encode
    requests = {
        str(index): (encode(" ".join(rng.choices(BEGINNINGS[:2], k=rng.randint(1, 2)))), draw_params(rng))
        for index in range(60)
    }

    plain, ahead = _pair(engine.builtin.path(), requests, block_size=8, num_blocks=32)

    for id, (_, params) in requests.items():
        ours, theirs = ahead.outputs[id], plain.outputs[id]
        assert [completion.token_ids for completion in ours.completions] == [
            completion.token_ids for completion in theirs.completions
        ], params
        for own, other in zip(ours.completions, theirs.completions, strict=True):
            assert own.text == other.text
            assert (own.finish_reason, own.stop_reason) == (other.finish_reason, other.stop_reason)
            assert own.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=1e-3)
    assert sum(step.stats.num_preempted for step in ahead.steps) > 0
    assert _counts(ahead)[1] > 0


def test_speculation_tells_tokens_of_one_step_in_one_delta_and_counts_them_for_the_request(
    opt_folder: Path,
) -> None:
    run = _pair(opt_folder, {"a": (_repetitive_prompt(1), BABBLE)})[1]

    deltas = [delta for step in run.steps for delta in step.deltas]
    phases = run.outputs["a"].phases

    assert all(len(step.deltas) <= 1 for step in run.steps)
    assert max(len(delta.token_ids) for delta in deltas) > 1
    assert len(run.token_ids["a", 0]) == BABBLE.max_tokens
    assert (phases.num_proposed_tokens, phases.num_accepted_tokens) == _counts(run)


def test_speculation_leaves_only_kept_tokens_for_later_requests_to_find(opt_folder: Path) -> None:
    engine_under_test = make_engine(opt_folder, num_speculative_tokens=6)
    first = generate(engine_under_test, {"a": (_repetitive_prompt(2), BABBLE)})
    conversation = [*_repetitive_prompt(2), *first.tokens("a")[0], *random_prompt(3, 9)]

    again = generate(engine_under_test, {"b": (conversation, LONG)})
    fresh = generate(make_engine(opt_folder), {"b": (conversation, LONG)})

    num_proposed, num_accepted = _counts(first)
    assert 0 < num_accepted < num_proposed
    assert again.outputs["b"].usage.cached_tokens > len(_repetitive_prompt(2))
    assert again.tokens("b") == fresh.tokens("b")


def test_speculation_is_left_out_where_the_output_follows_a_structure_or_beams_are_ranked(
    opt_folder: Path,
) -> None:
    beams = SamplingParams(max_tokens=12, use_beam_search=True, n=2, ignore_eos=True)

    plain, ahead = _pair(opt_folder, {"a": (_repetitive_prompt(3), beams)})

    assert _counts(ahead) == (0, 0)
    assert ahead.tokens("a") == plain.tokens("a")
