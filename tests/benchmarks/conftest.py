"""The benchmark scripts read their neighbours, as when they are run by name."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
