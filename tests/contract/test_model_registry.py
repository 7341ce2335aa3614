from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.model import WorkerId
from jobs.registry import ALIVE_SECONDS
from tests.support.job_factory import NOW, model_card

if TYPE_CHECKING:
    from tests.contract.conftest import Stores

CARD = model_card(name="org/model", aliases=("model",), vocab_size=100, tokenizer_digest="d1")


async def test_announced_model_is_listed_with_its_tokenizer(stores: Stores) -> None:
    stores.announcer.announce(CARD, '{"version": "1.0"}')

    served = await stores.directory.list_models(now=NOW)

    assert [(model.card, model.num_workers) for model in served] == [(CARD, 0)]
    assert await stores.directory.tokenizer_json("d1") == '{"version": "1.0"}'
    assert await stores.directory.tokenizer_json("unknown") is None


async def test_worker_counts_while_it_beats(stores: Stores) -> None:
    stores.announcer.announce(CARD, "{}")
    stores.announcer.beat(CARD.name, WorkerId("w1"), now=NOW)
    stores.announcer.beat(CARD.name, WorkerId("w2"), now=NOW + ALIVE_SECONDS)

    counts = [
        (await stores.directory.list_models(now=NOW + later))[0].num_workers
        for later in (1, ALIVE_SECONDS + 1, 3 * ALIVE_SECONDS)
    ]

    assert counts == [2, 1, 0]


async def test_worker_that_leaves_counts_no_more(stores: Stores) -> None:
    stores.announcer.announce(CARD, "{}")
    stores.announcer.beat(CARD.name, WorkerId("w1"), now=NOW)

    stores.announcer.leave(CARD.name, WorkerId("w1"))

    assert (await stores.directory.list_models(now=NOW))[0].num_workers == 0
