"""The ablation script: every variant is a control of the built-in backbone, and one of them runs end to end."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml

from scaleweaver.backbones.infinity import InfinityTransformer
from scaleweaver.hub import built_in_folder
from scaleweaver.methods.scaleweaver import ScaleWeaverConfig
from scaleweaver.toybox.store import cache_renders

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "benchmarks"))  # as when it is run by name: it reads its neighbour
    try:
        spec = importlib.util.spec_from_file_location("ablations", ROOT / "benchmarks" / "ablations.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def test_variants_differ_from_the_recipe_in_what_they_name(script):
    recipe = yaml.safe_load(script.RECIPE.read_text())["adapter"]
    depth = InfinityTransformer.load_config(built_in_folder("toybox") / "transformer")["depth"]
    made = [ScaleWeaverConfig(kind="canny", **{**recipe, **changes}) for changes in script.VARIANTS.values()]
    assert len({config.resolve(depth) for config in made}) == len(script.VARIANTS)


def test_one_variant_is_trained_measured_and_shown(script, tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        cache_renders(tmp_path / split, split, count=count, captions=1, supersample=1, workers=0)
    values = yaml.safe_load(script.RECIPE.read_text())
    values |= {"data": str(tmp_path / "train"), "val_data": str(tmp_path / "val"), "out": str(tmp_path / "runs")}
    # accelerate keeps one number format for the whole process
    values |= {"precision": "no", "steps": 1, "batch": 2, "warmup": 1, "checkpoint_every": 1, "log_every": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    page, out = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text("before\n<!-- measured -->\n<!-- /measured -->\nafter\n")
    call = ["--recipe", str(tmp_path / "recipe.yaml"), "--only", "rank 4", "--count", "2", "--out", str(out)]
    script.main([*call, "--train-only"])
    trained = out.read_text()
    script.main([*call, "--into", str(page)])
    report = json.loads(out.read_text())
    assert report["variants"] == json.loads(trained)["variants"]  # not measured again
    row = report["variants"]["rank 4"]
    assert row["gain_at_start"] == 0  # a fresh adapter changes nothing
    assert row["gain"] != 0 and 0 <= row["f1_1px"] <= 1
    assert 0 < row["gflop_encoding"] < row["gflop"]
    assert f"| rank 4 | {row['parameters'] / 1e6:.2f} M |" in page.read_text()
    with pytest.raises(ValueError, match="numbers of other settings"):
        script.main([*call, "--set", "steps=2"])
