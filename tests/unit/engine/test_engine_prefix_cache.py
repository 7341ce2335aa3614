from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engine.block_manager import BlockManager
from engine.errors import InvariantError
from engine.prefix_cache import ROOT
from engine.sampling import SamplingParams
from engine.scheduler import ScheduledBatch
from tests.unit.engine.engine_factory import GREEDY, generate, make_engine, random_prompt
from tests.unit.engine.test_engine_scheduler import Bench, Limits

BLOCK = 4


def filled(blocks: BlockManager, tokens: list[int]) -> list[int]:
    """A table whose full blocks have been computed and published."""
    table: list[int] = []
    blocks.extend(table, len(tokens))
    entry = ROOT
    for slot in range(len(tokens) // BLOCK):
        entry = blocks.publish(entry, tokens[slot * BLOCK : (slot + 1) * BLOCK], table[slot])
    return table


def test_prefix_cache_finds_the_longest_common_beginning() -> None:
    blocks = BlockManager(20, BLOCK)
    table = filled(blocks, list(range(12)))

    assert blocks.find([*range(8), 99, 98, 97, 96], 3).blocks == tuple(table[:2])
    assert blocks.find(list(range(12)), 2).blocks == tuple(table[:2])
    assert blocks.find([9, *range(1, 12)], 3).blocks == ()


def test_prefix_cache_tells_equal_blocks_after_different_beginnings_apart() -> None:
    blocks = BlockManager(20, BLOCK)
    first = filled(blocks, [1, 1, 1, 1, 7, 7, 7, 7])
    second = filled(blocks, [2, 2, 2, 2, 7, 7, 7, 7])

    assert blocks.find([2, 2, 2, 2, 7, 7, 7, 7], 2).blocks == tuple(second)
    assert blocks.find([1, 1, 1, 1, 7, 7, 7, 7], 2).blocks == tuple(first)


def test_prefix_cache_keeps_blocks_after_their_owner_and_counts_them_as_free() -> None:
    blocks = BlockManager(5, BLOCK)
    table = filled(blocks, list(range(10)))
    kept = list(table[:2])
    blocks.release(table)

    prefix = blocks.find(list(range(10)), 2)

    assert prefix.blocks == tuple(kept)
    assert blocks.num_free == 5
    assert blocks.num_unused(prefix) == 2
    again = blocks.adopt(prefix)
    assert blocks.num_free == 3
    blocks.check_invariants([again])


def test_prefix_cache_gives_up_the_longest_unused_block_first_and_the_end_before_the_beginning() -> None:
    blocks = BlockManager(4, BLOCK)
    old, new = filled(blocks, [1] * 8), filled(blocks, [2] * 8)
    blocks.release(old)
    blocks.release(new)

    taken: list[int] = []
    blocks.extend(taken, BLOCK)

    assert len(blocks.find([1] * 8, 2).blocks) == 1
    assert len(blocks.find([2] * 8, 2).blocks) == 2
    blocks.extend(taken, 4 * BLOCK)
    assert blocks.find([1] * 8, 2).blocks == blocks.find([2] * 8, 2).blocks == ()
    blocks.check_invariants([taken])


def test_prefix_cache_publishes_a_block_anew_when_what_stood_before_it_is_gone() -> None:
    """Two hold the same tokens; the one the cache knows leaves and is overwritten, the other one resumes."""
    blocks = BlockManager(4, BLOCK)
    known = filled(blocks, [1] * 4)
    twin = filled(blocks, [1] * 8)
    blocks.release(known)
    overwriting: list[int] = []
    blocks.extend(overwriting, 2 * BLOCK)

    entry = blocks.publish(ROOT, [1] * 4, twin[0])
    blocks.publish(entry, [1] * 4, twin[1])

    assert blocks.find([1] * 8, 2).blocks == tuple(twin)
    blocks.check_invariants([twin, overwriting])


def test_block_manager_reports_a_kept_block_that_the_prefix_cache_lost() -> None:
    blocks = BlockManager(4, BLOCK)
    table = filled(blocks, [1] * 4)
    lost = table[0]
    blocks.release(table)
    assert blocks._prefixes is not None
    blocks._prefixes.drop(lost)

    with pytest.raises(InvariantError, match="kept"):
        blocks.check_invariants([])


def test_scheduler_admits_by_the_blocks_that_are_really_free_when_a_prefix_is_found() -> None:
    """Adopting kept blocks takes them from the free ones, so the newcomer must count them."""
    limits = Limits(num_blocks=8, block_size=4, max_num_sequences=4, max_num_batched_tokens=64)
    bench = Bench(limits, num_token_kinds=1)
    bench.add(16, 2, 1)
    bench.run_to_end()
    bench.add(17, 4, 1)
    bench.add(17, 4, 1)

    bench.run_to_end()

    assert bench.requests[1].num_cached_tokens == 16
    assert bench.blocks.num_used == 0


def test_scheduler_finds_the_blocks_of_a_preempted_request_again() -> None:
    limits = Limits(num_blocks=40, block_size=4, max_num_sequences=4, max_num_batched_tokens=64)
    bench = Bench(limits)
    bench.add(16, 8, 1)
    for _ in range(4):
        bench.step()
    request = bench.requests[0]
    bench.scheduler._preempt(request, ScheduledBatch())

    batch = bench.step()

    assert request.num_cached_tokens == 0
    assert [entry.num_tokens for entry in batch.entries] == [4]
    bench.run_to_end()


def test_engine_computes_only_the_rest_of_a_prompt_it_has_seen(opt_folder: Path) -> None:
    prompt, other_end = random_prompt(30), random_prompt(6, 1)
    engine = make_engine(opt_folder)
    first = generate(engine, {"first": (prompt, GREEDY)})
    again = generate(engine, {"again": (prompt, GREEDY), "other": (prompt[:24] + other_end, GREEDY)})
    cold = generate(make_engine(opt_folder), {"other": (prompt[:24] + other_end, GREEDY)})

    assert first.outputs["first"].usage.cached_tokens == 0
    assert again.outputs["again"].usage.cached_tokens == 28
    assert again.outputs["other"].usage.cached_tokens == 24
    assert again.steps[0].stats.num_prefill_tokens == 2 + 6
    assert again.tokens("again") == first.tokens("first")
    assert again.tokens("other") == cold.tokens("other")
    assert again.steps[-1].stats.num_blocks_used == 0


def test_engine_finds_what_another_request_has_generated(opt_folder: Path) -> None:
    prompt = random_prompt(8)
    engine = make_engine(opt_folder)
    (generated,) = generate(engine, {"first": (prompt, GREEDY)}).tokens("first")

    turn = [*prompt, *generated, 5, 6, 7]
    output = generate(engine, {"next": (turn, GREEDY)}).outputs["next"]

    # Of 8 + 16 tokens the last one was never run, so its block is not full.
    assert output.usage.cached_tokens == 20


@pytest.mark.parametrize(
    "params",
    [replace(GREEDY, n=3, temperature=1.0, seed=5), replace(GREEDY, n=2, use_beam_search=True)],
    ids=["n=3", "beams"],
)
def test_engine_gives_the_same_output_from_a_cached_prompt(opt_folder: Path, params: SamplingParams) -> None:
    prompt = random_prompt(33)
    engine = make_engine(opt_folder)
    cold = generate(engine, {"cold": (prompt, params)})
    warm = generate(engine, {"warm": (prompt, params)})

    assert warm.outputs["warm"].usage.cached_tokens == 32
    assert warm.tokens("warm") == cold.tokens("cold")


def test_engine_computes_a_prompt_whose_logprobs_are_asked_for(opt_folder: Path) -> None:
    prompt, params = random_prompt(20), replace(GREEDY, echo=True, logprobs=1)
    engine = make_engine(opt_folder)
    cold = generate(engine, {"cold": (prompt, params)}).outputs["cold"]
    warm = generate(engine, {"warm": (prompt, params)}).outputs["warm"]

    assert warm.usage.cached_tokens == 0
    assert warm.completions[0].logprobs == cold.completions[0].logprobs


def test_engine_keeps_nothing_when_told_not_to(opt_folder: Path) -> None:
    engine = make_engine(opt_folder, keeps_prefixes=False)
    generate(engine, {"first": (random_prompt(20), GREEDY)})

    assert generate(engine, {"again": (random_prompt(20), GREEDY)}).outputs["again"].usage.cached_tokens == 0
