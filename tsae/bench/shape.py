"""What is measured: the sizes of a step, and the activations it gets."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from tsae.config.run import RunConfig
    from tsae.store.moments import Moments

CONCEPTS = 64
DTYPES = ("float32", "float64", "bfloat16")


def is_paired(kind: str) -> bool:
    """Whether such a dictionary is trained on pairs."""
    from tsae.config.sections import KIND_SETTINGS

    return kind in KIND_SETTINGS and KIND_SETTINGS[kind].temporal


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes and settings of one training step."""

    activation_dim: int
    dict_size: int
    k: int
    batch_size: int
    """Pairs of a temporal SAE, single tokens of the other kinds."""
    kind: str = "temporal"
    objective: str = "reference"
    """Preset of a temporal SAE's objective; `reference` is what the other libraries' steps, and the figures that others have
    measured, are to be compared with."""
    dtype: str = "float32"
    """Of weights and activations; bfloat16 is that of the encoder product alone, where it can be chosen."""
    device: str = "cpu"
    dead: float = 0.0
    """Share of the latents that are dead, so that aux-k works."""

    @property
    def halves(self) -> int:
        """Activations that a step encodes per pair or token: prediction wants no codes of the partners."""
        return self.halves_of(self.kind)

    @property
    def weights(self) -> str:
        """Type of weights and activations: no training of this package keeps them in bfloat16."""
        return "float32" if self.dtype == "bfloat16" else self.dtype

    @property
    def name(self) -> str:
        """As a part of a file name."""
        dead = f"-dead{self.dead:g}" if self.dead else ""
        objective = "" if self.objective == "reference" else f"-{self.objective}"
        return (
            f"{self.kind}{objective}-D{self.activation_dim}-F{self.dict_size}-k{self.k}-B{self.batch_size}"
            f"-{self.dtype}-{self.device.replace(':', '')}{dead}"
        )

    def halves_of(self, kind: str) -> int:
        """The same of another kind."""
        return 2 if is_paired(kind) and self.objective != "predictive" else 1

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def run_config(self, engine: str, kind: str | None = None, encoder_precision: str = "exact") -> RunConfig:
        """The configuration of a run of this shape. Raises TsaeError for sizes that cannot be."""
        from tsae.config import run as configuration

        tree = {
            "sae": {"kind": kind or self.kind, "dict_size": self.dict_size, "k": self.k},
            "objective": self.objective if is_paired(kind or self.kind) else "reference",
            "training": {"batch_size": self.batch_size, "engine": engine, "encoder_precision": encoder_precision},
        }
        return configuration.from_mapping(tree, "bench")


PRESETS: dict[str, dict[str, int]] = {
    "pythia": {"activation_dim": 768, "dict_size": 16384, "k": 20, "batch_size": 2048},
    "gemma": {"activation_dim": 2304, "dict_size": 16384, "k": 20, "batch_size": 512},
    "embedded": {"activation_dim": 128, "dict_size": 2048, "k": 16, "batch_size": 1024},
}
"""Sizes of a run on pythia-160m, gemma-2-2b and the embedded language model."""


def batches(shape: Shape, count: int) -> list[Tensor]:
    """`count` batches of pairs [B, 2, D] with something to learn: non-negative concepts that persist, and noise."""
    import torch

    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(CONCEPTS, shape.activation_dim, generator=generator)
    made = []
    for _ in range(count):
        now, new = (torch.randn(shape.batch_size, CONCEPTS, generator=generator).relu_() for _ in range(2))
        concepts = torch.stack([now, 0.7 * now + 0.3 * new], dim=1)
        noise = torch.randn(shape.batch_size, 2, shape.activation_dim, generator=generator)
        made.append(((concepts @ directions + noise) / 8).to(shape.device, getattr(torch, shape.weights)))
    return made


def moments(shape: Shape) -> Moments:
    """Of such activations: what a training takes from a store to centre and to scale them."""
    from tsae.store.moments import Moments

    (some,) = batches(replace(shape, batch_size=256, device="cpu"), 1)
    x = some.flatten(0, 1)
    return Moments(len(x), x.mean(dim=0).float(), x.double().var(dim=0), float(x.square().sum(dim=1).mean()))
