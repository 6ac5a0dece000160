"""Calibration: the threshold that gives a dictionary a wanted number of active latents on held-out activations.

Legend: N tokens of a batch, D activation_dim, F dict_size.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsae.checkpoint import CALIBRATION, RunFolder, load_dictionary, save_run
from tsae.config.run import RunConfig
from tsae.evaluation.held_out import held_out_batches, held_out_rows, runs
from tsae.interop.folders import new_folder
from tsae.runtime import metadata
from tsae.runtime.errors import TsaeError
from tsae.runtime.progress import Progress
from tsae.sae.dictionary import UNCALIBRATED, ThresholdDictionary
from tsae.sae.inference import encode_sparse
from tsae.sae.kinds import AutoEncoderTopK
from tsae.sae.sparse import weighted_rows
from tsae.store import binding
from tsae.store.layout import store_path
from tsae.store.reader import Store


def calibrate(
    run: RunFolder, config: RunConfig, target_l0: float | None = None, *, keep: bool = False
) -> dict[str, Any]:
    """Set the threshold of the final weights in `run` so that `target_l0` (by default k) latents are active per token.

    With `keep`, the threshold that training tracked is taken as it is (and a TopK SAE told to use it). L0 and FVE
    before and after, on the contexts that evaluation reads, go to calibration.json and config.json; config.json is
    written before the weights, so that an interruption between the two is seen by whoever loads them. Raises
    TsaeError for a dictionary without one threshold, or a target that no threshold reaches.
    """
    binding.require_unchanged(run, config)
    run.require_place()
    dictionary, written = load_dictionary(run.path, calibrated=False)
    if not isinstance(dictionary, ThresholdDictionary):
        raise TsaeError(f"{run.path}: a {type(dictionary).__name__} has no threshold to calibrate")
    held_out = _HeldOut(config, run)
    before = _measures(dictionary, held_out)
    tracked = _tracked_threshold(run, dictionary)
    if keep:
        if tracked < 0:
            raise TsaeError(f"{run.path}: training tracked no threshold that could be kept; give --target-l0 instead")
        dictionary.threshold.fill_(tracked)
    else:
        target_l0 = float(dictionary.k) if target_l0 is None else target_l0
        dictionary.threshold.fill_(find_threshold(dictionary, held_out, target_l0))
    if isinstance(dictionary, AutoEncoderTopK):
        dictionary.rule = "threshold"
    record = {
        "encode_rule": dictionary.encode_rule,
        "threshold": dictionary.scalar_threshold,
        "target_l0": None if keep else target_l0,
        "tracked_threshold": tracked,
        "before": before,
        "after": _measures(dictionary, held_out),
        "tokens": held_out.tokens,
    }
    metadata.write(run.calibration, record)
    save_run(run, {**written, "calibration": record}, dictionary)
    return record


def calibrate_copy(
    run: RunFolder, out: Path, config: RunConfig, target_l0: float | None = None, *, keep: bool = False
) -> dict[str, Any]:
    """Copy the run to the new folder `out` and calibrate the copy. Raises TsaeError as `calibrate` does."""
    with new_folder(out) as folder:
        copy = RunFolder(folder / "trainer_0")
        copy.path.mkdir()
        for path in (run.config_json, run.weights, run.resolved, run.provenance, run.calibration):
            if path.exists():
                shutil.copyfile(path, copy.path / path.name)
        return calibrate(copy, config, target_l0, keep=keep)


def summary(record: dict[str, Any]) -> str:
    """A calibration in two lines."""
    lines = []
    for when in ("before", "after"):
        measured = record[when]
        if measured is None:
            lines.append(f"{when:>6}: the threshold was never set")
            continue
        threshold = "none" if measured["threshold"] is None else f"{measured['threshold']:.6g}"
        rule, l0, fve = measured["encode_rule"], measured["l0"], measured["fve"]
        lines.append(f"{when:>6}: rule {rule}, threshold {threshold}, L0 {l0:.4g}, FVE {fve:.4f}")
    return "\n".join(lines)


class _HeldOut:
    """The held-out tokens of a run, as often as they are wanted."""

    def __init__(self, config: RunConfig, run: RunFolder) -> None:
        self._config, self._run = config, run
        self._store = Store.open(store_path(config), config)
        self._rows = rows = held_out_rows(self._store, config.evaluation.sequences)
        document, valid = self._store.document[rows], self._store.valid(config.counted, rows)
        lengths = [part.stop - part.start for own in zip(document, valid, strict=True) for part, _ in runs(*own)]
        self.tokens = sum(lengths)
        if not self.tokens:
            raise TsaeError(f"{self._store.path}: no held-out context with a valid position; harvest more text")

    def batches(self, stage: str) -> Iterator[Tensor]:
        """Activations [N, D] of one batch of contexts after the other."""
        config, rows = self._config, self._rows
        progress = Progress(f"calibrate {self._run.path.parent.name}: {stage}", len(rows), "sequences")
        for batch in held_out_batches(self._store, rows, config.evaluation.batch_size, config.counted):
            yield batch.x.float()
            progress.update(batch.sequences_done)


@torch.no_grad()
def find_threshold(dictionary: ThresholdDictionary, held_out: _HeldOut, target_l0: float) -> float:
    """The threshold above which exactly round(target_l0 · tokens) activations lie (but for ties)."""
    if not math.isfinite(target_l0):
        raise TsaeError(f"target L0 {target_l0:g}: a number of latents is expected")
    wanted = round(target_l0 * held_out.tokens)
    if wanted < 1:
        raise TsaeError(f"target L0 {target_l0:g}: not one activation of {held_out.tokens} tokens would remain")
    # One more than wanted: the threshold lies between the last that is kept and the first that is not.
    largest = _Largest(wanted + 1)
    for x in held_out.batches("threshold"):
        largest.add(torch.relu(dictionary.pre_activations(x)).flatten())
    top = largest.values()
    if len(top) <= wanted:
        raise TsaeError(
            f"target L0 {target_l0:g}: only {len(top) / held_out.tokens:.4g} latents per token are positive at all"
        )
    return float((top[-2] + top[-1]) / 2)


class _Largest:
    """The `count` largest positive values of a stream, in a buffer of a few times their size."""

    def __init__(self, count: int) -> None:
        self._count, self._bound = count, 0.0
        self._kept: list[Tensor] = []

    def add(self, values: Tensor) -> None:
        """Take in values [n]."""
        self._kept.append(values[values > self._bound])
        if sum(map(len, self._kept)) > 2 * self._count:
            self._kept = [torch.cat(self._kept).topk(self._count, sorted=False).values]
            self._bound = float(self._kept[0].min())

    def values(self) -> Tensor:
        """The largest values, descending; fewer if there were not so many positive ones."""
        every = torch.cat(self._kept)
        return every.topk(min(self._count, len(every))).values


@torch.no_grad()
def _measures(dictionary: ThresholdDictionary, held_out: _HeldOut) -> dict[str, Any] | None:
    """Rule, threshold, mean L0 and pooled FVE; none while the rule needs a threshold that was never set."""
    if dictionary.encode_rule == "threshold" and dictionary.scalar_threshold is None:
        return None
    active, error = 0, 0.0
    total, squares = torch.zeros(dictionary.activation_dim, dtype=torch.float64), 0.0
    for x in held_out.batches("measures"):
        code = encode_sparse(dictionary, x)
        active += len(code.values)
        residual = x - weighted_rows(code, dictionary.W_dec) - dictionary.b_dec
        error += float(residual.square().sum(dtype=torch.float64))
        total += x.sum(dim=0, dtype=torch.float64)
        squares += float(x.square().sum(dtype=torch.float64))
    variance = squares - float(total.square().sum()) / held_out.tokens
    if not variance > 0:
        raise TsaeError("all held-out activations are equal; harvest text that the model's tokenizer knows")
    return {
        "encode_rule": dictionary.encode_rule,
        "threshold": dictionary.scalar_threshold,
        "l0": active / held_out.tokens,
        "fve": 1 - error / variance,
    }


def _tracked_threshold(run: RunFolder, dictionary: ThresholdDictionary) -> float:
    """What training left in the weights, whatever calibrations came after it; −1 if nothing."""
    if run.calibration.exists():
        return float(metadata.read(run.calibration, CALIBRATION)["tracked_threshold"])
    return float(dictionary.threshold) if dictionary.threshold >= 0 else UNCALIBRATED
