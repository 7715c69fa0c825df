"""The tests run without a network and without a GPU."""

import os

# before any test imports a library that reads them
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
