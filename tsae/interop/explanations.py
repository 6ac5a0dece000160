"""explanations.json, {"<latent>": "<what it responds to>"}, and the SAEBench results it is made from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tsae.checkpoint import RunFolder, find_dictionary, load_dictionary
from tsae.interop.origin import read_json
from tsae.runtime import contents, metadata
from tsae.runtime.errors import TsaeError
from tsae.runtime.files import write_json
from tsae.store.binding import weights_identity

OWN = {"explanations?": {"sha256": str}, "made_from?": dict}
"""What is read of the results of `tsae explain`."""

log = logging.getLogger("tsae")


def find_explanations(run: RunFolder) -> Path | None:
    """The explanations.json of a run: among its results, or above trainer_0/, where the authors keep it; None without one.

    None, with a warning, where `tsae explain` made them from other weights than are there now.
    """
    above = [run.path.parent] if run.path.name.startswith("trainer_") else []
    for place in dict.fromkeys([run.measured, run.path, *above]):
        path = RunFolder(place).result("explanations", "json")
        if path.is_file():
            if place not in above and _are_of_other_weights(run, path):
                log.warning("%s: explains the run's weights as they were before; `tsae explain` makes it again", path)
                return None
            return path
    return None


def _are_of_other_weights(run: RunFolder, path: Path) -> bool:
    made = metadata.whole(RunFolder(path.parent).result("autointerp", "json"), OWN)
    own = made.get("explanations", {}).get("sha256") == contents.sha256_of(path)
    return own and made.get("made_from", {}).get("weights") not in (None, weights_identity(run))


def read_explanations(source: str | Path) -> dict[int, str]:
    """Latent → explanation, from an explanations.json, a SAEBench autointerp result, a run folder or a hub id.

    A latent that is missing was silent or never explained. Raises TsaeError if there is none, and for keys that are
    not latent indices.
    """
    path = Path(source)
    if path.suffix == ".json" and not path.is_file():
        raise TsaeError(f"{path}: no such file; an explanations.json or a result of SAEBench is expected")
    if not path.is_file():
        found = find_explanations(RunFolder(find_dictionary(source)))
        if found is None:
            raise TsaeError(f"{source}: holds no explanations.json")
        path = found
    content = read_json(path)
    if "eval_type_id" in content:
        return from_sae_bench(path)
    explanations = {}
    for key, text in content.items():
        if not key.isdecimal() or not isinstance(text, str):
            raise TsaeError(f'{path}: entry {key!r} is not of the form "<latent index>": "<explanation>"')
        explanations[int(key)] = text
    return dict(sorted(explanations.items()))


def write_explanations(path: str | Path, explanations: Mapping[int, str]) -> None:
    """Write an explanations.json, in the order of the latents."""
    write_json(path, {str(latent): explanations[latent] for latent in sorted(explanations)})


def from_sae_bench(path: str | Path) -> dict[int, str]:
    """Latent → explanation, from the result file of SAEBench's autointerp evaluation.

    Latents that SAEBench dropped (silent, or an answer it could not parse) are missing. Raises TsaeError for results of
    another evaluation and entries without an explanation.
    """
    path = Path(path)
    results = read_json(path)
    kind, entries = results.get("eval_type_id"), results.get("eval_result_unstructured")
    if kind != "autointerp" or not isinstance(entries, dict):
        raise TsaeError(f"{path}: not a result of SAEBench's autointerp evaluation (eval_type_id is {kind!r})")
    explanations = {_latent(path, key, entry): entry["explanation"] for key, entry in entries.items()}
    if not explanations:
        raise TsaeError(f"{path}: explains no latent")
    return dict(sorted(explanations.items()))


def _latent(path: Path, key: str, entry: Any) -> int:
    if not (isinstance(entry, dict) and isinstance(entry.get("explanation"), str) and key.isdecimal()):
        raise TsaeError(f"{path}: entry {key!r} has no explanation")
    if entry.get("latent", int(key)) != int(key):
        raise TsaeError(f"{path}: entry {key!r} is about latent {entry['latent']}; the file is damaged")
    return int(key)


def import_sae_bench(path: str | Path, run: str | Path) -> Path:
    """Write the explanations in a SAEBench result into the run folder `run`; returns the file.

    Raises TsaeError if `run` holds no dictionary, has explanations already, or has fewer latents than are explained.
    """
    folder = find_dictionary(run)
    explanations = from_sae_bench(path)
    dictionary, _ = load_dictionary(folder)
    if max(explanations) >= dictionary.dict_size:
        raise TsaeError(
            f"{path}: explains latent {max(explanations)}, {run} has {dictionary.dict_size}; it is about another dictionary"
        )
    target = RunFolder(folder).result("explanations", "json")
    if target.exists():
        raise TsaeError(f"{target}: exists already and is left as it is; move it away first")
    write_explanations(target, explanations)
    return target
