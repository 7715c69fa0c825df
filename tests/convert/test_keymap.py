"""Published names of every released model against ours."""

import pytest
import torch
from tiny_official import shapes

from scaleweaver.backbones.infinity import PRESETS, InfinityTransformer
from scaleweaver.convert.infinity import fill_tokenizer, fill_transformer
from scaleweaver.convert.keymap import UnknownTensor, bsq_key, infinity_key, infinity_weights, rename
from scaleweaver.tokenizers.bsq import BSQTokenizer

TOKENIZERS = {
    "infinity_vae_d16": ("d16", 16),
    "infinity_vae_d24": ("d24", 24),
    "infinity_vae_d32": ("d32", 32),
    "infinity_vae_d64": ("d64", 64),
    "infinity_vae_d56_f8_14_patchify": ("d56_f8", 56),
}


def without_storage(name: str) -> dict[str, torch.Tensor]:
    return {
        key: torch.empty(shape, device="meta", dtype=torch.int64 if key.endswith("lfq.mask") else torch.float32)
        for key, shape in shapes(name).items()
    }


@pytest.mark.parametrize("preset", ["125M", "2B", "8B"])
def test_every_weight_of_a_published_transformer_has_its_place(preset: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    official = without_storage(f"infinity_{preset.lower()}")
    model = fill_transformer(official, preset)  # strict: names and shapes
    assert f"{preset} transformer" in caplog.text
    assert {name: model.config[name] for name in PRESETS[preset]} == PRESETS[preset]
    with torch.device("meta"):
        ours = InfinityTransformer(**PRESETS[preset]).state_dict()
    renamed = infinity_weights(official)
    assert {name: tuple(t.shape) for name, t in renamed.weights.items()} == {n: tuple(t.shape) for n, t in ours.items()}
    # one to one: what is not in the table is a buffer of zeros
    kept = set(renamed.official.values())
    assert len(kept) == len(ours) and all(name.endswith("zero_k_bias") for name in official.keys() - kept)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_weight_of_a_published_tokenizer_has_its_place(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    preset, token_bits = TOKENIZERS[name]
    official = without_storage(name)
    with torch.device("meta"):
        ours = BSQTokenizer.preset(preset)
    config = fill_tokenizer(official, name, token_bits).config
    assert all(config[field] == value for field, value in ours.config.items() if not field.startswith("_"))
    assert f"{preset} tokenizer" in caplog.text
    renamed = rename(official, bsq_key)
    shapes_of = {key: t.shape for key, t in ours.state_dict().items()}
    assert {key: t.shape for key, t in renamed.weights.items()} == shapes_of
    assert official.keys() - set(renamed.official.values()) == {"quantizer.lfq.mask", "quantize.lfq.mask"}
    # the names without the inner `.conv` and `.norm` are ours already
    assert [bsq_key(key) for key in shapes_of] == list(shapes_of)


def test_blocks_are_found_in_every_layout() -> None:
    assert infinity_key("block_chunks.2.module.1.sa.mat_qkv.weight", 3) == "blocks.7.attn.qkv.weight"
    assert infinity_key("blocks.7.sa.mat_qkv.weight") == "blocks.7.attn.qkv.weight"
    assert infinity_key("unregistered_blocks.7.sa.proj.bias") == "blocks.7.attn.proj.bias"
    assert infinity_key("blocks.7.ca.zero_k_bias") is None
    with pytest.raises(ValueError, match="pass blocks_per_chunk"):
        infinity_key("block_chunks.2.module.1.sa.mat_qkv.weight")


def test_a_name_of_another_model_is_refused() -> None:
    for key in (infinity_key, bsq_key):
        with pytest.raises(UnknownTensor, match="another kind of checkpoint"):
            key("quantizer.project_in.weight")
    twice = {"blocks.0.ada_gss": torch.zeros(1), "block_chunks.0.module.0.ada_gss": torch.zeros(1)}
    with pytest.raises(
        ValueError, match=r"'blocks\.0\.ada_gss' and 'block_chunks\.0\.module\.0\.ada_gss' are the same"
    ):
        infinity_weights(twice)
