"""Libraries that people train with, at the versions that pyproject's extra "integrations" names; skipped without."""

from __future__ import annotations

import os

# Asked for before anything imports them: nothing is looked up in a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
