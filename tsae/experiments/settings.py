"""The settings of the experiments: the section `experiments` of a run's configuration, one part for each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Linear probes for semantics, context and syntax on feature activations (paper section 4.2)."""

    dataset: str = "embedded"
    """Labelled texts: `embedded`, `finefineweb`, `wikipedia`, `mmlu`, or a local file or hub id in one of their schemas."""


@dataclass(frozen=True, kw_only=True)
class TsneConfig:
    """A map of feature activations, coloured by semantics, context and syntax (paper figures 2 and 9)."""

    dataset: str = "embedded"
    """Labelled texts, as for probing."""


@dataclass(frozen=True, kw_only=True)
class SequencesConfig:
    """Latents over the tokens of passages spliced into one context (paper figures 1 and 4)."""

    dataset: str = "embedded"
    """Labelled texts that passages are drawn from."""


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """Latents that tell rejected from chosen responses (paper section 4.5)."""

    dataset: str = "embedded"
    """Pairs of responses: `hh-rlhf`, a local file or hub id with columns chosen and rejected, or `embedded`."""


@dataclass(frozen=True, kw_only=True)
class SteerConfig:
    """Text generated while one latent is held up (paper section 4.4 and appendix B.2)."""

    dataset: str = "embedded"
    """Labelled texts that define the concepts."""


@dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """Explanations of latents written and scored by a language model (autointerp)."""

    backend: Literal["local", "endpoint", "replay"] = "local"
    """Who answers: a local transformers model, an OpenAI-compatible endpoint, or recorded answers."""


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """One page with all latents of a run."""

    sequences: int = 2048
    """Stored sequences that examples are taken from, at most."""


@dataclass(frozen=True, kw_only=True)
class ExperimentsConfig:
    """Each experiment's own settings."""

    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """Linear probes."""
    tsne: TsneConfig = field(default_factory=TsneConfig)
    """Map of the feature space."""
    sequences: SequencesConfig = field(default_factory=SequencesConfig)
    """Latents over spliced passages."""
    align: AlignConfig = field(default_factory=AlignConfig)
    """Chosen against rejected responses."""
    steer: SteerConfig = field(default_factory=SteerConfig)
    """Steered generation."""
    explain: ExplainConfig = field(default_factory=ExplainConfig)
    """Explanations and their scores."""
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    """The page of latents."""
