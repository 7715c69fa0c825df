from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_backbone, tiny_schedule, tiny_vae
from tiny_pipeline import PROMPT, add_tiny_control, edges, latent, tiny_pipeline
from torch import Tensor

from scaleweaver.contracts import Control, Route, SamplerState
from scaleweaver.loop import SingleModel
from scaleweaver.metadata import read_settings
from scaleweaver.pipeline import VARControlPipeline
from scaleweaver.precision import auto_dtype, read_dtype
from scaleweaver.sampling import BitwiseSampler
from scaleweaver.schedule import ScaleSchedule, ScaleStep


@pytest.fixture(scope="module")
def pipe() -> VARControlPipeline:
    return tiny_pipeline("canny", "depth")


@pytest.fixture(scope="module")
def folder(pipe: VARControlPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    pipe.save_pretrained(path)
    return path


# pictures and their settings


def test_one_call(pipe: VARControlPipeline) -> None:
    out = pipe(PROMPT, seed=5, num_images_per_prompt=2)
    assert out.seeds == [5, 6] and len(out.images) == 2
    assert all(image.size == (32, 32) and image.mode == "RGB" for image in out.images)
    assert [codes.shape for codes in out.codes] == [(2, step.n, 12) for step in tiny_schedule()]
    assert not np.array_equal(np.asarray(out.images[0]), np.asarray(out.images[1]))
    out.latent.requires_grad_()  # an ordinary tensor, not one of inference mode


def test_a_saved_picture_can_be_made_again(pipe: VARControlPipeline, tmp_path: Path) -> None:
    out = pipe(
        ["a red ball", "a tree"], num_images_per_prompt=2, guidance_scale=[1, 2, 3, 4], temperature=0.7, top_p=0.9
    )
    out.images[3].save(tmp_path / "x.png")
    settings = read_settings(tmp_path / "x.png")
    assert settings["prompt"] == "a tree" and settings["seed"] == out.seeds[3] and settings == out.settings[3]
    again = pipe(settings.pop("prompt"), **settings).images[0]
    assert np.array_equal(np.asarray(again), np.asarray(out.images[3]))


def test_a_picture_does_not_depend_on_its_batch(pipe: VARControlPipeline) -> None:
    prompts = ["a red cube", "", "a small green house on grass"]
    batch = pipe(prompts, seed=[4, 4, 9], control={"canny": edges()})
    for row, seed in enumerate([4, 4, 9]):
        single = pipe(prompts[row], seed=seed, control={"canny": edges()})
        assert all(torch.equal(one[0], many[row]) for one, many in zip(single.codes, batch.codes, strict=True))
        assert np.array_equal(np.asarray(single.images[0]), np.asarray(batch.images[row]))


def test_fresh_seeds_and_generators(pipe: VARControlPipeline) -> None:
    one, two = pipe(PROMPT), pipe(PROMPT)
    assert one.seeds != two.seeds
    assert torch.equal(latent(pipe, seed=one.seeds), one.latent)
    assert torch.equal(
        latent(pipe, seed=None, generator=torch.Generator().manual_seed(1)),
        latent(pipe, seed=None, generator=torch.Generator().manual_seed(1)),
    )
    used = torch.Generator().manual_seed(1)
    torch.rand(5, generator=used)  # no seed tells where in its stream it is
    drawn = pipe([PROMPT, "a tree"], generator=[used, torch.Generator()], output_type="latent")
    assert torch.equal(latent(pipe, [PROMPT, "a tree"], seed=drawn.seeds), drawn.latent)
    assert torch.equal(latent(pipe, "a tree", seed=drawn.settings[1]["seed"]), drawn.latent[1:])


def test_output_types(pipe: VARControlPipeline) -> None:
    pil = np.asarray(pipe(PROMPT, seed=1).images[0])
    array = pipe(PROMPT, seed=1, output_type="np").images
    tensor = pipe(PROMPT, seed=1, output_type="pt").images
    assert array.shape == (1, 32, 32, 3) and tensor.shape == (1, 3, 32, 32)
    assert array.min() >= 0 and array.max() <= 1
    assert np.array_equal(np.round(array[0] * 255).astype(np.uint8), pil)
    assert torch.equal(tensor.permute(0, 2, 3, 1), torch.from_numpy(array))
    out = pipe(PROMPT, seed=1, output_type="latent")
    assert torch.equal(out.images, out.latent) and out.latent.shape == (1, 3, 8, 8)
    images, seeds, *_ = pipe(PROMPT, seed=1, return_dict=False)
    assert seeds == [1] and np.array_equal(np.asarray(images[0]), pil)


def test_callback_sees_every_scale(pipe: VARControlPipeline) -> None:
    seen: list[tuple[int, Any]] = []

    def callback(given: Any, index: int, step: ScaleStep, kwargs: dict[str, Any]) -> None:
        assert given is pipe and step.index == index
        seen.append((index, kwargs["preview"]))

    out = pipe(PROMPT, seed=1, num_images_per_prompt=2, callback_on_step_end=callback)
    assert [index for index, _ in seen] == [0, 1, 2, 3]
    pictures = [preview() for _, preview in seen]  # each is bound to its own scale, also afterwards
    assert all(len(images) == 2 and images[0].size == (32, 32) for images in pictures)
    assert np.array_equal(np.asarray(pictures[-1][1]), np.asarray(out.images[1]))
    assert not np.array_equal(np.asarray(pictures[0][1]), np.asarray(out.images[1]))


def test_stop_after_and_forced_codes(pipe: VARControlPipeline) -> None:
    full = pipe(PROMPT, seed=1)
    short = pipe(PROMPT, seed=1, stop_after=2)
    assert len(short.codes) == 2 and all(map(torch.equal, short.codes, full.codes[:2]))
    assert short.settings[0]["stop_after"] == 2
    other = pipe(PROMPT, seed=2, forced=full.codes)
    assert torch.equal(other.latent, full.latent) and other.seeds == [2]


class Alternate:
    """Every second scale by another network; shows itself by its class alone."""

    def __init__(self, *networks: Any) -> None:
        self.networks = networks

    def route(self, step: ScaleStep) -> Route:
        return Route(self.networks[step.index % len(self.networks)])


def test_settings_name_the_parts_of_a_call(pipe: VARControlPipeline) -> None:
    plain = pipe(PROMPT, seed=1)
    assert not {"sampler", "router", "cache", "search", "forced", "guidance_layer"} & set(plain.settings[0])
    out = pipe(PROMPT, seed=1, sampler=BitwiseSampler(0.5, top_k=1), router=Alternate(pipe.transformer))
    settings = out.settings[0]
    assert settings["sampler"] == "BitwiseSampler(temperature=0.5, top_k=1, top_p=0.0)"
    assert settings["router"] == "Alternate"
    assert not {"temperature", "top_k", "top_p"} & set(settings)
    single = pipe(PROMPT, seed=1, router=SingleModel(pipe.transformer)).settings[0]
    assert single["router"] == "SingleModel"  # not the printed network
    assert pipe(PROMPT, seed=2, forced=plain.codes[:2]).settings[0]["forced"] == 2


# text and numbers


def test_prompt_embeds_replace_the_text_encoder(pipe: VARControlPipeline) -> None:
    bare = VARControlPipeline(
        pipe.transformer, pipe.vae, schedule=tiny_schedule().to_dict(), temperature=1.0, top_p=0.0
    )
    bare.set_progress_bar_config(disable=True)
    features = pipe.encode_prompt([PROMPT, "a"])
    assert features.lengths == (6, 2)
    assert torch.equal(latent(bare, None, prompt_embeds=features), latent(pipe, [PROMPT, "a"]))
    assert torch.equal(latent(bare, None, prompt_embeds=features.features[None, :6]), latent(pipe))
    with pytest.raises(ValueError, match="no text encoder, so prompt"):
        bare(PROMPT)
    with pytest.raises(ValueError, match="no text encoder, so negative_prompt"):
        bare(prompt_embeds=features, negative_prompt="red")


def test_numbers_of_a_call_and_of_the_model(pipe: VARControlPipeline) -> None:
    plain = latent(pipe)
    assert torch.equal(latent(pipe, guidance_scale=3.0, temperature=np.float32(1.0)), plain)
    assert torch.equal(latent(pipe, guidance_scale=torch.tensor([3.0] * 4)), plain)
    assert torch.equal(latent(tiny_pipeline(guidance_scale=1.5)), latent(pipe, guidance_scale=1.5))
    assert torch.equal(latent(pipe, sampler=BitwiseSampler(top_k=1)), latent(pipe, top_k=1))
    for changed in ({"guidance_scale": 1}, {"guidance_scale": [3, 3, 1, 1]}, {"negative_prompt": "tree"}, {"top_k": 1}):
        assert not torch.equal(latent(pipe, **changed), plain)
    per_prompt = latent(pipe, ["a", "a"], negative_prompt=["red", "tree"], seed=[1, 1])
    assert torch.equal(per_prompt[1:], latent(pipe, "a", negative_prompt="tree"))


def test_guidance_inside_a_layer(pipe: VARControlPipeline) -> None:
    plain, control = latent(pipe), {"canny": edges()}
    inside = pipe(PROMPT, seed=1, guidance_layer=1)
    assert not torch.equal(inside.latent, plain)
    assert not torch.equal(inside.latent, latent(pipe, guidance_layer=0))
    assert torch.equal(latent(pipe, guidance_layer=np.int64(-2)), inside.latent)  # of three layers
    assert inside.settings[0]["guidance_layer"] == 1
    assert torch.equal(latent(pipe, guidance_layer=1, guidance_scale=1), latent(pipe, guidance_scale=1))
    assert not torch.equal(latent(pipe, guidance_layer=1, control=control), latent(pipe, control=control))


# sizes


def test_a_size_the_model_does_not_have(pipe: VARControlPipeline, caplog: pytest.LogCaptureFixture) -> None:
    assert pipe(PROMPT, height=40, width=24).images[0].size == (32, 32)
    assert "24x40 is no size of this model: drawing 32x32" in caplog.text
    caplog.clear()
    pipe(PROMPT, height=32, width=32)
    assert not caplog.text


def test_templates() -> None:
    vae = type(tiny_vae())(
        bits=3, stride=8, widths=(8, 8, 8, 8), patch=2, encoder_blocks=1, decoder_blocks=1, norm_groups=4
    )
    text = tiny_pipeline()
    pipe = VARControlPipeline(
        tiny_backbone(),
        vae.eval(),
        text.text_encoder,
        text.tokenizer,
        schedule={"family": "infinity", "budget": "0.06M"},
    )
    add_tiny_control(pipe)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a", stop_after=1).images[0].size == (256, 256)
    assert pipe("a", stop_after=1, height=200, width=420).images[0].size == (352, 176)
    # without a size the control's aspect decides
    assert pipe("a", stop_after=1, control={"canny": edges(size=(300, 150))}).images[0].size == (352, 176)


def test_own_schedule(pipe: VARControlPipeline) -> None:
    wide = ScaleSchedule(((1, 1), (2, 4)), position_grid=(4, 4), stride=8)
    out = pipe(PROMPT, seed=1, schedule=wide)
    assert out.images[0].size == (32, 16)
    assert torch.equal(latent(pipe, schedule=out.settings[0]["schedule"]), out.latent)
    assert latent(pipe, schedule=wide, control={"canny": edges()}).shape == (1, 3, 4, 8)


# parts of the loop


class Pick:
    """Goes on with fixed rows after the second scale."""

    def __init__(self, *rows: int) -> None:
        self.rows = rows

    def select(self, state: SamplerState, step: ScaleStep) -> Tensor | None:
        return torch.tensor(self.rows) if step.index == 1 else None

    def __repr__(self) -> str:
        return f"Pick{self.rows}"


def test_search_survivors_keep_their_prompt_and_seed(pipe: VARControlPipeline) -> None:
    out = pipe(["a red cube", "a tree"], seed=1, num_images_per_prompt=2, search=Pick(3, 0))
    everyone = pipe(["a red cube", "a tree"], seed=1, num_images_per_prompt=2)
    assert out.seeds == [4, 1]
    assert [entry["prompt"] for entry in out.settings] == ["a tree", "a red cube"]
    assert out.settings[0]["search"] == "Pick(3, 0)"
    assert torch.equal(out.latent, everyone.latent[[3, 0]])


def test_a_router_with_another_network(pipe: VARControlPipeline) -> None:
    mixed = latent(pipe, router=Alternate(pipe.transformer, tiny_backbone(5)), control={"canny": edges()})
    assert mixed.shape == (1, 3, 8, 8) and not torch.equal(mixed, latent(pipe, control={"canny": edges()}))


# saving, loading, devices


def test_round_trip(folder: Path, pipe: VARControlPipeline) -> None:
    loaded = VARControlPipeline.from_pretrained(folder)
    assert loaded.available_controls == ("canny", "depth")
    for control in (None, {"canny": edges()}, {"depth": edges()}):
        assert torch.equal(latent(loaded, control=control), latent(pipe, control=control))
    index = json.loads((folder / "model_index.json").read_text())
    assert index["transformer"] == ["scaleweaver.backbones.infinity", "InfinityTransformer"]
    assert not list(folder.rglob("*.bin"))
    assert loaded(PROMPT).settings[0]["model"] == str(folder)


def test_saving_shows_the_plain_backbone_and_leaves_the_controls_on(folder: Path, pipe: VARControlPipeline) -> None:
    from safetensors.torch import load_file

    saved = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert set(saved) == set(tiny_backbone().state_dict())
    assert not torch.equal(latent(pipe, control={"canny": edges()}), latent(pipe))


def test_a_control_left_over_in_the_folder_is_named(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = VARControlPipeline.from_pretrained(folder)
    loaded.save_pretrained(tmp_path)
    assert not caplog.text
    loaded.unload_control("depth")
    loaded.save_pretrained(tmp_path)
    assert "controls that this pipeline has not: depth" in caplog.text


def test_shards(pipe: VARControlPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 2
    assert torch.equal(latent(VARControlPipeline.from_pretrained(tmp_path)), latent(pipe))


def test_model_card(folder: Path, tmp_path: Path) -> None:
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: scaleweaver\n") and "- canny" in card and "32x32" in card
    (folder / "README.md").write_text(card + "\nMade by me.\n")
    try:
        VARControlPipeline.from_pretrained(folder).save_pretrained(tmp_path)
    finally:
        (folder / "README.md").write_text(card)
    assert (
        (tmp_path / "README.md").read_text().endswith("Made by me.\n")
    )  # a card that came with the model stays with it


def test_dtypes(folder: Path) -> None:
    half = VARControlPipeline.from_pretrained(folder, dtype="bfloat16")
    assert half.vae.dtype == half.text_encoder.dtype == torch.bfloat16
    assert half.transformer.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert half.controls["canny"].type_embed.dtype == torch.bfloat16
    assert latent(half, control={"canny": edges()}).isfinite().all()
    half.to(torch.float32)
    assert half.controls["canny"].type_embed.dtype == half.vae.dtype == torch.float32
    assert VARControlPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16).vae.dtype == torch.bfloat16
    assert VARControlPipeline.from_pretrained(folder, dtype="auto").vae.dtype == auto_dtype()
    with pytest.raises(ValueError, match="pass dtype alone"):
        VARControlPipeline.from_pretrained(folder, dtype="auto", torch_dtype=torch.float32)
    for bad in ("float99", "int64", 3):
        with pytest.raises(ValueError, match="dtype="):
            read_dtype(bad)  # type: ignore[arg-type]


def test_auto_dtype_is_that_of_the_device() -> None:
    on_cpu = auto_dtype("cpu")
    assert on_cpu in (torch.float32, torch.bfloat16)
    assert auto_dtype("mps") == torch.float32
    assert read_dtype("auto", torch.device("cpu")) == on_cpu and read_dtype("float16", "cpu") == torch.float16
    if torch.cuda.is_available():
        assert auto_dtype() == auto_dtype("cuda") == auto_dtype("cuda:0")
    else:
        assert auto_dtype() == on_cpu and auto_dtype("cuda") == torch.float32


def test_components_and_defaults_can_be_given(folder: Path) -> None:
    vae = tiny_vae(7)
    loaded = VARControlPipeline.from_pretrained(folder, vae=vae, guidance_scale=1.5)
    assert loaded.vae is vae and loaded(PROMPT).settings[0]["guidance_scale"] == 1.5
    bare = VARControlPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None)
    assert bare.text_encoder is None


def test_offloading(folder: Path, pipe: VARControlPipeline) -> None:
    # without an accelerator the hooks offload from the CPU to the CPU: the same path, nothing to gain
    loaded = VARControlPipeline.from_pretrained(folder)
    loaded.enable_model_cpu_offload(device="cpu")
    control = {"canny": edges()}
    previews: list[Any] = []
    for _ in range(2):
        drawn = latent(
            loaded, control=control, callback_on_step_end=lambda *given: previews.append(given[3]["preview"]())
        )
        assert torch.equal(drawn, latent(pipe, control=control))
    assert len(previews) == 8


def test_progress_bar(pipe: VARControlPipeline, capsys: pytest.CaptureFixture[str]) -> None:
    pipe.set_progress_bar_config(disable=False)
    try:
        pipe(PROMPT)
    finally:
        pipe.set_progress_bar_config(disable=True)
    assert "4/4" in capsys.readouterr().err


# what callers get wrong


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": None}, "pass either prompt or prompt_embeds"),
        ({"prompt": []}, "at least one string"),
        ({"prompt": [3]}, "pass strings"),
        ({"height": 32}, "pass both or none"),
        ({"height": 0, "width": 32}, "height is 0"),
        ({"height": 32.5, "width": 32}, "whole number of pixels"),
        ({"schedule": "big"}, "pass a ScaleSchedule"),
        ({"schedule": tiny_schedule(), "height": 64, "width": 64}, "draws 32x32, not 64x64"),
        ({"schedule": ScaleSchedule(((1, 1),), (4, 4), stride=16)}, "16 pixels per token"),
        ({"guidance_scale": "high"}, "guidance_scale is 'high'"),
        ({"guidance_scale": [1, 2]}, "2 values but there are 4 scales"),
        ({"guidance_scale": float("nan")}, "finite"),
        ({"temperature": 0}, "above 0"),
        ({"temperature": [[1.0]]}, "shape"),
        ({"top_p": 2}, "top_p from 0 to 1"),
        ({"top_p": [0.5] * 4}, "shape"),
        ({"top_k": 1.5}, "whole number"),
        ({"num_images_per_prompt": 0}, "at least 1"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": [1, 2]}, "2 seeds for 1 images"),
        ({"output_type": "jpeg"}, '"pil", "np", "pt" or "latent"'),
        ({"callback_on_step_end": 3}, "pass a function"),
        ({"stop_after": 9}, "1 to 4"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"control_guidance_scale": 2}, "without a control"),
        ({"guidance_layer": 3}, "guidance_layer is 3; this model has the layers 0 to 2, or -3 to -1"),
        ({"guidance_layer": -4}, "guidance_layer is -4"),
        ({"guidance_layer": 1.5}, "guidance_layer is 1.5; pass a whole number"),
        ({"guidance_layer": True}, "guidance_layer is True"),
        ({"guidance_layer": [1]}, "guidance_layer has shape"),
        ({"guidance_layer": 1, "control_guidance_scale": 2, "control": {"canny": edges()}}, "pass one of them"),
        ({"seed": "seven"}, "seed is 'seven'; pass a whole number"),
        ({"generator": 7}, "generator is 7; pass a torch.Generator"),
    ],
)
def test_mistakes_are_explained(pipe: VARControlPipeline, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pipe(**{"prompt": PROMPT, **arguments})


def test_mistakes_are_found_before_any_network_runs(pipe: VARControlPipeline) -> None:
    def refuse(*given: Any) -> None:
        raise AssertionError("a network ran")

    handles = [part.register_forward_pre_hook(refuse) for part in (pipe.text_encoder, pipe.transformer)]
    wrong: list[Callable[[], Any]] = [
        lambda: pipe(PROMPT, control={"canny": "nowhere.png"}),
        lambda: pipe(PROMPT, guidance_scale=[1, 2]),
        lambda: pipe(PROMPT, seed=-1),
        lambda: pipe(PROMPT, control=Control("canny", edges(), scale=[1.0])),
    ]
    try:
        for call in wrong:
            with pytest.raises(ValueError):
                call()
    finally:
        for handle in handles:
            handle.remove()


def test_parts_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="12 bits per token, the transformer 9"):
        VARControlPipeline(tiny_backbone(bits=9), tiny_vae())


def test_missing_models(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"holds no model_index.json \(found: notes.txt\)"):
        VARControlPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        tiny_pipeline().save_pretrained(tmp_path / "notes.txt")
