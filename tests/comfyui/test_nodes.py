"""The nodes for ComfyUI: their schemas, and that a graph of them draws what the same Python draws."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from comfy_stub import installed
from loops import run_apart
from PIL import Image
from tiny_pipeline import PROMPT, edges, tiny_pipeline

from scaleweaver.contracts import Control
from scaleweaver.controls import canny, grey
from scaleweaver.pipeline import VARControlPipeline


@pytest.fixture(scope="module")
def extension() -> Iterator[ModuleType]:
    with installed() as module:
        yield module


@pytest.fixture(scope="module")
def nodes(extension: ModuleType) -> dict[str, Any]:
    found = run_apart(_list(extension))
    return {node.define_schema().node_id: node for node in found}


async def _list(extension: ModuleType) -> list[Any]:
    nodes: list[Any] = await (await extension.comfy_entrypoint()).get_node_list()
    return nodes


@pytest.fixture(scope="module")
def pipe() -> VARControlPipeline:
    return tiny_pipeline("canny", "depth")


def image(*pictures: Image.Image) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(one.convert("RGB"))).float() / 255 for one in pictures])


def test_schemas_fit_their_functions(nodes: dict[str, Any]) -> None:
    assert set(nodes) == {"ScaleweaverLoad", "ScaleweaverPreprocess", "ScaleweaverControl", "ScaleweaverSample"}
    for node in nodes.values():
        schema = node.define_schema()
        parameters = inspect.signature(node.execute).parameters
        assert [one.id for one in schema.inputs] == list(parameters)
        for one in schema.inputs:
            assert (parameters[one.id].default is not inspect.Parameter.empty) == one.optional
            if "options" in one.fields:
                assert one.fields["default"] in one.fields["options"]
        assert schema.category == "scaleweaver"


def test_a_graph_draws_what_python_draws(nodes: dict[str, Any], pipe: VARControlPipeline) -> None:
    lines, tones, where = edges(1), edges(2, (48, 32)), edges(3)
    (first,) = nodes["ScaleweaverControl"].run(image=image(lines), kind="canny", strength=0.6, end=0.75)
    (both,) = nodes["ScaleweaverControl"].run(
        image=image(tones), kind=" depth ", resize="pad", mask=image(where)[..., 0], controls=first
    )
    drawn, settings = nodes["ScaleweaverSample"].run(
        pipeline=pipe, prompt=PROMPT, negative_prompt="a tree", seed=5, images=2, guidance_scale=2.0, controls=both
    )
    controls = [Control("canny", lines, scale=0.6, end=0.75), Control("depth", tones, resize="pad", mask=where)]
    expected = pipe(
        PROMPT, negative_prompt="a tree", seed=5, num_images_per_prompt=2, guidance_scale=2.0, control=controls,
        output_type="np",
    )  # fmt: skip
    assert drawn.shape == (2, 32, 32, 3) and drawn.dtype == torch.float32
    assert torch.equal(drawn, torch.from_numpy(expected.images))
    assert json.loads(settings) == expected.settings


def test_numbers_of_zero_are_the_models_own(nodes: dict[str, Any], pipe: VARControlPipeline) -> None:
    drawn, _ = nodes["ScaleweaverSample"].run(pipeline=pipe, prompt=PROMPT, seed=1)
    assert torch.equal(drawn, torch.from_numpy(pipe(PROMPT, seed=1, output_type="np").images))


def test_a_batch_of_maps_gives_a_picture_for_each(nodes: dict[str, Any], pipe: VARControlPipeline) -> None:
    maps = [edges(1), edges(2), edges(3)]
    (controls,) = nodes["ScaleweaverControl"].run(image=image(*maps), kind="canny")
    drawn, _ = nodes["ScaleweaverSample"].run(pipeline=pipe, prompt=PROMPT, seed=4, controls=controls)
    expected = pipe([PROMPT] * 3, seed=4, control={"canny": maps}, output_type="np").images
    assert torch.equal(drawn, torch.from_numpy(expected))
    assert not torch.equal(drawn[0], drawn[1])


def test_maps_have_the_size_of_their_photos(nodes: dict[str, Any], pipe: VARControlPipeline) -> None:
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(rng.integers(0, 255, (40, 56, 3), dtype=np.uint8)) for _ in range(2)]
    (maps,) = nodes["ScaleweaverPreprocess"].run(image=image(*photos), kind="grey")
    assert maps.shape == (2, 40, 56, 3)
    assert torch.equal(maps, image(*map(grey, photos)))
    # as the control was trained: this one has no record, so the usual thresholds
    (trained,) = nodes["ScaleweaverPreprocess"].run(image=image(photos[0]), kind="canny", pipeline=pipe)
    assert torch.equal(trained, image(canny(photos[0])))


def test_load_reads_a_folder(nodes: dict[str, Any], pipe: VARControlPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "tiny")
    (loaded,) = nodes["ScaleweaverLoad"].run(model=f" {tmp_path / 'tiny'} ", device="cpu", dtype="float32")
    drawn, _ = nodes["ScaleweaverSample"].run(pipeline=loaded, prompt=PROMPT, seed=1)
    assert torch.equal(drawn, torch.from_numpy(pipe(PROMPT, seed=1, output_type="np").images))


@pytest.mark.parametrize(
    ("tensor", "words"), [(torch.zeros(3, 8, 8), "expected \\(B, H, W"), (torch.zeros(1, 8, 8, 2), "1, 3 or 4")]
)
def test_other_layouts_are_refused(nodes: dict[str, Any], tensor: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        nodes["ScaleweaverControl"].run(image=tensor, kind="canny")


def test_layouts_come_back_as_they_were(extension: ModuleType) -> None:
    tensors = sys.modules[f"{extension.__name__}.tensors"]
    values = torch.arange(2 * 4 * 5 * 3).reshape(2, 4, 5, 3).float() / 255
    assert torch.equal(tensors.image_of(tensors.pictures_of(values)), values)
    (clipped,) = tensors.pictures_of(torch.full((1, 2, 2, 3), 1.5))
    assert clipped.getextrema() == ((255, 255),) * 3
    (mask,) = tensors.masks_of(torch.ones(3, 4))
    assert mask.size == (4, 3) and mask.getpixel((0, 0)) == (255, 255, 255)
