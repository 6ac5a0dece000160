"""A trained dictionary in the format of another library, as a folder of its own.

sae_lens   what SAELens' `SAE.load_from_disk` reads, and with it SAEBench, OpenMOSS and others
sae_bench  what SAEBench's own loader of dictionary_learning folders reads: config.json and ae.pt
reference  what the T-SAE authors' scripts read: config.json and ae.pt, without the rest of a run
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tsae.checkpoint import RunFolder, find_dictionary, load_dictionary, of_new_weights, save_run
from tsae.interop import sae_lens
from tsae.interop.explanations import find_explanations, read_explanations, write_explanations
from tsae.interop.folders import new_folder
from tsae.interop.origin import Origin, origin_of
from tsae.interop.portable import has_unit_rows, portable, recentred, state_dict, with_unit_rows
from tsae.runtime.errors import TsaeError, suggestion
from tsae.sae.dictionary import Dictionary, ThresholdDictionary
from tsae.sae.kinds import BatchTopKSAE, classes, from_state, kind_of_class
from tsae.store.binding import weights_identity


class Source(NamedTuple):
    """A dictionary to export and all that is known of it."""

    dictionary: Dictionary
    config: dict[str, Any]
    """The content of config.json, in agreement with the dictionary."""
    origin: Origin
    results: dict[str, Any]
    """Its held-out measures; empty if there are none with its present threshold."""
    explanations: dict[int, str]
    where: str


def export(
    run: str | Path, form: str, out: str | Path, *, chunk: int | None = None, checkpoint: int | None = None
) -> Path:
    """Write the dictionary of `run` (folder or hub id) to the new folder `out` in format `form`.

    `chunk` takes one group of latents alone (0: the high-level split), `checkpoint` the weights of a step. Raises
    TsaeError for an unknown format, an uncalibrated threshold, and what the format cannot express.
    """
    if form not in WRITERS:
        raise TsaeError(f"--format {form}: unknown; {suggestion(form, WRITERS)}known: {', '.join(WRITERS)}")
    source = open_source(run, chunk=chunk, checkpoint=checkpoint)
    with new_folder(out) as folder:
        write(form, folder, source)
    return Path(out)


def write(form: str, folder: Path, source: Source) -> None:
    """Fill `folder` in format `form`. Raises TsaeError where it cannot carry this kind of dictionary."""
    name = type(source.dictionary).__name__
    formats = kind_of_class(name, source.where).formats
    if form not in formats:
        raise TsaeError(
            f"{source.where}: no {form} file can carry a {name}; formats that can: {', '.join(formats) or 'none'}"
        )
    WRITERS[form](folder, source)


def open_source(run: str | Path, *, chunk: int | None = None, checkpoint: int | None = None) -> Source:
    """Load what `export` writes. Raises TsaeError as `load_dictionary` does, and for a group that does not exist."""
    folder = find_dictionary(run)
    dictionary, config = load_dictionary(folder, checkpoint=checkpoint)
    files = RunFolder(folder)
    # Measures and the calibration record are those of the final, whole dictionary.
    results = files.read_results()
    made, threshold = results.get("made_from"), dictionary.scalar_threshold
    current = made["weights"] == weights_identity(files) if made else results.get("threshold", threshold) == threshold
    if checkpoint is not None or not current:
        results = {}
    if checkpoint is not None:
        config = {**config, "trainer": {**config["trainer"], "step": checkpoint}}
        config.pop("calibration", None)
    path = find_explanations(RunFolder(folder))
    explanations = read_explanations(path) if path else {}
    source = Source(dictionary, config, origin_of(config, folder), results, explanations, str(run))
    return source if chunk is None else one_group(source, chunk)


def one_group(source: Source, index: int) -> Source:
    """The latents of group `index` alone, as a dictionary of the same class: same codes, fewer of them."""
    whole = source.dictionary
    slices = whole.group_slices
    if len(slices) == 1:
        raise TsaeError(f"{source.where}: {type(whole).__name__} has no groups of latents; leave --chunk out")
    if not 0 <= index < len(slices):
        raise TsaeError(f"{source.where}: --chunk {index} is impossible; there are groups 0 to {len(slices) - 1}")
    part, size = slices[index], whole.group_sizes[index]
    form = portable(whole, source.where)
    tensors = {"W_enc": form.tensors["W_enc"][:, part], "W_dec": form.tensors["W_dec"][part]}
    tensors |= {"b_enc": form.tensors["b_enc"][part], "b_dec": whole.b_dec, "threshold": whole.get_buffer("threshold")}
    k = min(int(whole.get_buffer("k")), size)
    state = state_dict(type(whole), form._replace(tensors=tensors), k, [size])
    trainer = source.config["trainer"] | {"dict_size": size, "group_sizes": [size], "group_fractions": [1.0], "k": k}
    config = {key: value for key, value in source.config.items() if key != "calibration"}
    l0 = source.results.get("l0_group") or []
    return source._replace(
        dictionary=from_state(type(whole).__name__, state, k, source.where).eval().requires_grad_(False),
        config=config | {"trainer": trainer | {"chunk": index}},
        results={"l0": l0[index]} if index < len(l0) else {},
        explanations={i - part.start: text for i, text in source.explanations.items() if part.start <= i < part.stop},
    )


def write_sae_lens(folder: Path, source: Source) -> None:
    """SAELens' cfg.json and weights."""
    trainer, calibration = source.config["trainer"], source.config.get("calibration")
    l0 = source.results.get("l0")
    if l0 is None and calibration:
        l0 = calibration["after"]["l0"]
    notes = {
        "tsae_chunk": trainer.get("chunk"),
        "tsae_temporal": trainer.get("temporal"),
        "tsae_threshold_l0": l0,
        "tsae_calibration": calibration,
    }
    sae_lens.write(folder, source.dictionary, source.origin, notes, source.where)


def write_sae_bench(folder: Path, source: Source) -> None:
    """config.json and ae.pt under the trainer names that SAEBench maps to its loaders."""
    dictionary, where = source.dictionary, source.where
    source.origin.require_block(where, "SAEBench")
    if dictionary.dict_size < dictionary.activation_dim:
        raise TsaeError(
            f"{where}: {dictionary.dict_size} latents for {dictionary.activation_dim} dimensions; SAEBench refuses fewer "
            "latents than dimensions (use --format sae_lens)"
        )
    kind = kind_of_class(type(dictionary).__name__, where)
    cls = kind.sae_bench or kind.dictionary
    if isinstance(dictionary, ThresholdDictionary) and dictionary.selects_per_token:
        # SAEBench applies the threshold of a batch-top-k file, and ignores that of a top-k file.
        cls = BatchTopKSAE if dictionary.encode_rule == "threshold" else cls
    form = portable(dictionary, where)
    if isinstance(dictionary, ThresholdDictionary) and not has_unit_rows(form):
        raise TsaeError(
            f"{where}: decoder rows do not have norm 1 and one threshold cannot make up for it; use --format sae_lens"
        )
    form = recentred(with_unit_rows(form, where), cls.centre_input)
    k = int(dictionary.k) if isinstance(dictionary, ThresholdDictionary) else None
    state = state_dict(cls, form, k, dictionary.group_sizes)
    if isinstance(dictionary, ThresholdDictionary):
        state["threshold"] = dictionary.threshold
    name = cls.__name__
    names = {"trainer_class": classes()[name].trainer_class, "dict_class": name}
    config = {**source.config, "trainer": source.config["trainer"] | names}
    _write_reference(folder, from_state(name, state, k, where), config)


def write_reference(folder: Path, source: Source) -> None:
    """config.json, ae.pt and explanations.json as the authors' scripts know them."""
    _write_reference(folder, source.dictionary, source.config)
    if source.explanations:
        write_explanations(folder / "explanations.json", source.explanations)


def _write_reference(folder: Path, dictionary: Dictionary, config: dict[str, Any]) -> None:
    save_run(RunFolder(folder), of_new_weights(config), dictionary)


WRITERS: dict[str, Callable[[Path, Source], None]] = {
    "sae_lens": write_sae_lens,
    "sae_bench": write_sae_bench,
    "reference": write_reference,
}
