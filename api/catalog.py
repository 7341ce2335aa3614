"""Which models can be asked for, and whether somebody would answer."""

from __future__ import annotations

from api.errors import ModelNotFound, NoWorker
from api.single_flight import SingleFlight
from jobs.clock import Clock
from jobs.registry import ModelDirectory, ServedModel

FRESH_SECONDS = 1.0
"""How old the list may be: half a worker's beat, so a request costs no question of its own."""


class Catalog:
    """The directory's list, asked for at most once a second.

    Args:
        directory: what workers announce.
        clock: of the beats.
        expected: names that ought to be served; unheard of, they have no worker rather than no existence.
    """

    def __init__(self, directory: ModelDirectory, clock: Clock, *, expected: tuple[str, ...] = ()) -> None:
        self._directory = directory
        self._clock = clock
        self._expected = frozenset(expected)
        self._models: list[ServedModel] = []
        self._read_at: float | None = None
        self._reading: SingleFlight[list[ServedModel]] = SingleFlight()

    async def models(self) -> list[ServedModel]:
        """In order of their names. Raises StoreUnavailable."""
        if self._read_at is not None and 0 <= self._clock.now() - self._read_at < FRESH_SECONDS:
            return self._models
        return await self._reading.ask("models", self._read)

    async def known(self, name: str) -> ServedModel:
        """By canonical name or alias; a canonical name wins.

        Raises:
            ModelNotFound: nobody ever announced it and nobody expects it.
            NoWorker: expected, but never announced.
        """
        models = await self.models()
        for model in models:
            if model.card.name == name:
                return model
        for model in sorted(models, key=lambda model: model.num_workers == 0):
            if name in model.card.aliases:
                return model
        raise NoWorker(name) if name in self._expected else ModelNotFound(name)

    async def served(self, name: str) -> ServedModel:
        """As `known`, and a live worker serves it. Raises NoWorker too."""
        model = await self.known(name)
        if model.num_workers == 0:
            raise NoWorker(name)
        return model

    async def missing(self) -> list[str]:
        """Expected names that no live worker serves."""
        models = await self.models()
        names = {
            name for model in models if model.num_workers for name in (model.card.name, *model.card.aliases)
        }
        return sorted(self._expected - names)

    async def _read(self) -> list[ServedModel]:
        now = self._clock.now()
        found = await self._directory.list_models(now=now)
        self._models = sorted(found, key=lambda model: model.card.name)
        self._read_at = now
        return self._models
