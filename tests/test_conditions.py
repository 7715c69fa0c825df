"""Prompts to rows: a real tiny T5 with a real tokenizer, and the backbone's own text path."""

import warnings

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from scaleweaver.backbones.infinity import InfinityTransformer
from scaleweaver.conditions import build, encode_prompts, make_generators, pack
from scaleweaver.contracts import TextFeatures

WORDS = ["a", "red", "blue", "green", "ball", "cube", "left", "of", "the", "on", "grass"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def encoder() -> T5EncoderModel:
    torch.manual_seed(0)
    config = T5Config(vocab_size=20, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    return T5EncoderModel(config).eval()


@pytest.fixture(scope="module")
def backbone() -> InfinityTransformer:
    torch.manual_seed(0)
    return InfinityTransformer(depth=2, width=32, heads=2, bits=4, text_width=32, text_length=12, ffn_hidden=64).eval()


def test_features_are_the_encoder_states_of_each_prompt(tokenizer, encoder):
    prompts = ["a red ball", "a blue cube left of the green ball"]
    text = encode_prompts(prompts, tokenizer, encoder)
    assert text.lengths == (4, 9) and text.features.shape == (13, 32) and text.features.dtype == torch.float32
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = encoder(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    torch.testing.assert_close(text.features, states[batch.attention_mask.bool()], atol=1e-5, rtol=0)
    assert not text.features.requires_grad


def test_features_do_not_depend_on_the_other_prompts(tokenizer, encoder):
    together = encode_prompts(["the red cube on grass", "a ball", "a ball"], tokenizer, encoder)
    alone = encode_prompts("a ball", tokenizer, encoder)
    assert together.lengths == (6, 3, 3)
    assert torch.equal(together.features[6:9], alone.features)
    assert torch.equal(together.features[9:], alone.features)


def test_an_empty_prompt_is_its_end_token(tokenizer, encoder):
    text = encode_prompts(["", "red"], tokenizer, encoder)
    assert text.lengths == (1, 2)
    assert torch.isfinite(text.features).all()


def test_a_long_prompt_is_cut_with_a_warning_that_shows_what(tokenizer, encoder):
    with pytest.warns(UserWarning, match="8 tokens, the limit is 5; this was cut: 'the green ball'"):
        cut = encode_prompts("a red cube on the green ball", tokenizer, encoder, max_length=5)
    assert cut.lengths == (5,)
    kept = encode_prompts("a red cube on", tokenizer, encoder, max_length=5)  # the end token is kept as well
    assert torch.equal(cut.features, kept.features)


def test_a_prompt_at_the_limit_is_not_cut(tokenizer, encoder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert encode_prompts("a red cube on", tokenizer, encoder, max_length=5).lengths == (5,)


def test_half_precision_encoders_give_float32(tokenizer, encoder):
    half = T5EncoderModel(encoder.config).to(torch.bfloat16).eval()
    assert encode_prompts("a ball", tokenizer, half).features.dtype == torch.float32


@pytest.mark.parametrize("prompt", [None, 3, ["a", None], [], [["a"]], {"a": 1}, b"a"])
def test_prompts_that_are_no_strings(tokenizer, encoder, prompt):
    with pytest.raises(ValueError, match=r"prompt .*; pass"):
        encode_prompts(prompt, tokenizer, encoder)


def test_a_tokenizer_without_end_token_is_refused_for_an_empty_prompt(encoder):
    words = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    bare = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    with pytest.raises(ValueError, match="end-of-sequence"):
        encode_prompts("", bare, encoder)


def test_pack_takes_given_embeddings():
    embeds = torch.randn(2, 3, 32, dtype=torch.float64)
    assert pack(embeds).lengths == (3, 3)
    masked = pack(embeds, torch.tensor([[1, 1, 0], [1, 1, 1]]))
    assert masked.lengths == (2, 3) and masked.features.dtype == torch.float32
    torch.testing.assert_close(masked.features[:2], embeds[0, :2].float())
    assert pack([embeds[0], embeds[1, :1]]).lengths == (3, 1)


@pytest.mark.parametrize(
    "embeds, mask",
    [
        (torch.randn(3, 32), None),
        (torch.randn(0, 3, 32), None),
        (torch.randn(1, 0, 32), None),
        (torch.randn(1, 3, 32), torch.ones(1, 4)),
        (torch.randn(1, 3, 32), torch.zeros(1, 3)),
    ],
)
def test_pack_refuses_other_shapes(embeds, mask):
    with pytest.raises(ValueError, match=r"expected|mask"):
        pack(embeds, mask)


def features(*lengths: int, seed: int = 0) -> TextFeatures:
    generator = torch.Generator().manual_seed(seed)
    return TextFeatures(torch.randn(sum(lengths), 32, generator=generator), lengths)


def test_rows_are_branch_by_branch_and_prompt_by_prompt(backbone):
    conditions = build(backbone, features(3, 5), generators=make_generators(0, 4), images_per_prompt=2)
    assert conditions.branches == 2 and conditions.images == 4
    pooled = conditions.text.pooled
    assert pooled.shape == (8, 32)
    assert torch.equal(pooled[0], pooled[1]) and torch.equal(pooled[2], pooled[3])
    with torch.no_grad():
        text = backbone.encode_text(features(3, 5)).pooled
        null = backbone.encode_text(backbone.null_features([3, 5])).pooled
    torch.testing.assert_close(pooled[::2], torch.cat([text, null]))


def test_negative_prompts_take_the_place_of_the_null_rows(backbone):
    negative = features(2, seed=1)
    conditions = build(backbone, features(3, 5), generators=make_generators(0, 2), negative=negative)
    with torch.no_grad():
        expected = backbone.encode_text(negative).pooled
    torch.testing.assert_close(conditions.text.pooled[2:], expected.expand(2, -1))
    assert conditions.text.mask is not None and conditions.text.mask[:, 0, 0].sum(1).tolist() == [3, 5, 2, 2]


def test_third_branch_repeats_the_null_rows(backbone):
    text = build(backbone, features(3, 5), generators=make_generators(0, 2), branches=3).text
    assert torch.equal(text.pooled[2:4], text.pooled[4:6])
    assert len(build(backbone, features(3), generators=make_generators(0, 1), branches=1).text.pooled) == 1


def test_each_distinct_text_is_encoded_once(backbone, monkeypatch):
    seen = []
    encode = backbone.encode_text
    monkeypatch.setattr(backbone, "encode_text", lambda text: seen.append(text.lengths) or encode(text))
    build(backbone, features(3, 3, 5), generators=make_generators(0, 12), images_per_prompt=4)
    assert seen == [(3, 3, 5, 3, 5)]


def test_build_refuses_what_does_not_fit(backbone):
    generators = make_generators(0, 1)
    with pytest.raises(ValueError, match=r"expected \(3, 32\)"):
        build(backbone, TextFeatures(torch.randn(3, 16), (3,)), generators=generators)
    with pytest.raises(ValueError, match="13 tokens, this backbone reads 12"):
        build(backbone, features(13), generators=generators)
    with pytest.raises(ValueError, match="2 negative prompts for 1 prompts"):
        build(backbone, features(3), generators=generators, negative=features(1, 1))
    with pytest.raises(ValueError, match="1 generators for 2 images"):
        build(backbone, features(3, 3), generators=generators)


def test_generators_count_up_from_a_seed():
    assert [g.initial_seed() for g in make_generators(7, 3)] == [7, 8, 9]
    assert [g.initial_seed() for g in make_generators([5, 5, np.int64(1)], 3)] == [5, 5, 1]


def test_fresh_seeds_differ_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    seeds = {g.initial_seed() for g in make_generators(None, 8)}
    assert len(seeds) == 8
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(0)
    first = [g.initial_seed() for g in make_generators(None, 4)]
    torch.manual_seed(0)
    assert [g.initial_seed() for g in make_generators(None, 4)] != first
    torch.set_rng_state(before)


def test_a_given_generator_draws_the_seeds():
    seeds = [g.initial_seed() for g in make_generators(None, 3, generator=torch.Generator().manual_seed(1))]
    assert seeds == [g.initial_seed() for g in make_generators(None, 3, generator=torch.Generator().manual_seed(1))]
    assert len(set(seeds)) == 3


def test_given_generators_draw_one_seed_each():
    given = [torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)]
    first = make_generators(None, 2, generator=given)
    again = [torch.Generator().manual_seed(g.initial_seed()) for g in first]  # the recorded seeds are the streams
    for ours, redrawn in zip(first, again, strict=True):
        assert torch.equal(torch.rand(4, generator=ours), torch.rand(4, generator=redrawn))
    later = make_generators(None, 2, generator=given)  # the given ones have moved on
    assert not {g.initial_seed() for g in first} & {g.initial_seed() for g in later}
    shared = torch.Generator().manual_seed(1)
    assert len({g.initial_seed() for g in make_generators(None, 2, generator=[shared, shared])}) == 2
    for wrong in (7, [torch.Generator(), 7], "cpu"):
        with pytest.raises(ValueError, match=r"pass a torch\.Generator, or a list"):
            make_generators(None, 2, generator=wrong)


@pytest.mark.parametrize("seed", ["seven", ["seven"], [["seven"]], ["7"], object])
def test_seeds_that_are_no_numbers(seed):
    with pytest.raises(ValueError, match="; pass a whole number from 0 to"):
        make_generators(seed, 1)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, True, "7", [1, "2"], [1, -2]])
def test_bad_seeds(seed):
    with pytest.raises(ValueError, match=r"whole number|2 images"):
        make_generators(seed, 2)


def test_counts_must_match():
    with pytest.raises(ValueError, match="3 seeds for 2 images"):
        make_generators([1, 2, 3], 2)
    with pytest.raises(ValueError, match="1 generators for 2 images"):
        make_generators(None, 2, generator=[torch.Generator()])
    with pytest.raises(ValueError, match="both given"):
        make_generators(1, 2, generator=torch.Generator())
