"""What the operator of a server may set, checked before any weight is loaded."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path

MEGABYTE = 2**20


@dataclass(frozen=True)
class ServeOptions:
    """Limits of a server.

    name: what clients call the model; None: as it was loaded, of a folder its own name. max_batch: pictures drawn in
    one pipeline call. batch_wait: seconds that a lone picture waits for company. queue: pictures that may be accepted
    and not yet sent; more get 429. timeout: seconds from the request to its answer, and how long a client may take to
    read it. max_images: pictures of one request. max_body: bytes of a request. max_pixels: of one control image.
    exact: a picture has the bits that it has alone, as far as that was measured, see `exact.py`. rounding: how far a
    batch moves logits; None: what was measured on a CPU in float32, and elsewhere nothing is drawn together.
    """

    name: str | None = None
    max_batch: int = 8
    batch_wait: float = 0.01
    queue: int = 64
    timeout: float = 120.0
    max_images: int = 10
    max_body: int = 16 * MEGABYTE
    max_pixels: int = 16_000_000
    exact: bool = True
    rounding: float | None = None
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("max_batch", "queue", "max_images", "max_body", "max_pixels"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; pass a whole number, at least 1")
        for name in ("batch_wait", "timeout"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (name == "timeout" and value == 0):
                raise ValueError(f"{name} is {value!r}; pass a number of seconds above 0")
        if self.rounding is not None and not (math.isfinite(self.rounding) and self.rounding > 0):
            raise ValueError(f"rounding is {self.rounding!r}; pass what benchmarks/serve.py measures, a number above 0")
        if self.rounding is not None and not self.exact:
            raise ValueError("rounding says which pictures are drawn again, but exact is off; pass one of the two")
        if self.max_images > self.queue:
            raise ValueError(
                f"max_images is {self.max_images} but the queue holds {self.queue} pictures; make the queue longer"
            )
        if self.api_key is not None and not (self.api_key and self.api_key.isascii() and self.api_key.isprintable()):
            raise ValueError("the API key is empty or has characters other than printable ASCII; choose another")


def public_name(source: str) -> str:
    """What clients may see of where something was loaded from: of a place on this machine its last part alone."""
    return (Path(source).resolve().name or "model") if os.path.exists(source) else source
