"""Distance of two sets of pictures by their features, and real FID and CLIP score where their weights can be had.

Frechet distance of two Gaussians fitted to features (Heusel et al., arXiv 1706.08500): |m - n|^2 + tr(A + B - 2
(A B)^1/2). The number depends on whose features they are, so it is named after them: "FD-judge" for those of our judge.
Only Inception's are called FID. It is biased upwards for few pictures, most where there are fewer than features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from scaleweaver.evaluate.attributes import AttributeJudge
from scaleweaver.evaluate.efficientnet import EfficientNetFeatures

Pixels = NDArray[np.uint8]
Features = NDArray[np.floating]


class FeatureExtractor(Protocol):
    """Pictures (B, H, W, 3) uint8 -> features (B, F); `title` is the name that a distance of them gets."""

    @property
    def title(self) -> str: ...

    def features(self, pictures: Pixels) -> Features: ...


@dataclass(frozen=True)
class JudgeFeatures:
    """The pooled features of the built-in world's judge: means of its maps, before it names anything."""

    judge: AttributeJudge
    title: str = "FD-judge"

    def features(self, pictures: Pixels) -> Features:
        return self.judge.features(pictures)


def feature_extractor(name: str, judge: AttributeJudge | None = None, device: str = "cpu") -> FeatureExtractor:
    """An extractor by name, ready to use: weights that have to be fetched are fetched now."""
    if name == "judge":
        if judge is None:
            raise ValueError("features of the judge need one; pass AttributeJudge.built_in()")
        return JudgeFeatures(judge)
    if name == "efficientnet-lite0":
        return EfficientNetFeatures(device)
    raise ValueError(f'no features are called "{name}"; pass judge or efficientnet-lite0, or --fid for Inception\'s')


def frechet_distance(features_a: Features, features_b: Features) -> float:
    """Frechet distance of two sets of features (N, F) and (M, F), N and M at least 2; 0 for equal sets."""
    a, b = np.asarray(features_a, np.float64), np.asarray(features_b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features of shape {a.shape} and {b.shape}; expected (N, F) and (M, F), at least 2 rows each")
    first, second = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T  # A^1/2, so that A^1/2 B A^1/2 is symmetric
    shared = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    distance = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * shared
    return max(float(distance), 0.0)


def diversity(groups: Iterable[Features]) -> float | None:
    """Mean cosine distance between the pictures of a prompt, over prompts; features (n, F) each, None for n = 1."""
    distances = []
    for group in groups:
        unit = np.asarray(group, np.float64)
        unit = unit / np.linalg.norm(unit, axis=1, keepdims=True).clip(1e-12)
        if len(unit) > 1:
            distances.append(1 - (unit @ unit.T)[np.triu_indices(len(unit), 1)].mean())
    return float(np.mean(distances)) if distances else None


class InceptionDistance:
    """FID by torchmetrics, on Inception's own weights, which torch-fidelity downloads; batches of both sets."""

    def __init__(self, device: str = "cpu") -> None:
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance

            self.metric: Any = FrechetInceptionDistance(feature=2048).to(device)
        except (ImportError, OSError) as error:
            raise ValueError(
                f"FID cannot be had here ({_first_line(error)}); it needs torchmetrics, torch-fidelity and a download"
                " of Inception's weights. Leave out --fid: FD-judge needs no download"
            ) from error

    def add(self, pictures: Pixels, *, real: bool) -> None:
        """(B, H, W, 3) uint8."""
        images = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2)  # (B, 3, H, W)
        self.metric.update(images.to(self.metric.device), real=real)

    def value(self) -> float:
        return float(self.metric.compute())


class ClipAgreement:
    """CLIP score by torchmetrics: 100 times the cosine of picture and prompt, at least 0; weights from the Hub.

    `model` is a Hub id or a folder; published numbers for control are mostly those of ViT-B/16.
    """

    def __init__(self, model: str = "openai/clip-vit-base-patch16", device: str = "cpu") -> None:
        try:
            from torchmetrics.multimodal.clip_score import CLIPScore
            from transformers import CLIPModel, CLIPProcessor

            network, processor = CLIPModel.from_pretrained(model), CLIPProcessor.from_pretrained(model)
        except (ImportError, OSError) as error:
            raise ValueError(
                f"CLIP score cannot be had here ({_first_line(error)}); it needs torchmetrics and the weights of"
                f" {model} from the Hub. Leave out --clip, or download them once while online"
            ) from error

        def loaded() -> Any:
            return _PlainClip(network), processor

        self.metric: Any = CLIPScore(model_name_or_path=loaded).to(device)

    def add(self, pictures: Pixels, prompts: Sequence[str]) -> None:
        """(B, H, W, 3) uint8 with B prompts."""
        images = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2)  # (B, 3, H, W)
        self.metric.update(list(images.to(self.metric.device)), list(prompts))

    def value(self) -> float:
        return float(self.metric.compute())


class _PlainClip(nn.Module):
    """CLIP whose features are tensors: transformers 5 wraps them, which torchmetrics 1.9 does not know."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network, self.config = network, network.config

    def get_image_features(self, pixels: Tensor) -> Tensor:
        return _tensor(self.network.get_image_features(pixels))

    def get_text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        return _tensor(self.network.get_text_features(ids, mask))


def _tensor(features: Any) -> Tensor:
    return features if isinstance(features, Tensor) else features.pooler_output


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
