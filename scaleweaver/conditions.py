"""Everything a call needs that does not depend on generated tokens: text features, rows of all branches, generators.

Text features are T5 encoder states of the real tokens only, packed, float32, as in Infinity (arXiv 2412.04431).
"""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from scaleweaver.contracts import Conditions, Injector, TextFeatures


@torch.no_grad()
def encode_prompts(
    prompts: str | Sequence[str], tokenizer: Any, text_encoder: Any, max_length: int = 512
) -> TextFeatures:
    """Encoder states of the prompts, one row each; an empty prompt is its end-of-sequence token alone.

    Prompts of the same length run together and nothing is padded, so a prompt's features do not depend on the others.
    A prompt over `max_length` tokens is cut, with a warning that shows what was cut.
    """
    texts = check_prompts(prompts, "prompt")
    tokens = {text: _tokens(text, tokenizer, max_length) for text in dict.fromkeys(texts)}
    by_length: dict[int, list[str]] = {}
    for text, ids in tokens.items():
        by_length.setdefault(len(ids), []).append(text)
    states: dict[str, Tensor] = {}
    for group in by_length.values():
        batch = torch.tensor([tokens[text] for text in group], device=text_encoder.device)  # (G, P)
        hidden = text_encoder(input_ids=batch, attention_mask=torch.ones_like(batch)).last_hidden_state  # (G, P, T)
        states.update(zip(group, hidden.float(), strict=True))
    return pack([states[text] for text in texts])


def check_prompts(prompts: str | Sequence[str], name: str) -> list[str]:
    """A list of strings from one string or a sequence of them."""
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(texts, Sequence) or not texts:
        raise ValueError(f"{name} is {prompts!r}; pass a string or a list of at least one string")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{name} holds {text!r} ({type(text).__name__}); pass strings, '' for no text")
    return list(texts)


def _tokens(text: str, tokenizer: Any, max_length: int) -> list[int]:
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    if not ids:
        raise ValueError(f"prompt {text!r} has no tokens; the tokenizer must add an end-of-sequence token")
    if len(ids) <= max_length:
        return ids
    kept: list[int] = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
    special = set(tokenizer.all_special_ids)
    words = sum(token not in special for token in kept)
    cut = [token for token in ids if token not in special][words:]
    warnings.warn(
        f"the prompt has {len(ids)} tokens, the limit is {max_length}; this was cut: {tokenizer.decode(cut)!r}",
        stacklevel=4,
    )
    return kept


def pack(embeds: Tensor | Sequence[Tensor], mask: Tensor | None = None) -> TextFeatures:
    """Given encoder states as features: (B, P, T) with a mask (B, P) of real tokens, or one (P, T) per prompt."""
    rows = list(embeds)
    if not rows or any(row.ndim != 2 or row.shape[0] < 1 for row in rows):
        shapes = [tuple(row.shape) for row in rows]
        raise ValueError(f"prompt embeddings of shapes {shapes}: expected (B, P, T), or a list of (P, T), P >= 1")
    if mask is not None:
        if mask.shape != (len(rows), rows[0].shape[0]) or any(row.shape != rows[0].shape for row in rows):
            raise ValueError(f"mask of shape {tuple(mask.shape)} for {len(rows)} rows of {tuple(rows[0].shape)}")
        rows = [row[keep.bool()] for row, keep in zip(rows, mask, strict=True)]
        if any(len(row) == 0 for row in rows):
            raise ValueError("the mask leaves a prompt without tokens; keep at least its end-of-sequence token")
    return TextFeatures(torch.cat(rows).float(), tuple(len(row) for row in rows))  # (sum of lengths, T)


@torch.no_grad()
def build(
    backbone: Any,
    prompts: TextFeatures,
    *,
    generators: Sequence[torch.Generator],
    branches: int = 2,
    images_per_prompt: int = 1,
    negative: TextFeatures | None = None,
    injectors: Sequence[Injector] = (),
) -> Conditions:
    """Conditions of all rows: branch 0 reads the prompts, every further branch the learned null text or `negative`.

    Images lie prompt by prompt, `images_per_prompt` each. Each distinct text runs through the backbone once: the null
    text of a prompt has as many tokens as the prompt and depends on nothing else, and one negative prompt serves all.
    """
    count = len(prompts)
    images = count * images_per_prompt
    if len(generators) != images:
        raise ValueError(f"{len(generators)} generators for {images} images; pass one per image")
    for text in (prompts, negative):
        if text is not None:
            _check_features(text, backbone)
    null: list[int] = []
    texts = [prompts]
    if branches > 1:
        if negative is None:
            lengths = sorted(set(prompts.lengths))
            texts.append(backbone.null_features(lengths))
            null = [count + lengths.index(length) for length in prompts.lengths]
        else:
            if len(negative) not in (1, count):
                raise ValueError(f"{len(negative)} negative prompts for {count} prompts; pass one, or one per prompt")
            texts.append(negative)
            null = [count + (i if len(negative) > 1 else 0) for i in range(count)]
    features = torch.cat([part.features.to(backbone.device) for part in texts])  # (sum of lengths, T)
    context = backbone.encode_text(TextFeatures(features, tuple(n for part in texts for n in part.lengths)))
    per_branch = [list(range(count)), *[null] * (branches - 1)]
    rows = [row for branch in per_branch for row in branch for _ in range(images_per_prompt)]
    return Conditions(
        text=context.select_rows(torch.tensor(rows, device=context.pooled.device)),
        injectors=tuple(injectors),
        branches=branches,
        images=images,
        generators=list(generators),
    )


def _check_features(text: TextFeatures, backbone: Any) -> None:
    expected = (sum(text.lengths), backbone.config.text_width)
    if tuple(text.features.shape) != expected:
        raise ValueError(
            f"text features of shape {tuple(text.features.shape)}: expected {expected}; "
            "use the text encoder that this backbone was trained with"
        )
    if max(text.lengths) > backbone.config.text_length:
        limit = backbone.config.text_length
        raise ValueError(f"a prompt has {max(text.lengths)} tokens, this backbone reads {limit}; shorten it")


def make_generators(
    seed: int | Sequence[int] | None,
    count: int,
    *,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> list[torch.Generator]:
    """One CPU generator per image; `generator.initial_seed()` is the seed that makes this image again on its own.

    A seed s gives s, s + 1, ...; a list is taken as it is; None gives fresh seeds. A single `generator` draws the
    seeds of all images, each one of a list that of its image: a generator may be anywhere in its stream or on another
    device, where no seed could bring it back. Torch's global generator is neither read nor changed.
    """
    if generator is not None:
        if seed is not None:
            raise ValueError("seed and generator were both given; pass one of them")
        if isinstance(generator, torch.Generator):
            sources = [generator] * count
        elif isinstance(generator, Sequence) and all(isinstance(one, torch.Generator) for one in generator):
            sources = _exactly(list(generator), count, "generators")
        else:
            raise ValueError(f"generator is {generator!r}; pass a torch.Generator, or a list with one per image")
        seeds = [int(torch.randint(2**32, (), generator=one, device=one.device)) for one in sources]
    elif seed is None:
        seeds = [secrets.randbelow(2**32) for _ in range(count)]
    elif isinstance(seed, Iterable) and not isinstance(seed, str | bytes):
        seeds = _exactly(list(seed), count, "seeds")
    else:
        seeds = [_whole(seed) + i for i in range(count)]
    return [torch.Generator().manual_seed(_whole(value)) for value in seeds]


def _whole(seed: Any) -> int:
    # numbers.Integral, not int: seeds read from arrays are numpy integers
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= int(seed) < 2**63:
        raise ValueError(f"seed is {seed!r}; pass a whole number from 0 to 2**63 - 1, or a list with one per image")
    return int(seed)


def _exactly(values: list[Any], count: int, name: str) -> list[Any]:
    if len(values) != count:
        raise ValueError(f"{len(values)} {name} for {count} images; pass one per image")
    return values
