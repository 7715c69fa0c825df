"""How the small copies of the Infinity recordings beside this file were cut from the complete ones.

python tests/golden/make_small.py FOLDER_WITH_COMPLETE_FILES
"""

import re
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

# what is left out: generation runs (kept by the loop's own copy) and tables that smaller ones cover
LEFT_OUT = {
    "infinity_tiny": r".*\.ar_.*|.*\.gt_bits\..*|.*\.raw_features",
    "infinity_tiny_8b": r".*\.ar_.*|.*\.gt_bits\..*|.*\.raw_features|sq\.tf\.block.*",
    "infinity_rope": r"h.*",
}

for name, pattern in LEFT_OUT.items():
    with safe_open(Path(sys.argv[1]) / f"{name}.safetensors", "pt") as file:
        kept = {key: file.get_tensor(key) for key in file.keys() if not re.fullmatch(pattern, key)}  # noqa: SIM118
        save_file(kept, Path(__file__).parent / f"{name}.safetensors", metadata=file.metadata())
