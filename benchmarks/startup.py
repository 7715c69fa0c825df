"""How long `import scaleweaver` and `scaleweaver --help` take, beside an interpreter that does nothing.

python benchmarks/startup.py [--runs 15]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python, nothing else": "pass",
    "import scaleweaver": "import scaleweaver",
    "from scaleweaver import ScaleSchedule": "from scaleweaver import ScaleSchedule",
    "scaleweaver --help": "import sys; sys.argv = ['scaleweaver', '--help']; from scaleweaver.cli import main; main()",
    "from scaleweaver import VARControlPipeline": "from scaleweaver import VARControlPipeline",
}


def seconds(code: str) -> float:
    """Wall clock of one fresh interpreter."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs

    for code in COMMANDS.values():  # file cache and bytecode
        seconds(code)
    # one of each in turn, so that other load on the machine falls on all of them
    rounds = [[seconds(code) for code in COMMANDS.values()] for _ in range(runs)]
    medians = [statistics.median(column) for column in zip(*rounds, strict=True)]

    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, median of {runs} runs")
    print()
    print("| command | seconds | times bare python |")
    print("|---|---|---|")
    for name, median in zip(COMMANDS, medians, strict=True):
        print(f"| `{name}` | {median:.3f} | {median / medians[0]:.1f} |")


if __name__ == "__main__":
    main()
