"""What an experiment is about: a dictionary, or the dense residual stream, and the language model it reads."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tsae.checkpoint import BASELINE, RunFolder, find_dictionary, load_dictionary
from tsae.config.run import RunConfig
from tsae.runtime.errors import TsaeError
from tsae.sae.dictionary import Dictionary
from tsae.sae.inference import encode_sparse, in_units_written
from tsae.sae.selection.top_k import Encoder
from tsae.sae.sparse import SparseCode
from tsae.store import norms
from tsae.store.binding import commit_of, written_of
from tsae.store.layout import is_harvested, store_path
from tsae.store.reader import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from tsae.lm.model import LanguageModel

HIGH, LOW, BOTH = 0, 1, 2
"""The splits that `--chunk` names: group 0, all other groups, everything."""

SPLIT_NAMES = {HIGH: "high-level", LOW: "low-level", BOTH: "all latents"}


class Subject:
    """A trained dictionary with its language model, or the model's dense activations alone.

    Experiments read activations [N, D] as the language model gives them, and see feature activations of one split at
    a time. Nothing is loaded before it is used.
    """

    def __init__(
        self,
        config: RunConfig,
        run: RunFolder,
        *,
        checkpoint: str | None = None,
        explanation_path: Path | None = None,
    ) -> None:
        self.config, self.run, self.checkpoint, self._explanation_path = config, run, checkpoint, explanation_path
        self.name = run.path.parent.name if run.path.name.startswith("trainer_") else run.path.name
        self._encoder = Encoder()

    @property
    def is_dense(self) -> bool:
        """Whether this is the residual stream itself (`--run_name baseline_model`)."""
        return self.name == BASELINE

    @cached_property
    def dictionary(self) -> Dictionary:
        """The dictionary, on the device that training uses. Raises TsaeError for the dense baseline."""
        if self.is_dense:
            raise TsaeError(
                f"--run_name {BASELINE}: the residual stream has no latents; this needs a trained dictionary"
            )
        return load_dictionary(find_dictionary(self.run.path), self.device, self.checkpoint)[0]

    @property
    def device(self) -> torch.device:
        """Where codes are computed."""
        wanted = self.config.training.device
        return torch.device("cuda" if wanted == "auto" and torch.cuda.is_available() else "cpu")

    @cached_property
    def language_model(self) -> LanguageModel:
        """The language model that the dictionary was trained on. Raises TsaeError if it reads another width."""
        if without := self.config.without_text:
            raise TsaeError(f"{self.run.path}: was trained on {without}, without text to experiment with")
        from tsae.lm.model import load_language_model

        model = load_language_model(self.config.model, commit_of(self.run))
        if not self.is_dense:
            self._require_width(model.activation_dim, f"{model.hook_path} of {self.config.model.name}")
        return model

    def _require_width(self, width: int, giver: str) -> None:
        own = self.dictionary.activation_dim
        if own != width:
            raise TsaeError(f"{self.run.path}: reads activations of {own} dimensions, {giver} gives {width}")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer of that model, without the model."""
        from tsae.lm.model import load_tokenizer

        return load_tokenizer(self.config.model, commit_of(self.run))

    @cached_property
    def norm_limit(self) -> float | None:
        """The largest norm of a token that counts, as in the run's training; None if neither run nor store tells it."""
        if self.config.counted.max_norm_multiple is None:
            return math.inf
        recorded = written_of(self.run).get("norm_limit")
        if recorded is not None:
            return float(recorded)
        return Store.open(store_path(self.config)).limit(self.config.counted) if is_harvested(self.config) else None

    def counts(self, tokens: np.ndarray, x: Tensor) -> np.ndarray:
        """[L] bool: which of `tokens` [L] with activations x [L, D] are not left out for their norm or their id."""
        counting = ~np.isin(tokens, self.config.counted.exclude_tokens)
        if self.norm_limit is not None:
            counting &= norms.of(x[None])[0] <= self.norm_limit
        return counting

    @property
    def chunks(self) -> tuple[int, ...]:
        """The splits there are: all three where latents are grouped, else everything."""
        grouped = not self.is_dense and len(self.dictionary.group_sizes) > 1
        return (HIGH, LOW, BOTH) if grouped else (BOTH,)

    def latents(self, chunk: int) -> slice:
        """The latents of a split among the F (of the dense baseline: the dimensions). Raises TsaeError without it."""
        if self.is_dense:
            return slice(0, self.language_model.activation_dim)
        groups = self.dictionary.group_slices
        if chunk == BOTH:
            return slice(0, self.dictionary.dict_size)
        if len(groups) < 2:
            raise TsaeError(
                f"--chunk {chunk}: {type(self.dictionary).__name__} has one group of latents; 2 (all) is expected"
            )
        return groups[0] if chunk == HIGH else slice(groups[0].stop, self.dictionary.dict_size)

    @cached_property
    def row_norms(self) -> Tensor:
        """Norms of the decoder's rows [F], in which feature activations are measured, on the device."""
        return self.dictionary.row_norms

    def codes(self, x: Tensor) -> SparseCode:
        """Feature activations of activations x [N, D], all latents, without a dense [N, F] tensor; on the CPU.

        They are what the latents write: those of `encode` times the norms of the decoder's rows. Raises TsaeError for
        activations of another width than the dictionary's.
        """
        self._require_width(x.shape[1], "the store")
        code = in_units_written(
            encode_sparse(self.dictionary, x.to(self.device, torch.float32), self._encoder), self.row_norms
        )
        return SparseCode(code.offsets.cpu(), code.latents.cpu(), code.values.cpu(), code.dict_size)

    @cached_property
    def explanations(self) -> dict[int, str]:
        """Latent → explanation, from `--explanation_path` or the explanations.json of the run; empty without one.

        The explanations of the final weights are not those of an intermediate checkpoint, which has a file of its own.
        Raises TsaeError for a file that cannot be read or explains latents that the dictionary does not have.
        """
        from tsae.interop.explanations import find_explanations, read_explanations

        found = self._explanation_path
        if found is None and self.checkpoint is None:
            found = find_explanations(self.run)
        elif found is None:
            own = self.run.result(f"explanations_step{self.checkpoint}", "json")
            found = own if own.is_file() else None
        explanations = {} if found is None else read_explanations(found)
        if explanations and max(explanations) >= self.dictionary.dict_size:
            raise TsaeError(
                f"{found}: explains latent {max(explanations)}, {self.run.path} has {self.dictionary.dict_size}; "
                "it is about another dictionary"
            )
        return explanations

    def description(self) -> dict[str, Any]:
        """What results say of their subject."""
        model = self.config.model
        about: dict[str, Any] = {
            "run": self.name,
            "model": model.name,
            "layer": model.hook_point or model.layer,
            "checkpoint": self.checkpoint,
        }
        if not self.is_dense:
            about |= {"dict_class": type(self.dictionary).__name__, "dict_size": self.dictionary.dict_size}
        return about
