"""Published Infinity checkpoints in every layout to a pipeline: nothing changes, and nothing is lost unsaid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny import TEXT_WIDTH, log_odds, recording, tiny_text
from tiny_official import (
    BITS,
    official_tokenizer,
    official_transformer,
    tiny_bsq,
    tiny_infinity,
    write_sharded,
    write_text_encoder,
)
from torch import Tensor

from scaleweaver.backbones.infinity import InfinityTransformer
from scaleweaver.cache import KVCache
from scaleweaver.contracts import TextFeatures
from scaleweaver.convert.infinity import convert_infinity, fill_transformer, load_tokenizer, load_transformer
from scaleweaver.pipeline import VARControlPipeline
from scaleweaver.schedule import ScaleSchedule, infinity_schedule
from scaleweaver.tokenizers.bsq import BSQTokenizer

SCHEDULE = ScaleSchedule(((1, 1), (2, 2), (3, 3)), position_grid=(64, 64))


@pytest.fixture(scope="module")
def model() -> InfinityTransformer:
    return tiny_infinity()


@pytest.fixture(scope="module")
def parts(model: InfinityTransformer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Arguments of `convert_infinity`: files in the official layout."""
    folder = tmp_path_factory.mktemp("official")
    torch.save(official_transformer(model), folder / "transformer.pth")
    torch.save({"vae": official_tokenizer(tiny_bsq()), "ema": {"decay": 0.99}}, folder / "vae.pth")
    text = write_text_encoder(folder / "t5")
    return {"transformer": folder / "transformer.pth", "vae": folder / "vae.pth", "text_encoder": text}


@torch.no_grad()
def logits(model: InfinityTransformer, text: TextFeatures | None = None) -> Tensor:
    inputs = torch.randn(2, SCHEDULE.length - 1, model.config["bits"], generator=torch.Generator().manual_seed(1))
    return model(inputs, SCHEDULE.steps, model.encode_text(text or tiny_text()), KVCache())


def variant(name: str, model: InfinityTransformer, folder: Path) -> Path:
    path = folder / f"{name}.pth"
    content: dict[str, Any] = official_transformer(model)
    if name == "flat":
        content = official_transformer(model, per_chunk=None)
    if name == "one block a chunk":
        content = official_transformer(model, per_chunk=1)
    if name == "uneven order":
        content = dict(reversed(content.items()))
    if name == "scale by row":
        content = official_transformer(model, heads_last=True)
    if name == "training run":
        content = {"trainer": {"gpt_fsdp": content, "gpt_opt": {"lr": 1e-4}}, "epoch": 3}
    if name.startswith("sharded"):
        return write_sharded(folder / name, content, name.split()[1])
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "single file",
        "flat",
        "one block a chunk",
        "uneven order",
        "scale by row",
        "training run",
        "sharded bin",
        "sharded pth",
        "sharded safetensors",
    ],
)
def test_every_layout_gives_the_same_logits(name: str, model: InfinityTransformer, tmp_path: Path) -> None:
    read = load_transformer(variant(name, model, tmp_path))
    assert torch.equal(logits(read), logits(model))
    names = ("depth", "width", "heads", "bits", "text_width", "text_length", "max_scales")
    assert {key: read.config[key] for key in names} == {key: model.config[key] for key in names}


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("plain", [True, False])
def test_every_layout_of_a_tokenizer_decodes_the_same(wrapped: bool, plain: bool, tmp_path: Path) -> None:
    vae = tiny_bsq()
    weights = official_tokenizer(vae, plain=plain)
    torch.save({"vae": weights, "ema": {"step": 1}} if wrapped else weights, tmp_path / "vae.pth")
    read = load_tokenizer(tmp_path / "vae.pth", BITS)
    latent = torch.randn(1, BITS, 4, 4, generator=torch.Generator().manual_seed(0))
    image = vae.decode(latent)
    assert torch.equal(read.decode(latent), image)
    assert torch.equal(read.encode(image), vae.encode(image))


@torch.no_grad()
def test_a_tokenizer_of_stride_8_has_four_positions_per_token(tmp_path: Path) -> None:
    vae = tiny_bsq(bits=3, stride=8, widths=(8, 16, 16, 16), patch=2, decoder_blocks=2)
    torch.save({"vae": official_tokenizer(vae, names="infinity_vae_d56_f8_14_patchify")}, tmp_path / "vae.pth")
    read = load_tokenizer(tmp_path / "vae.pth", 12)
    assert read.config["patch"] == 2 and read.config["stride"] == 8 and read.config["decoder_blocks"] == 2
    with pytest.raises(ValueError, match=r"has 3 bits at stride 8, which makes 12 per token .* reads 14"):
        load_tokenizer(tmp_path / "vae.pth", 14)


def test_the_unconditional_table_gets_the_length_of_prompts(
    model: InfinityTransformer, caplog: pytest.LogCaptureFixture
) -> None:
    table = model.null_text.detach()
    shorter = fill_transformer(official_transformer(model), "longer.pth", text_length=20)
    assert torch.equal(shorter.null_text, table[:20])
    assert "longer.pth: cfg_uncond has 512 rows, the first 20 are kept" in caplog.text
    longer = [fill_transformer(official_transformer(model), "shorter.pth", text_length=600) for _ in range(2)]
    assert torch.equal(longer[0].null_text[:512], table) and torch.equal(longer[0].null_text, longer[1].null_text)
    assert longer[0].null_text[512:].std().item() == pytest.approx(TEXT_WIDTH**-0.5, rel=0.1)
    assert "512 rows, random initial ones make it 600" in caplog.text
    assert torch.equal(logits(shorter), logits(longer[0]))


@torch.no_grad()
@pytest.mark.parametrize("name", ["infinity_tiny", "infinity_tiny_8b"])
def test_recorded_weights_give_the_recorded_logits(name: str, tmp_path: Path) -> None:
    recorded = recording(name)
    config, want = recorded.config, recorded.tensors
    official = {key.removeprefix("weights."): t for key, t in want.items() if key.startswith("weights.")}
    torch.save(official, tmp_path / "transformer.pth")
    patched = bool(config["apply_spatial_patchify"])
    layout: dict[str, Any] = {"stride": 8, "widths": (8, 16, 16, 16), "patch": 2} if patched else {}
    vae = tiny_bsq(bits=config["codebook_dim"], **layout)
    names = "infinity_vae_d56_f8_14_patchify" if patched else "infinity_vae_d16"
    torch.save({"vae": official_tokenizer(vae, names=names)}, tmp_path / "vae.pth")
    out = convert_infinity(
        transformer=tmp_path / "transformer.pth",
        vae=tmp_path / "vae.pth",
        text_encoder=write_text_encoder(tmp_path / "t5", width=config["text_channels"]),
        out=tmp_path / "out",
    )
    pipe = VARControlPipeline.from_pretrained(out)
    assert pipe.transformer.config["text_length"] == 512  # the recorded table is shorter
    text, schedule = pipe.transformer.encode_text(recorded.text()), infinity_schedule("1.0", "0.06M")
    found = pipe.transformer(want["sq.x_in"], schedule.steps, text, KVCache())
    torch.testing.assert_close(found, log_odds(want["sq.tf.logits"]), atol=2e-4, rtol=0)


def test_the_folder_draws(parts: dict[str, Any], model: InfinityTransformer, tmp_path: Path) -> None:
    out = convert_infinity(**parts, out=tmp_path / "new" / "out", max_shard_size="40KB")
    assert len(list((out / "transformer").glob("*.safetensors"))) > 2  # in shards
    assert not list(tmp_path.rglob("*.bin")) and [path.name for path in out.parent.iterdir()] == ["out"]
    pipe = VARControlPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(logits(pipe.transformer), logits(model))
    assert pipe.config["schedule"] == {"family": "infinity", "budget": "0.06M"}
    found = [pipe.config[name] for name in ("guidance_scale", "temperature", "top_k", "top_p")]
    assert found == [3.0, 0.5, 900, 0.97]
    drawn: Any = pipe("a red cube on grass", seed=3, schedule=SCHEDULE, output_type="pt")
    ready = VARControlPipeline(model, tiny_bsq(), pipe.text_encoder, pipe.tokenizer, top_k=900)
    ready.set_progress_bar_config(disable=True)
    expected: Any = ready("a red cube on grass", seed=3, schedule=SCHEDULE, output_type="pt")
    assert drawn.images.shape == (1, 3, 48, 48) and torch.equal(drawn.images, expected.images)


def test_a_number_format_spares_what_must_stay_exact(parts: dict[str, Any], tmp_path: Path) -> None:
    out = convert_infinity(**parts, out=tmp_path / "out", dtype="bfloat16")
    for folder in ("transformer", "vae", "text_encoder"):
        (file,) = (out / folder).glob("*.safetensors")
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                exact = folder == "transformer" and {"head", "log_scale", "shared_modulation", "head_modulation"} & set(
                    name.split(".")
                )
                assert weights.get_tensor(name).dtype == (torch.float32 if exact else torch.bfloat16), name


def test_without_a_text_encoder(parts: dict[str, Any], tmp_path: Path) -> None:
    out = convert_infinity(**{**parts, "text_encoder": None}, out=tmp_path / "out")
    assert not (out / "text_encoder").exists()
    pipe = VARControlPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    embeds = torch.randn(1, 4, TEXT_WIDTH, generator=torch.Generator().manual_seed(0))
    drawn: Any = pipe(prompt_embeds=embeds, seed=0, schedule=SCHEDULE)
    assert len(drawn.images) == 1
    with pytest.raises(ValueError, match="no text encoder"):
        pipe("a red cube")


def test_every_misfit_is_named_at_once(model: InfinityTransformer) -> None:
    official = official_transformer(model)
    del official["block_chunks.1.module.0.ffn.fc1.bias"]
    official["block_chunks.0.module.1.sa.proj.weight"] = torch.zeros(3, 4)
    official["head.bias"] = torch.zeros(16, dtype=torch.int64)
    official["head_nm.extra"] = torch.zeros(1)
    official |= {f"other.{i:02}": torch.zeros(1) for i in range(30)}
    with pytest.raises(ValueError) as refusal:
        fill_transformer(official, "model.pth")
    text = str(refusal.value)
    assert text.startswith("model.pth does not fit InfinityTransformer; ")
    assert "missing, under our names: blocks.2.ffn.fc1.bias (1 in all)" in text
    assert "left over: head_nm.extra, other.00, " in text and "and 11 more (31 in all)" in text
    assert "block_chunks.0.module.1.sa.proj.weight (3, 4) float32, expected (32, 32) float32" in text
    assert "head.bias (16,) int64" in text


@pytest.mark.parametrize(
    "name", ["pos_start", "word_embed.weight", "text_norm.weight", "block_chunks.0.module.0.sa.scale_mul_1H11"]
)
def test_a_missing_weight_that_tells_a_size_is_named_too(name: str, model: InfinityTransformer) -> None:
    official = official_transformer(model)
    tensor = official.pop(name)
    with pytest.raises(ValueError, match=r"missing, under our names: [\w.]+ \(1 in all\)\. Pass") as refusal:
        fill_transformer(official, "model.pth")
    assert "left over" not in str(refusal.value)
    twice = tensor.flatten().expand(1, 1, 1, 2, -1)
    with pytest.raises(ValueError, match=rf"wrong: {name} \(1, 1, .*, expected other axes \(1 in all\)"):
        fill_transformer({**official, name: twice}, "model.pth")


def test_a_tokenizer_that_is_not_whole(tmp_path: Path) -> None:
    weights = official_tokenizer(tiny_bsq())
    del weights["decoder.mid.block_1.norm1.norm.weight"]
    weights["quantizer.project_in.weight"] = torch.zeros(2)
    torch.save({"vae": weights}, tmp_path / "vae.pth")
    match = (
        r"missing, under our names: decoder\.mid\.block_1\.norm1\.weight .* left over: quantizer\.project_in\.weight"
    )
    with pytest.raises(ValueError, match=match):
        load_tokenizer(tmp_path / "vae.pth", BITS)


def test_wrong_parts_are_refused_before_anything_is_written(parts: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"

    def fails(match: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=match):
            convert_infinity(**{**parts, "out": out, **changes})
        assert not out.exists()

    fails(r"vae\.pth' holds no tensors by name but vae \(dict\), ema \(dict\)", transformer=parts["vae"])
    fails(r"does not fit BSQTokenizer; missing", vae=parts["transformer"])
    wide = write_text_encoder(tmp_path / "wide", width=24)
    fails(r"is 24 wide and the transformer reads 16; pass the one .*flan-t5-xl", text_encoder=wide)
    fails(r"text encoder 'google/none' could not be loaded \(.*; pass a folder", text_encoder="google/none")
    fails(r"budget '2M' is unknown", budget="2M")
    fails(r"dtype='int8'", dtype="int8")
    torch.save({"vae": official_tokenizer(tiny_bsq(bits=6))}, tmp_path / "vae.pth")
    fails(r"has 6 bits at stride 16, .* reads 8; pass the tokenizer it was trained with", vae=tmp_path / "vae.pth")
    lacking = write_text_encoder(tmp_path / "lacking")
    from safetensors.torch import load_file, save_file

    weights = load_file(lacking / "model.safetensors")
    del weights["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(weights, lacking / "model.safetensors", metadata={"format": "pt"})
    fails(r"lacks encoder\.block\.1\.layer\.0\.SelfAttention\.q\.weight \(1 in all\)", text_encoder=lacking)


def test_a_folder_with_files_is_left_alone(parts: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for out in (tmp_path / "full", tmp_path / "full" / "notes.txt"):
        with pytest.raises(ValueError, match="is not an empty folder"):
            convert_infinity(**parts, out=out)
    (tmp_path / "empty").mkdir()
    assert (convert_infinity(**parts, out=tmp_path / "empty") / "model_index.json").is_file()


def test_defaults_of_the_published_sizes() -> None:
    from scaleweaver.convert.infinity import _defaults

    def of(preset: str, name: str, budget: str | None = None) -> tuple[str, float, float]:
        with torch.device("meta"):
            model = InfinityTransformer.preset(preset)
        found = _defaults(model, name, budget)
        return found["schedule"]["budget"], found["guidance_scale"], found["temperature"]

    assert of("125M", "infinity_125M_256x256.pth") == ("0.06M", 4.0, 0.5)
    assert of("2B", "infinity_2b_reg.pth") == ("1M", 3.0, 0.5)
    assert of("8B", "infinity_8b_weights") == ("1M", 3.0, 1.0)
    assert of("8B", "infinity_8b_512x512_weights") == ("0.25M", 3.0, 1.0)
    assert of("8B", "infinity_8b_512x512_weights", "1M") == ("1M", 3.0, 1.0)
    assert of("layer16", "layer16.pth") == ("0.06M", 3.0, 0.5)


def test_the_command(parts: dict[str, Any], tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from scaleweaver.cli import app

    named = [word for name, path in parts.items() for word in (f"--{name.replace('_', '-')}", str(path))]
    result = CliRunner().invoke(app, ["convert", "infinity", *named, str(tmp_path / "out"), "--budget", "0.25M"])
    assert result.exit_code == 0, result.output
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["schedule"]["budget"] == "0.25M"
    again = CliRunner().invoke(app, ["convert", "infinity", *named, str(tmp_path / "out")])
    assert again.exit_code == 1 and "is not an empty folder" in again.output


def test_shapes_alone_decide_the_tokenizer() -> None:
    vae = tiny_bsq(encoder_blocks=1, decoder_blocks=1, stem_width=24)
    from scaleweaver.convert.infinity import fill_tokenizer

    read = fill_tokenizer(vae.state_dict(), "vae.pth", BITS)
    assert isinstance(read, BSQTokenizer)
    assert {key: value for key, value in read.config.items() if not key.startswith("_")} == {
        key: value for key, value in vae.config.items() if not key.startswith("_")
    }
