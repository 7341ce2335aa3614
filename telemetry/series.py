"""Series of a metric whose attributes are resolved once: a value then takes a fifth of the SDK's own call.

    Labelled[key] ──▶ Series ── first values ──▶ instrument, as anybody calls it
                         └───── then ──────────▶ the aggregation that those went into, of each reader

For every value the SDK checks, copies, sorts and hashes the attributes to find what to add it to. Who adds to
the same few series again and again keeps what was found. Sums, buckets, exemplars, views and temporality stay
the SDK's. What is kept is private to it: where anything is not as expected, the instrument is called. A test
holds both ways equal, and that the short one is taken.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from opentelemetry import context as context_api
from opentelemetry.context import Context
from opentelemetry.metrics import Counter, Histogram
from opentelemetry.sdk.metrics import AlwaysOffExemplarFilter

Attributes = Mapping[str, str]
Key = TypeVar("Key", bound=Hashable)

MAX_SEARCHES = 3
"""An SDK that hides what is looked for, or drops it at each collection, is not asked for ever."""


@dataclass(slots=True)
class _Measured:
    """What an aggregation reads of a measurement."""

    value: float
    attributes: Attributes
    time_unix_nano: int = 0
    context: Context | None = None


class Series:
    """Safe from any thread, as its instrument is."""

    def __init__(self, instrument: Counter | Histogram, attributes: Attributes) -> None:
        self._instrument: Any = instrument  # for what is private to the SDK
        self._record = instrument.add if isinstance(instrument, Counter) else instrument.record
        self._attributes = dict(attributes)
        self._num_searches = 0
        self._readers: object = None
        """Of the meter provider, when `_aggregations` were found; the SDK puts another in its place."""
        self._aggregations: tuple[Any, ...] = ()
        self._exemplars: Any = None

    @property
    def is_found(self) -> bool:
        """Values go the short way."""
        readers = self._readers
        return readers is not None and readers is self._instrument._measurement_consumer._reader_storages

    def add(self, value: float) -> None:
        """Count or record a value; an exemplar names the current span."""
        if not self.is_found or not 0 <= value < math.inf:
            self._record(value, self._attributes)
            self._search()
            return
        measured, is_sampled = _Measured(value, self._attributes), False
        if self._exemplars is not None:
            measured.time_unix_nano, measured.context = time.time_ns(), context_api.get_current()
            is_sampled = self._exemplars.should_sample(
                value, measured.time_unix_nano, self._attributes, measured.context
            )
        for aggregation in self._aggregations:
            aggregation.aggregate(measured, is_sampled)

    def _search(self) -> None:
        """Right after the instrument was called, so that each reader has the series."""
        if self._num_searches == MAX_SEARCHES:
            return
        self._num_searches += 1
        try:
            consumer = self._instrument._measurement_consumer
            readers, exemplars = consumer._reader_storages, consumer._sdk_config.exemplar_filter
            matches = [
                m for r in readers.values() for m in r._instrument_view_instrument_matches[self._instrument]
            ]
            if any(match._reset_on_collect for match in matches):
                return
            kept = [each for m in matches for each in m._attributes_aggregation.values()]
        except (AttributeError, KeyError):
            return
        self._aggregations = tuple(each for each in kept if each._attributes == self._attributes)
        self._exemplars = None if isinstance(exemplars, AlwaysOffExemplarFilter) else exemplars
        if len(self._aggregations) == len(matches):
            self._readers = readers


class Labelled(dict[Key, Series]):
    """The series of an instrument, each made when it is first asked for."""

    def __init__(self, instrument: Counter | Histogram, attributes: Callable[[Key], Attributes]) -> None:
        """`attributes` of a key; there are few keys."""
        super().__init__()
        self._instrument = instrument
        self._attributes = attributes

    def __missing__(self, key: Key) -> Series:
        """Two threads that come at once make two, which add to the same."""
        series = self[key] = Series(self._instrument, self._attributes(key))
        return series
