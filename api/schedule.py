"""This replica's share in advancing the schedule: with no worker alive, deadlines are kept all the same."""

from __future__ import annotations

import asyncio
import logging

from jobs.clock import Clock
from jobs.errors import StoreUnavailable
from jobs.schedule import TICK_SECONDS, AsyncSchedule

_logger = logging.getLogger(__name__)


async def keep(schedule: AsyncSchedule, clock: Clock) -> None:
    """Advance it once a second until cancelled; a store that is away is asked again."""
    is_away = False
    while True:
        try:
            is_complete = (await schedule.advance(now=clock.now())).is_complete
            is_away = False
        except StoreUnavailable as error:
            if not is_away:
                _logger.warning("The schedule stands still: %s", error)
            is_away = is_complete = True
        if is_complete:
            await asyncio.sleep(TICK_SECONDS)
