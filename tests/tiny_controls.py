"""Networks of preprocessors at toy size with random weights, saved to a folder as their families save themselves."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    ConvNextConfig,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessorPil,
    RTDetrResNetConfig,
    SwinConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    VitPoseBackboneConfig,
    VitPoseConfig,
    VitPoseForPoseEstimation,
)
from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil
from transformers.utils import is_scipy_available

from scaleweaver.controls.estimator import ToyboxEstimator

STAGES = [f"stage{i}" for i in (1, 2, 3, 4)]


def save_estimator(folder: Path) -> Path:
    """The estimator of the built-in world, untrained."""
    torch.manual_seed(0)
    ToyboxEstimator(widths=(8, 8, 16, 16, 16), size=32).save_pretrained(folder)
    return folder


def save_depth(folder: Path, *, metric: bool = False) -> Path:
    """Depth-Anything: DINOv2 and the DPT head."""
    torch.manual_seed(0)
    backbone = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        mlp_ratio=2,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=16,
        patch_size=14,
        neck_hidden_sizes=[8] * 4,
        fusion_hidden_size=8,
        head_hidden_size=4,
        depth_estimation_type="metric" if metric else "relative",
        max_depth=10 if metric else 1,
    )
    DepthAnythingForDepthEstimation(config).save_pretrained(folder)
    size = {"height": 56, "width": 56}
    DPTImageProcessorPil(size=size, keep_aspect_ratio=True, ensure_multiple_of=14).save_pretrained(folder)
    return folder


def save_segmentation(folder: Path) -> Path:
    """UPerNet on ConvNeXt, with seven classes."""
    torch.manual_seed(0)
    backbone = ConvNextConfig(depths=[1] * 4, hidden_sizes=[8] * 4, num_stages=4, out_features=STAGES)
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=8, auxiliary_in_channels=8, auxiliary_channels=4, num_labels=7
    )
    UperNetForSemanticSegmentation(config).save_pretrained(folder)
    SegformerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def save_masks(folder: Path) -> Path:
    """Mask2Former on Swin, with seven classes; without scipy transformers makes none, and the weights are none."""
    torch.manual_seed(0)
    config = masks_config()
    config.save_pretrained(folder)
    if is_scipy_available():
        Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    else:
        save_file({"weight": torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def save_detector(folder: Path, labels: dict[int, str], person: float) -> str:
    """A random RT-DETR that sees label 0 everywhere with logit `person`, and nothing else."""
    torch.manual_seed(0)
    backbone = RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic", out_features=STAGES[1:]
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        encoder_hidden_dim=16,
        encoder_in_channels=[8] * 3,
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        d_model=16,
        num_queries=5,
        decoder_in_channels=[16] * 3,
        decoder_ffn_dim=16,
        decoder_layers=1,
        decoder_attention_heads=2,
        num_denoising=0,
        id2label=labels,
        label2id={name: number for number, name in labels.items()},
    )
    network = RTDetrForObjectDetection(config)
    bias = network.model.decoder.class_embed[0].bias.data
    bias[:], bias[0] = -9.0, person
    network.save_pretrained(folder)
    RTDetrImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return str(folder)


def save_vitpose(folder: Path, points: int = 17, experts: int = 1) -> str:
    torch.manual_seed(0)
    backbone = VitPoseBackboneConfig(
        image_size=[32, 24],
        patch_size=[8, 8],
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        mlp_ratio=2,
        num_experts=experts,
        part_features=4,
    )
    VitPoseForPoseEstimation(VitPoseConfig(backbone_config=backbone, num_labels=points)).save_pretrained(folder)
    return str(folder)


def save_pose(folder: Path) -> tuple[str, str]:
    """(ViTPose, the RT-DETR that finds people for it: everywhere)."""
    return save_vitpose(folder / "pose"), save_detector(folder / "people", {0: "person", 1: "car"}, 2.0)


def masks_config() -> Mask2FormerConfig:
    backbone = SwinConfig(
        image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2, out_features=STAGES
    )
    return Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_layers=1,
        decoder_layers=1,
        num_attention_heads=2,
        num_queries=5,
        num_labels=7,
        encoder_feedforward_dim=8,
        dim_feedforward=8,
    )
