"""Shared setup: how hard hypothesis searches. Seeds are fixed where CI is set, so that a red build can be repeated."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: no test waits for a network

# Examples run tensor code, whose first call is slow: a deadline would say nothing about sparsec.
_SLOW_STARTS = [HealthCheck.too_slow]
settings.register_profile("dev", max_examples=60, deadline=None, suppress_health_check=_SLOW_STARTS)
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")
