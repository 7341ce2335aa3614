"""What holds for every test: no example of a property is failed for its time, on a machine that is shared."""

from __future__ import annotations

import hypothesis

hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
