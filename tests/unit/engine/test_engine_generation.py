from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from engine.config import EngineConfig
from engine.core import Engine
from engine.errors import ConfigError, InvalidRequestError, StepError
from engine.sampling import SamplingParams
from engine.stats import StepStats
from engine.weights import load_model
from tests.unit.engine.engine_factory import GREEDY, Run, generate, make_engine, random_prompt, run_to_end

SAMPLED = SamplingParams(max_tokens=16, temperature=1.3, top_p=0.9, seed=7, ignore_eos=True)


def greedy_reference(model: transformers.PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    ids = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
    )
    return ids[0, len(prompt) :].tolist()


def test_engine_gives_the_greedy_tokens_of_transformers_for_mixed_lengths(
    opt_folder: Path, opt_reference: transformers.PreTrainedModel
) -> None:
    prompts = {str(size): random_prompt(size, seed=size) for size in (1, 3, 17, 64, 65, 130)}

    run = generate(make_engine(opt_folder), {name: (prompt, GREEDY) for name, prompt in prompts.items()})

    for name, prompt in prompts.items():
        assert list(run.tokens(name)[0]) == greedy_reference(opt_reference, prompt, 16), name


def test_engine_batches_requests_that_were_added_together(opt_folder: Path) -> None:
    run = generate(make_engine(opt_folder), {str(i): (random_prompt(4, i), GREEDY) for i in range(16)})

    assert max(step.stats.batch_size for step in run.steps) == 16
    assert len(run.steps) == 16
    assert all(output.phases.mean_batch_size == 16 for output in run.outputs.values())


def test_engine_lets_a_request_join_while_others_decode(opt_folder: Path) -> None:
    engine = make_engine(opt_folder)
    engine.add_request("early", random_prompt(8), GREEDY)
    run = Run()
    for _ in range(4):
        run.add(engine.step())
    engine.add_request("late", random_prompt(8, 1), GREEDY)
    joining = engine.step()
    run.add(joining)
    run_to_end(engine, run)

    assert joining.stats.joined == ("late",)
    assert joining.stats.num_decode_tokens == 1
    assert joining.stats.num_prefill_tokens == 8
    assert run.tokens("early") == generate(make_engine(opt_folder), {"a": (random_prompt(8), GREEDY)}).tokens(
        "a"
    )


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SAMPLED,
        replace(SAMPLED, n=3),
        replace(GREEDY, n=3, use_beam_search=True),
        replace(GREEDY, logprobs=2, echo=True),
        replace(SAMPLED, frequency_penalty=1.0, repetition_penalty=1.2),
    ],
    ids=["greedy", "sampled", "n", "beam", "echo", "penalties"],
)
def test_engine_gives_the_same_output_when_requests_are_preempted(
    opt_folder: Path, params: SamplingParams
) -> None:
    requests = {str(i): (random_prompt(9 + 5 * i, i), params) for i in range(4)}

    roomy = generate(make_engine(opt_folder), requests)
    tight = generate(make_engine(opt_folder, num_blocks=26), requests)

    assert sum(step.stats.num_preempted for step in roomy.steps) == 0
    assert sum(step.stats.num_preempted for step in tight.steps) > 0
    for name in requests:
        assert tight.tokens(name) == roomy.tokens(name)
        texts = [completion.text for completion in tight.outputs[name].completions]
        assert texts == [completion.text for completion in roomy.outputs[name].completions]
        assert _num_logprobs(tight, name) == _num_logprobs(roomy, name)


def _num_logprobs(run: Run, name: str) -> list[int]:
    completions = run.outputs[name].completions
    return [len(completion.logprobs.tokens) for completion in completions if completion.logprobs is not None]


def test_engine_gives_a_seeded_request_its_tokens_whatever_else_is_in_the_batch(opt_folder: Path) -> None:
    prompt = random_prompt(11)
    alone = generate(make_engine(opt_folder), {"seeded": (prompt, SAMPLED)})
    others = {str(i): (random_prompt(5 + i, i), replace(SAMPLED, seed=i, top_p=1.0)) for i in range(8)}
    crowded = generate(make_engine(opt_folder), {**others, "seeded": (prompt, SAMPLED)})
    reseeded = generate(make_engine(opt_folder), {"seeded": (prompt, replace(SAMPLED, seed=8))})

    assert crowded.tokens("seeded") == alone.tokens("seeded")
    assert reseeded.tokens("seeded") != alone.tokens("seeded")


def test_engine_computes_the_prompt_once_and_shares_its_blocks_when_n_is_four(opt_folder: Path) -> None:
    engine = make_engine(opt_folder)
    engine.add_request("r", random_prompt(22), replace(SAMPLED, n=4))

    first, second = engine.step(), engine.step()
    run = run_to_end(engine, _run_of(first, second))

    assert first.stats.num_prefill_tokens == 22
    assert first.stats.num_blocks_used == 6
    assert len(first.deltas) == 4
    assert second.stats.num_prefill_tokens == 0
    assert second.stats.batch_size == 4
    assert second.stats.num_blocks_used == 5 + 4
    assert len(set(run.tokens("r"))) == 4
    assert run.outputs["r"].usage.completion_tokens == 64


def _run_of(*steps: object) -> Run:
    run = Run()
    for step in steps:
        run.add(step)  # type: ignore[arg-type]  # StepOutput, spelt loosely for the star
    return run


def test_engine_frees_the_blocks_of_an_aborted_request_by_the_next_step(opt_folder: Path) -> None:
    engine = make_engine(opt_folder)
    engine.add_request("kept", random_prompt(8), GREEDY)
    engine.add_request("gone", random_prompt(40), replace(GREEDY, n=2))
    for _ in range(3):
        engine.step()

    assert engine.abort("gone")
    step = engine.step()

    assert step.stats.num_blocks_used == 3
    assert step.stats.left == ("gone",)
    assert step.finished[0].completions[0].finish_reason == "abort"
    assert len(step.finished[0].completions[0].token_ids) == 3
    assert not engine.abort("gone")
    engine.check_invariants()


def test_engine_reports_an_aborted_request_that_never_ran(opt_folder: Path) -> None:
    engine = make_engine(opt_folder)
    engine.add_request("gone", random_prompt(8), GREEDY)
    engine.abort("gone")

    assert engine.has_work()
    step = engine.step()

    assert [output.request_id for output in step.finished] == ["gone"]
    assert step.finished[0].phases.intervals[0].name == "wait"
    assert not engine.has_work()


@pytest.mark.parametrize(
    "params", [SAMPLED, replace(SAMPLED, n=2, echo=True), replace(SAMPLED, stop=("a", "e "))]
)
def test_engine_deltas_join_to_the_completion(opt_folder: Path, params: SamplingParams) -> None:
    requests = {str(i): (random_prompt(6, i), replace(params, seed=i, max_tokens=30)) for i in range(5)}

    run = generate(make_engine(opt_folder), requests)

    for output in run.outputs.values():
        for completion in output.completions:
            assert run.texts[output.request_id, completion.index] == completion.text
            assert tuple(run.token_ids[output.request_id, completion.index]) == completion.token_ids


def test_engine_phases_are_contiguous_and_show_the_preemption(opt_folder: Path) -> None:
    requests = {str(i): (random_prompt(9 + 5 * i, i), GREEDY) for i in range(4)}

    run = generate(make_engine(opt_folder, num_blocks=26), requests)

    for output in run.outputs.values():
        phases = output.phases
        names = [interval.name for interval in phases.intervals]
        assert names == ["wait", "prefill", "decode"] * (1 + phases.num_preemptions)
        assert phases.intervals[0].start == phases.arrived_at
        assert phases.intervals[-1].end == phases.finished_at
        assert phases.first_token_at == phases.intervals[1].end
        for before, after in zip(phases.intervals, phases.intervals[1:], strict=False):
            assert before.end == after.start
    assert sum(output.phases.num_preemptions for output in run.outputs.values()) > 0


def test_engine_ends_at_eos_and_leaves_its_text_out_unless_told_to_ignore_it(
    opt_folder: Path, opt_reference: transformers.PreTrainedModel
) -> None:
    prompt = random_prompt(12, 3)
    tokens = greedy_reference(opt_reference, prompt, 12)
    stop = tokens[5]
    first = tokens.index(stop)
    engine = make_engine(opt_folder)

    params = replace(GREEDY, max_tokens=12)
    run = generate(
        engine,
        {
            "without": (prompt, params),
            "stopped": (prompt, replace(params, stop_token_ids=(stop,))),
            "kept": (prompt, replace(params, stop_token_ids=(stop,), include_stop_str_in_output=True)),
        },
    )

    stopped, kept = run.outputs["stopped"].completions[0], run.outputs["kept"].completions[0]
    assert stopped.token_ids == kept.token_ids == tuple(tokens[: first + 1])
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    decode = engine.model_info.tokenizer.decode
    assert stopped.text == decode([*prompt, *tokens[:first]])[len(decode(prompt)) :]
    assert kept.text == decode([*prompt, *tokens[: first + 1]])[len(decode(prompt)) :]
    assert run.outputs["without"].completions[0].finish_reason == "length"


def test_engine_returns_the_best_n_of_best_of_by_mean_logprob(opt_folder: Path) -> None:
    params = replace(SAMPLED, max_tokens=6, logprobs=0)
    every = generate(make_engine(opt_folder), {"r": (random_prompt(9), replace(params, n=6))})
    best = generate(make_engine(opt_folder), {"r": (random_prompt(9), replace(params, n=2, best_of=6))})

    ranked = sorted(
        every.outputs["r"].completions, key=lambda c: -(c.cumulative_logprob or 0) / len(c.token_ids)
    )
    assert best.tokens("r") == [completion.token_ids for completion in ranked[:2]]
    assert [completion.index for completion in best.outputs["r"].completions] == [0, 1]
    assert all(not step.deltas for step in best.steps)
    assert best.outputs["r"].usage.completion_tokens == 36


@pytest.mark.parametrize("chunk", [64, 16])
def test_engine_echo_gives_the_log_softmax_of_transformers(
    opt_folder: Path, opt_reference: transformers.PreTrainedModel, chunk: int
) -> None:
    prompt = random_prompt(40)
    params = replace(GREEDY, max_tokens=5, echo=True, logprobs=3)
    engine = make_engine(opt_folder, max_num_batched_tokens=chunk)

    completion = generate(engine, {"r": (prompt, params)}).outputs["r"].completions[0]

    token_ids = [*prompt, *completion.token_ids]
    with torch.inference_mode():
        expected = torch.log_softmax(opt_reference(torch.tensor([token_ids])).logits[0], dim=-1)
    logprobs = completion.logprobs
    assert logprobs is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 45
    assert logprobs.token_logprobs[0] is None
    assert logprobs.top_logprobs[0] is None
    for position in range(1, 45):
        value, top = logprobs.token_logprobs[position], logprobs.top_logprobs[position]
        assert value == pytest.approx(float(expected[position - 1, token_ids[position]]), abs=1e-3)
        assert top is not None
        assert max(top.values()) == pytest.approx(float(expected[position - 1].max()), abs=1e-3)
    assert completion.text.startswith(engine.model_info.tokenizer.decode(prompt))


def test_engine_scores_a_prompt_once_when_it_is_preempted_half_way(opt_folder: Path) -> None:
    params = replace(GREEDY, max_tokens=2, echo=True, logprobs=0)
    whole = generate(make_engine(opt_folder), {"new": (random_prompt(40), params)})
    engine = make_engine(opt_folder, num_blocks=14, max_num_sequences=2, max_num_batched_tokens=4)
    requests = {"old": (random_prompt(4), replace(GREEDY, max_tokens=30)), "new": (random_prompt(40), params)}

    halting = generate(engine, requests)

    assert halting.outputs["new"].phases.num_preemptions == 1
    assert halting.outputs["new"].phases.intervals[1].name == "prefill"
    assert halting.outputs["new"].phases.intervals[2].name == "wait"
    expected, found = (run.outputs["new"].completions[0].logprobs for run in (whole, halting))
    assert expected is not None
    assert found is not None
    assert found.tokens == expected.tokens
    assert found.token_logprobs[1:] == pytest.approx(expected.token_logprobs[1:], abs=1e-4)


def test_engine_echoes_the_prompt_alone_when_max_tokens_is_zero(opt_folder: Path) -> None:
    engine = make_engine(opt_folder)
    params = SamplingParams(max_tokens=0, echo=True, logprobs=1, n=2)
    engine.add_request("r", random_prompt(30), params, prompt_text="the prompt as it was sent")

    run = run_to_end(engine)

    completions = run.outputs["r"].completions
    assert [completion.text for completion in completions] == ["the prompt as it was sent"] * 2
    assert completions[0].token_ids == ()
    assert completions[0].finish_reason == "length"
    assert completions[0].logprobs is not None
    assert len(completions[0].logprobs.tokens) == 30
    assert run.texts["r", 0] == "the prompt as it was sent"


def test_engine_output_survives_pickling(opt_folder: Path) -> None:
    run = generate(make_engine(opt_folder), {"r": (random_prompt(5), replace(SAMPLED, logprobs=2))})

    assert pickle.loads(pickle.dumps(run.steps)) == run.steps


def test_engine_tells_its_observer_of_every_step(opt_folder: Path) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.seen: list[StepStats] = []

        def on_step(self, stats: StepStats) -> None:
            self.seen.append(stats)

    recorder = Recorder()
    config = EngineConfig(model=str(opt_folder), max_num_batched_tokens=256)
    engine = Engine.from_config(config, observer=recorder)

    run = generate(engine, {"r": (random_prompt(5), GREEDY)})

    assert recorder.seen == [step.stats for step in run.steps]


def test_engine_refuses_to_go_on_after_the_model_failed(
    opt_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(str(opt_folder), dtype=torch.float32, device=torch.device("cpu"))

    class Failing:
        config = loaded.config

        def forward(self, *_: object) -> Tensor:
            raise RuntimeError("the device is gone")

        def compute_logits(self, hidden: Tensor) -> Tensor:
            return hidden

    engine = Engine(replace(loaded, model=Failing()), EngineConfig(model="failing", num_blocks=20))
    engine.add_request("r", random_prompt(5), GREEDY)

    with pytest.raises(StepError, match="the device is gone"):
        engine.step()
    with pytest.raises(StepError, match="earlier step"):
        engine.step()


@pytest.mark.parametrize(
    ("prompt", "params", "field"),
    [
        ([], GREEDY, "prompt_token_ids"),
        ([5, 384], GREEDY, "prompt_token_ids"),
        ([5, -1], GREEDY, "prompt_token_ids"),
        ([5, "a"], GREEDY, "prompt_token_ids"),
        ([5, 6.0], GREEDY, "prompt_token_ids"),
        ([5] * 257, GREEDY, "prompt_token_ids"),
        ([5] * 250, GREEDY, "max_tokens"),
        ([5], replace(GREEDY, n=17), "n"),
        ([5], replace(GREEDY, best_of=17), "best_of"),
        ([5], replace(GREEDY, stop_token_ids=(384,)), "stop_token_ids"),
        ([5], replace(GREEDY, logit_bias={384: 1.0}), "logit_bias"),
        ([5] * 100, replace(GREEDY, n=4, max_tokens=100), "max_tokens"),
    ],
)
def test_engine_refuses_a_request_it_could_never_run(
    opt_folder: Path, prompt: list[int], params: SamplingParams, field: str
) -> None:
    engine = make_engine(opt_folder, num_blocks=60)

    with pytest.raises(InvalidRequestError) as caught:
        engine.add_request("r", prompt, params)

    assert caught.value.field == field
    assert not engine.has_work()


@pytest.mark.parametrize("priority", ["high", 0.5, None, True])
def test_engine_refuses_a_priority_that_is_no_whole_number(opt_folder: Path, priority: Any) -> None:
    engine = make_engine(opt_folder)

    with pytest.raises(InvalidRequestError, match=r"^priority=.*must be a whole number"):
        engine.add_request("r", [5], GREEDY, priority=priority)

    assert not engine.has_work()


def test_engine_refuses_a_request_id_that_is_in_use(opt_folder: Path) -> None:
    engine = make_engine(opt_folder)
    engine.add_request("r", random_prompt(5), GREEDY)

    with pytest.raises(InvalidRequestError, match="request_id"):
        engine.add_request("r", random_prompt(5), GREEDY)


def test_engine_refuses_a_context_longer_than_the_models(opt_folder: Path) -> None:
    with pytest.raises(ConfigError, match="max_model_len=257"):
        make_engine(opt_folder, max_model_len=257)


def test_engine_makes_the_cache_no_larger_than_its_sequences_can_fill(opt_folder: Path) -> None:
    engine = make_engine(opt_folder, num_blocks=None, max_num_sequences=3, block_size=16)

    assert engine.model_info.num_blocks == 3 * 256 // 16


def test_engine_counts_parameters_as_transformers_does(
    opt_folder: Path, opt_reference: transformers.PreTrainedModel
) -> None:
    assert make_engine(opt_folder).model_info.num_parameters == opt_reference.num_parameters()


def test_engine_counts_no_position_table_as_parameters(llama_folder: Path) -> None:
    reference = transformers.AutoModelForCausalLM.from_pretrained(llama_folder)

    assert make_engine(llama_folder).model_info.num_parameters == reference.num_parameters()


@pytest.mark.parametrize("prompt_size", [1, 70])
def test_engine_gives_prompt_logprobs_and_ranks_of_transformers(
    opt_folder: Path, opt_reference: transformers.PreTrainedModel, prompt_size: int
) -> None:
    prompt = random_prompt(prompt_size)
    params = replace(GREEDY, max_tokens=2, prompt_logprobs=3)
    engine = make_engine(opt_folder)

    run = generate(engine, {"r": (prompt, params), "plain": (prompt, GREEDY)})

    found = run.outputs["r"].prompt_logprobs
    assert run.outputs["plain"].prompt_logprobs is None
    assert run.outputs["r"].completions[0].logprobs is None
    assert found is not None
    assert found[0] is None
    assert len(found) == prompt_size
    with torch.inference_mode():
        expected = torch.log_softmax(opt_reference(torch.tensor([prompt])).logits[0].float(), dim=-1)
    for place, row, token_id in zip(found[1:], expected, prompt[1:], strict=False):
        assert place is not None
        assert next(iter(place)) == token_id
        assert place[token_id].rank == int((row > row[token_id]).sum()) + 1
        assert set(place) == {token_id, *row.topk(3).indices.tolist()}
        for other, told in place.items():
            assert told.logprob == pytest.approx(float(row[other]), abs=1e-4)
            assert told.rank == row.argsort(descending=True).tolist().index(other) + 1
            assert told.decoded_token == engine.model_info.tokenizer.id_to_token_text(other)


def test_engine_tells_echoed_and_prompt_logprobs_each_as_many_as_asked_for(opt_folder: Path) -> None:
    params = replace(GREEDY, max_tokens=2, echo=True, logprobs=1, prompt_logprobs=4, n=2)

    run = generate(
        make_engine(opt_folder, num_blocks=20), {str(i): (random_prompt(30), params) for i in "ab"}
    )

    for output in run.outputs.values():
        assert output.prompt_logprobs is not None
        assert len(output.prompt_logprobs) == 30
        assert all(len(place) in (4, 5) for place in output.prompt_logprobs if place is not None)
        for completion in output.completions:
            assert completion.logprobs is not None
            assert all(len(top) <= 2 for top in completion.logprobs.top_logprobs if top is not None)


@pytest.mark.parametrize("seed", range(4))
def test_engine_stops_at_the_token_at_which_transformers_finds_a_stop_string(
    opt_folder: Path, opt_reference: transformers.PreTrainedModel, seed: int
) -> None:
    """Strings out of the middle of what is generated, so that most begin and end within tokens."""
    prompt = random_prompt(12, seed)
    engine = make_engine(opt_folder)
    free = generate(engine, {"r": (prompt, GREEDY)}).outputs["r"].completions[0].text
    stops = [free[start : start + size] for start in range(1, len(free) - 4, 2) for size in (1, 3, 4)]
    stops = [stop for stop in stops if stop.isascii()]
    assert len(stops) > 5

    for stop in stops:
        kept = replace(GREEDY, stop=(stop,), include_stop_str_in_output=True)
        run = generate(engine, {"cut": (prompt, replace(GREEDY, stop=(stop,))), "kept": (prompt, kept)})

        ids = opt_reference.generate(  # type: ignore[operator]  # its type is lost on the way
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=None,
            stop_strings=[stop],
            tokenizer=transformers.AutoTokenizer.from_pretrained(opt_folder),
        )
        expected = ids[0, len(prompt) :].tolist()
        assert [list(run.tokens(name)[0]) for name in ("cut", "kept")] == [expected] * 2, stop
        first = free.index(stop)
        cut, whole = (run.outputs[name].completions[0] for name in ("cut", "kept"))
        assert (cut.text, whole.text) == (free[:first], free[: first + len(stop)])
        assert cut.stop_reason == stop


def test_engine_ends_at_the_models_own_end_unless_told_to_ignore_it(
    opt_folder: Path, opt_reference: transformers.PreTrainedModel
) -> None:
    prompt = random_prompt(12, 3)
    tokens = greedy_reference(opt_reference, prompt, 16)
    loaded = load_model(str(opt_folder), dtype=torch.float32, device=torch.device("cpu"))
    ends = replace(loaded.generation_config, eos_token_ids=(tokens[6],))
    engine = Engine(replace(loaded, generation_config=ends), EngineConfig(model="opt", num_blocks=400))

    run = generate(engine, {"ends": (prompt, replace(GREEDY, ignore_eos=False)), "goes on": (prompt, GREEDY)})

    ended = run.outputs["ends"].completions[0]
    assert list(ended.token_ids) == tokens[: tokens.index(tokens[6]) + 1]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", None)
    assert list(run.tokens("goes on")[0]) == tokens


@pytest.mark.parametrize("num_steps", [0, 1, 2, 4, 9])
@pytest.mark.parametrize(
    "params",
    [GREEDY, replace(SAMPLED, n=3), replace(GREEDY, n=3, use_beam_search=True), replace(GREEDY, echo=True)],
    ids=["greedy", "n", "beams", "echo"],
)
def test_engine_aborts_at_any_time_and_the_others_never_notice(
    opt_folder: Path, params: SamplingParams, num_steps: int
) -> None:
    """Waiting, in the midst of a prompt, decoding, and on a cache so small that it has been preempted."""
    others = {str(i): (random_prompt(9 + 5 * i, i), GREEDY) for i in range(3)}
    alone = generate(make_engine(opt_folder), others)
    engine = make_engine(opt_folder, num_blocks=30, max_num_batched_tokens=16)
    for name, (prompt, own) in others.items():
        engine.add_request(name, prompt, own)
    engine.add_request("gone", random_prompt(40, 9), params)
    run = Run()
    for _ in range(num_steps):
        run.add(engine.step())

    assert engine.abort("gone")
    engine.check_invariants()
    run_to_end(engine, run)

    assert [run.tokens(name) for name in others] == [alone.tokens(name) for name in others]
    assert {one.finish_reason for one in run.outputs["gone"].completions} == {"abort"}
    assert run.steps[-1].stats.num_blocks_used == 0


def test_engine_serves_the_smaller_priority_first_and_preempts_the_larger(opt_folder: Path) -> None:
    engine = make_engine(opt_folder, num_blocks=20, max_num_sequences=2)
    for name, priority in (("late", 5), ("later", 5), ("soon", -1)):
        engine.add_request(
            name, random_prompt(20, len(name)), replace(GREEDY, max_tokens=30), priority=priority
        )

    run = run_to_end(engine)

    assert list(run.outputs) == ["soon", "late", "later"]
    assert run.outputs["soon"].phases.num_preemptions == 0
    assert sum(output.phases.num_preemptions for output in run.outputs.values()) > 0
