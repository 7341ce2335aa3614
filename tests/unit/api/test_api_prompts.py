from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from tokenizers import Tokenizer

from api.prompts import INLINE_SIZE, LoadedTokenizer, Prompts
from api.single_flight import SingleFlight
from jobs.memory_store import MemoryStore


@pytest.fixture
def tokenizer_json(backend: Any) -> str:
    text: str = backend._tokenizers["0" * 64]
    return text


@pytest.fixture
def card(backend: Any) -> Any:
    return backend._cards["house/bytes"]


async def test_saved_truncation_and_padding_do_not_touch_prompts(tokenizer_json: str, card: Any) -> None:
    saved = Tokenizer.from_str(tokenizer_json)
    saved.enable_truncation(3)
    saved.enable_padding(length=8)
    store = MemoryStore()
    store.announce(card, saved.to_str())

    prompts = await Prompts(store).prepare(["abcdef", "a"], card, keep_text=False)

    assert [len(prompt.token_ids) for prompt in prompts] == [6, 1]


async def test_tokenizer_is_fetched_once_for_concurrent_requests(backend: Any, card: Any) -> None:
    num_reads, read = 0, backend.tokenizer_json

    async def counted(digest: str) -> str | None:
        nonlocal num_reads
        num_reads += 1
        return await read(digest)

    backend.tokenizer_json = counted
    prompts = Prompts(backend)

    await asyncio.gather(*(prompts.prepare(["ab"], card, keep_text=False) for _ in range(20)))

    assert num_reads == 1


@pytest.mark.parametrize(("size", "is_inline"), [(INLINE_SIZE, True), (INLINE_SIZE + 1, False)])
async def test_long_prompts_are_tokenized_off_the_event_loop(
    backend: Any, card: Any, monkeypatch: pytest.MonkeyPatch, size: int, is_inline: bool
) -> None:
    threads: list[threading.Thread] = []
    encode = LoadedTokenizer.encode

    def recorded(self: LoadedTokenizer, texts: list[str]) -> list[list[int]]:
        threads.append(threading.current_thread())
        return encode(self, texts)

    monkeypatch.setattr(LoadedTokenizer, "encode", recorded)
    wide = card.model_copy(update={"max_model_len": 10_000})

    await Prompts(backend).prepare(["x" * size], wide, keep_text=False)

    assert (threads == [threading.main_thread()]) is is_inline


async def test_tokenizer_with_more_tokens_than_the_model_answers_400_not_later(
    backend: Any, start_api: Any, card: Any
) -> None:
    backend.announce(card.model_copy(update={"vocab_size": 5}), backend._tokenizers["0" * 64])
    async with start_api(backend) as api:
        reply = await api.submit(prompt="zzz")

    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "prompt"


async def test_single_flight_shares_an_error_and_then_asks_anew() -> None:
    flight: SingleFlight[int] = SingleFlight()
    num_asked = 0

    async def fail() -> int:
        nonlocal num_asked
        num_asked += 1
        await asyncio.sleep(0)
        raise ValueError

    async def succeed() -> int:
        return 7

    failed = await asyncio.gather(*(flight.ask("key", fail) for _ in range(5)), return_exceptions=True)

    assert [type(error) for error in failed] == [ValueError] * 5
    assert num_asked == 1
    assert await flight.ask("key", succeed) == 7


async def test_single_flight_goes_on_for_the_others_when_one_is_cancelled() -> None:
    flight: SingleFlight[int] = SingleFlight()
    may_answer = asyncio.Event()

    async def answer() -> int:
        await may_answer.wait()
        return 7

    first, second = (asyncio.create_task(flight.ask("key", answer)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait({first})
    may_answer.set()

    assert await second == 7
