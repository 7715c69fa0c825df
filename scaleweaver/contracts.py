"""The data that flows through one generation and the protocols (seams) that the loop over scales knows.

Rows: every tensor inside the loop has R = branches * B rows, laid out branch by branch: ``[text | null | ...]``, each B
images. A tuple of steps names the scales whose tokens a tensor holds: one while generating, all of them under teacher
forcing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from scaleweaver.schedule import ScaleSchedule, ScaleStep

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from scaleweaver.cache import KVCache
    from scaleweaver.kernels.interval_attention import KeySet

Steps = Sequence[ScaleStep]


@dataclass(frozen=True)
class Control:
    """One control image and how strongly, when and where it acts.

    ``image`` may be a list with one per prompt, ``mask`` too. ``scale`` is the strength: one number, one per scale of
    the schedule, or a function that gets each ``ScaleStep`` and returns its strength. ``start`` and ``end`` are
    fractions of the scales, by diffusers' rule: scale i of S is active unless ``i / S < start`` or ``(i + 1) / S >
    end``. ``scales`` names the active ones by index, ``slice(2, None)``, a range or a list; with a window as well, a
    scale must lie in both. ``mask`` (white = active, grey = less) limits where it acts. ``resize`` says how an image of
    another size meets the picture: "crop", "pad" or "stretch". ``control_guidance_scale`` weighs this control apart,
    one number or one per scale; None for that of the call.
    """

    kind: str
    image: Any
    scale: float | Sequence[float] | Callable[[ScaleStep], float] = 1.0
    start: float = 0.0
    end: float = 1.0
    mask: Any | None = None
    resize: str = "crop"
    scales: slice | Sequence[int] | None = None
    control_guidance_scale: float | Sequence[float] | None = None


@dataclass(frozen=True)
class TextFeatures:
    """Text encoder states of a batch, packed: ``features`` (sum of lengths, T), one length per row."""

    features: Tensor
    lengths: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass
class TextContext:
    """All that a backbone derives from the prompts alone, computed once per call.

    pooled (R, C) is the attentive pool, also the AdaLN vector; modulation (R, 1, 6, C) the shared AdaLN output before
    each block adds its own; keys and values hold per layer (R, H, P, D), zero-padded; mask (R, 1, 1, P) is True on real
    tokens, or None when all rows have the same length.
    """

    pooled: Tensor
    modulation: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor | None

    def select_rows(self, rows: Tensor) -> TextContext:
        """The same context for other rows: rows (R',) int64 indexes the present ones."""
        return TextContext(
            pooled=self.pooled[rows],
            modulation=self.modulation[rows],
            keys=[k[rows] for k in self.keys],
            values=[v[rows] for v in self.values],
            mask=None if self.mask is None else self.mask[rows],
        )


class Injection(NamedTuple):
    """What an injector makes of one attention result."""

    attended: Tensor  # (R, H, L, D), goes on to the output projection
    before_gate: Tensor | None = None  # (R, L, C), added to the projected output, inside the AdaLN gate
    after_gate: Tensor | None = None  # (R, L, C), added to the residual stream outside the gate
    lse: Tensor | None = None  # (R, H, L) of a changed `attended`, which the next injector merges with


@runtime_checkable
class Injector(Protocol):
    """Adds to the self-attention of some layers; ScaleWeaver's reference attention is one."""

    def needs_lse(self, layer: int) -> bool:
        """Whether this layer's injection wants the log-sum-exp of the plain attention."""
        ...

    def keys(self, layer: int, steps: Steps, q: Tensor) -> KeySet | None:
        """What q (R, H, L, D) would read here, if one launch may read it together with the image's own keys; usually
        None. Asked of the first injector alone, whose `inject` gets the result as `read`.
        """
        ...

    def inject(
        self,
        layer: int,
        steps: Steps,
        q: Tensor,
        attended: Tensor,
        lse: Tensor | None,
        read: tuple[Tensor, Tensor] | None = None,
    ) -> Injection:
        """q and attended (R, H, L, D) after norm, scale and RoPE; lse (R, H, L) if asked for. `read` is the attention
        (R, H, L, D) to what `keys` offered, and its log-sum-exp (R, H, L).
        """
        ...

    def select_rows(self, rows: Tensor) -> Injector:
        """The injector for other rows (dead guidance rows dropped, search survivors chosen)."""
        ...


class CachePolicy(Protocol):
    """Which keys and values outlive a layer at a scale."""

    def commits(self, step: ScaleStep) -> bool:
        """Whether the K/V of this scale are kept at all (never at the last scale)."""
        ...

    def queries(self, layer: int, step: ScaleStep) -> Tensor | None:
        """Positions (W,) of the query rows whose attention scores the policy wants, or None."""
        ...

    def keep(self, layer: int, step: ScaleStep, tokens: int, scores: Tensor | None) -> Tensor | None:
        """Indices (R, H, K) into the tokens of this layer's history to keep, in order, or None for all.

        scores (R, H, tokens): attention mass that the observed queries gave to each token.
        """
        ...


class Target(Protocol):
    """How codes add up to the latent and what the next scale reads."""

    def initial(self, batch: int, schedule: ScaleSchedule, *, device: Any = None, dtype: Any = None) -> Tensor: ...

    def absorb(self, latent: Tensor, codes: Tensor, step: ScaleStep) -> Tensor:
        """latent (B, d, Hl, Wl), codes (B, n, D) of this scale -> the new latent."""
        ...

    def next_input(self, latent: Tensor, step: ScaleStep) -> Tensor:
        """What scale `step` reads: (B, step.n, D)."""
        ...


class Sampler(Protocol):
    """Logits to codes."""

    def sample(self, logits: Tensor, step: ScaleStep, generators: Sequence[torch.Generator]) -> Tensor:
        """logits (B, L, N), log-odds of 1 -> bits (B, L, N) uint8, image i drawn with generators[i] alone."""
        ...


class Guidance(Protocol):
    """Branches of a guided call and their weights."""

    @property
    def branches(self) -> int: ...

    def alive(self, step: ScaleStep) -> int:
        """How many leading branches this and any later scale still needs."""
        ...

    def combine(self, logits: Tensor, step: ScaleStep) -> Tensor:
        """(alive * B, L, X) -> (B, L, X)."""
        ...

    def mix(self, layer: int, x: Tensor, step: ScaleStep) -> Tensor:
        """Guidance inside the network: the hidden state (alive * B, L, C) after `layer`, usually unchanged."""
        ...


class Route(NamedTuple):
    """Which network, and which of its layers, draw one scale."""

    backbone: Any
    layers: tuple[int, ...] | None = None  # None: all


class Router(Protocol):
    """Chooses the network for each scale."""

    def route(self, step: ScaleStep) -> Route: ...


class Search(Protocol):
    """Chooses which images of the population go on after a scale."""

    def select(self, state: SamplerState, step: ScaleStep) -> Tensor | None:
        """Row indices (B',) of the survivors, or None to keep all as they are."""
        ...


@dataclass
class Conditions:
    """Everything that does not depend on generated tokens, for R = branches * images rows."""

    text: TextContext
    injectors: tuple[Injector, ...]
    branches: int
    images: int
    generators: list[torch.Generator]


@dataclass
class SamplerState:
    """The state of a population of B images between two scales."""

    latent: Tensor  # (B, d, Hl, Wl) running latent
    generators: list[torch.Generator]
    cache: KVCache
    conditions: Conditions
    codes: list[Tensor] = field(default_factory=list)  # per scale (B, n, N) uint8, transformer layout


@dataclass
class LoopOutput:
    """What the loop hands to the decoder."""

    latent: Tensor  # (B, d, Hl, Wl)
    codes: list[Tensor]  # per scale (B, n, N) uint8
