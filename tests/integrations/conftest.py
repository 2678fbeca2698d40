"""Libraries that people train with, at the versions that docs/integrations.md names; skipped without."""

from __future__ import annotations

import os

# Asked for before anything imports them: nothing is looked up in a network, and nothing is told to one.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
