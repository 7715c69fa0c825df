"""What Infinity-2B would need at 256, 512 and 1024 pixels with no control, one and two: no weights, nothing computed.

python examples/estimate.py
"""

import torch
from transformers import T5Config, T5EncoderModel

from scaleweaver import VARControlPipeline
from scaleweaver.adapters import add_control
from scaleweaver.backbones.infinity import InfinityTransformer
from scaleweaver.methods.scaleweaver import ScaleWeaverConfig
from scaleweaver.tokenizers.bsq import BSQTokenizer

# the encoder of flan-t5-xl
T5_XL = T5Config(d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32, feed_forward_proj="gated-gelu")


def shapes_alone() -> VARControlPipeline:
    """Infinity-2B with two controls in bfloat16 on the meta device, where tensors have no memory."""
    with torch.device("meta"):
        pipe = VARControlPipeline(
            InfinityTransformer.preset("2B"), BSQTokenizer.preset("d32"), T5EncoderModel(T5_XL), guidance_scale=3.0
        ).to(dtype=torch.bfloat16)
        for kind in ("canny", "depth"):
            pipe.controls[kind] = add_control(pipe.transformer, ScaleWeaverConfig(kind=kind), kind)
    return pipe


def main() -> None:
    pipe = shapes_alone()
    print("pixels  controls  weights GiB  KV MiB  controls MiB  peak GiB  TFLOP  with controls at hand")
    for side in (256, 512, 1024):
        for controls in ((), ("canny",), ("canny", "depth")):
            # 32 tokens stand for a prompt of some twenty words
            fresh = pipe.estimate(32, control=controls, height=side, width=side)
            reused = pipe.estimate(32, control=controls, height=side, width=side, reused=True)
            print(
                f"{side:6}{len(controls):10}{fresh.weight_bytes / 2**30:13.2f}{fresh.kv_bytes / 2**20:8.0f}"
                f"{sum(fresh.bank_bytes.values()) / 2**20:14.0f}{fresh.peak_bytes / 2**30:10.2f}"
                f"{fresh.total_flops / 1e12:7.1f}{reused.total_flops / 1e12:23.1f}"
            )
    print(f"\nthe last one in full:\n{fresh}")


if __name__ == "__main__":
    main()
