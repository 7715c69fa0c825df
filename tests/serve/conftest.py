"""Without the extra "serve" there is no server, and without OpenAI's client nobody asks it."""

from __future__ import annotations

import importlib.util

PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "openai")

collect_ignore_glob = [] if all(map(importlib.util.find_spec, PACKAGES)) else ["test_*.py"]
