"""What the recipes read: pictures rendered online, features computed once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_vae
from transformers import T5Config, T5EncoderModel

from scaleweaver.toybox.store import cache_renders
from scaleweaver.train.data import Renders, cached_latents, cached_text, latent_reader, shuffled
from scaleweaver.train.online import BLOCK
from scaleweaver.train.vocabulary import train_vocabulary

PICTURES = {"split": "train", "start": 3, "count": BLOCK + 3, "size": 16, "supersample": 1, "captions": 2}
ONLINE = PICTURES | {"online": True}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("renders") / "store"
    cache_renders(folder, maps=("depth", "keypoints"), workers=0, **PICTURES)  # type: ignore[arg-type]
    return folder


def test_online_pictures_are_those_of_a_store(store):
    online, kept = Renders(ONLINE), Renders(str(store))
    assert online.online and not kept.online and len(online) == len(kept) == BLOCK + 3
    for row in (BLOCK + 2, 0, BLOCK - 1, 0):  # in any order
        assert np.array_equal(online.image(row), kept.image(row))
        assert np.array_equal(online.depth(row), kept.depth(row))
        assert online.captions(row) == kept.captions(row) and online.source(row) == kept.source(row)
        drawn, there = online.skeleton(row), kept.skeleton(row)
        assert there is None if drawn is None else np.array_equal(drawn, there)
    before = online.image(1)
    online.image(1)[:] = 0  # a reader may write into what it got
    assert np.array_equal(online.image(1), before) and before.any()
    both = Renders([str(store), ONLINE])
    assert both.online and np.array_equal(both.image(len(kept) + 4), kept.image(4))


def test_online_pictures_are_rendered_a_block_at_a_time_and_once():
    online = Renders(ONLINE)
    rows = online.rows(0, 0, len(online))
    assert sorted(rows) == list(range(len(online)))
    for row in rows:
        online.image(row)
        online.captions(row)
    assert online.stores[0]._block.cache_info().misses == 2
    assert shuffled(100, 0, 7, 9, BLOCK) == shuffled(100, 0, 0, 16, BLOCK)[7:]
    epochs = shuffled(150, 0, 0, 300, BLOCK)
    assert sorted(epochs[:150]) == sorted(epochs[150:]) == list(range(150)) and epochs[:150] != epochs[150:]
    assert shuffled(150, 1, 0, 300, BLOCK) != epochs


def test_wrong_settings_of_online_pictures():
    with pytest.raises(ValueError, match="do not take path; online pictures can be given split, count, start"):
        Renders(ONLINE | {"path": "x"})
    with pytest.raises(ValueError, match="lack count"):
        Renders({"online": True, "split": "train"})
    with pytest.raises(ValueError, match="captions is 0"):
        Renders(ONLINE | {"captions": 0})


def test_latents_of_online_pictures_are_made_when_read(store, tmp_path):
    vae, online = tiny_vae().eval(), Renders(ONLINE)
    kept = latent_reader(tmp_path / "kept", vae, Renders(str(store)))
    made = latent_reader(tmp_path / "none", vae, online)
    assert kept([2, 17]).dtype == made([2, 17]).dtype == np.float16
    np.testing.assert_allclose(kept([2, 17]), made([2, 17]), atol=2e-3)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="use a store"):
        cached_latents(tmp_path / "none", vae, online)


def test_cached_text_is_that_of_the_encoder(store, tmp_path):
    renders = Renders(str(store))
    torch.manual_seed(0)
    encoder = T5EncoderModel(T5Config(vocab_size=400, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)).eval()
    vocabulary = train_vocabulary((text for row in range(4) for text in renders.captions(row)), 400)
    kept = cached_text(tmp_path, encoder, vocabulary, renders, max_length=12, batch=5)
    features, lengths = kept.read([5, 0, 5], [1, 0, 0])
    assert features.dtype == torch.float32 and features.shape == (int(lengths.sum()), 16)
    texts = [renders.captions(row)[wording] for row, wording in ((5, 1), (0, 0), (5, 0))]
    for text, part in zip(texts, features.split(lengths.tolist()), strict=True):
        ids = vocabulary(text, truncation=True, max_length=12, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            torch.testing.assert_close(part, encoder(input_ids=ids).last_hidden_state[0], atol=4e-3, rtol=2e-3)

    stamp = (tmp_path / "text.npy").stat().st_mtime_ns
    cached_text(tmp_path, encoder, vocabulary, renders, max_length=12)
    assert (tmp_path / "text.npy").stat().st_mtime_ns == stamp
    before = len(kept.features)
    longer = np.array(cached_text(tmp_path, encoder, vocabulary, renders, max_length=64).features)  # other tokens
    assert len(longer) > before
    with torch.no_grad():
        encoder.shared.weight.mul_(-1)
    other = cached_text(tmp_path, encoder, vocabulary, renders, max_length=64)
    assert not np.array_equal(other.features, longer)
    with pytest.raises(ValueError, match="pass text_cache=false"):
        cached_text(tmp_path, encoder, vocabulary, Renders(ONLINE))
