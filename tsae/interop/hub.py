"""A run on the Hugging Face hub: the folder with its model card, and the upload."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

import tsae.evaluation.results  # noqa: F401  (declares what the table may hold)
from tsae.checkpoint import RunFolder, fetch, find_dictionary, load_dictionary, of_new_weights, save_run
from tsae.config.run import WRITTEN
from tsae.config.schema import read_yaml
from tsae.evaluation.measures import REGISTRY
from tsae.interop.explanations import write_explanations
from tsae.interop.export import Source, open_source, write
from tsae.interop.folders import new_folder, refuse_used
from tsae.interop.sae_lens import import_folder
from tsae.runtime import metadata
from tsae.runtime.environment import home
from tsae.runtime.errors import TsaeError
from tsae.runtime.files import write_text
from tsae.store.binding import weights_identity

EXTRA_FORMATS = ("sae_lens", "sae_bench")
RUN_FILES, LENS_FILES = (".json", ".yaml", ".pt", ".png"), (".json", ".safetensors")
"""Endings of the files of a dictionary on the hub."""
MOST_LISTED = 8
TITLES = {
    "TemporalMatryoshkaBatchTopKSAE": "Temporal Sparse Autoencoder ([arXiv 2511.05541](https://arxiv.org/abs/2511.05541))",
    "MatryoshkaBatchTopKSAE": "Matryoshka BatchTopK sparse autoencoder ([arXiv 2503.17547](https://arxiv.org/abs/2503.17547))",
    "BatchTopKSAE": "BatchTopK sparse autoencoder ([arXiv 2412.06410](https://arxiv.org/abs/2412.06410))",
    "AutoEncoderTopK": "TopK sparse autoencoder ([arXiv 2406.04093](https://arxiv.org/abs/2406.04093))",
    "JumpReluAutoEncoder": "JumpReLU sparse autoencoder ([arXiv 2407.14435](https://arxiv.org/abs/2407.14435))",
    "GatedAutoEncoder": "Gated sparse autoencoder ([arXiv 2404.16014](https://arxiv.org/abs/2404.16014))",
}


def prepare(
    run: str | Path,
    repo_id: str,
    out: str | Path,
    *,
    licence: str | None = None,
    formats: Sequence[str] = (),
    checkpoint: int | None = None,
) -> Path:
    """Write the new folder `out` with all that goes to the hub repository `repo_id`; returns it.

    It holds README.md, config.json, ae.pt, the measures and explanations there are, and a sub-folder for each of
    `formats`. Nothing in it names a file or a machine of the uploader. Raises TsaeError as `export` does, and for an
    impossible repository id.
    """
    _check_repo_id(repo_id)
    for form in formats:
        if form not in EXTRA_FORMATS:
            raise TsaeError(f"--with {form}: unknown; known: {', '.join(EXTRA_FORMATS)}")
    source = open_source(run, checkpoint=checkpoint)
    # Local paths (of a model or a text) are cut to their last part: where they lay is nobody's business.
    source = source._replace(
        config=_shortened(source.config),
        origin=source.origin._replace(model=_shortened(source.origin.model), dataset=_shortened(source.origin.dataset)),
        results=_shortened(source.results),
    )
    run_folder = RunFolder(find_dictionary(run))
    with new_folder(out) as folder:
        target = RunFolder(folder)
        save_run(target, of_new_weights(source.config), source.dictionary)
        if run_folder.resolved.is_file():
            settings = _shortened(read_yaml(run_folder.resolved))
            for key in ("training_hash", metadata.DIGEST, WRITTEN):
                settings.pop(key, None)
            settings.get("store", {}).pop("path", None)
            write_text(target.resolved, yaml.safe_dump(settings, sort_keys=False))
        if source.results:
            made = source.results.get("made_from", {}) | {"weights": weights_identity(target)}
            metadata.write(target.eval_results, {**source.results, "made_from": made})
            figure = run_folder.result("eval_results", "png")
            if figure.is_file():
                target.result("eval_results", "png").write_bytes(figure.read_bytes())
        if source.explanations:
            write_explanations(target.result("explanations", "json"), source.explanations)
        for form in formats:
            (folder / form).mkdir()
            write(form, folder / form, source)
        write_text(folder / "README.md", card(source, repo_id, licence, list(formats)))
    return Path(out)


def pull(source: str, out: Path | None = None, revision: str | None = None) -> Path:
    """Fetch a dictionary, `owner/name` or `owner/name/FOLDER`, into the new run folder `out`; returns it.

    Read are this package's layout, which is the authors', and SAELens'. Nothing is left of one that cannot be loaded.
    Raises TsaeError as `load_dictionary` does, and for a place that holds no dictionary or several.
    """
    repo_id, inner = "/".join(source.split("/")[:2]), "/".join(source.split("/")[2:]).strip("/")
    _check_repo_id(repo_id)
    if ".." in inner.split("/"):
        raise TsaeError(f"{source}: a folder inside the repository is expected")
    out = out or home() / "checkpoints" / Path(source).name
    refuse_used(out)
    # What is small tells where a dictionary is, before anything large is asked for.
    snapshot = fetch(repo_id, [f"{inner}/*.json".lstrip("/")], revision)
    place = snapshot / inner
    folders = [each for each in (place, place / "trainer_0") if (each / "config.json").is_file()]
    found = place if (place / "cfg.json").is_file() else next(iter(folders), None)
    if found is None:
        inside = sorted({str(path.parent.relative_to(snapshot)) for path in place.rglob("*.json") if _tells(path)})
        listed = f"; it holds {', '.join(f'{repo_id}/{each}' for each in inside[:MOST_LISTED])}" if inside else ""
        more = f" and {len(inside) - MOST_LISTED} more" if len(inside) > MOST_LISTED else ""
        raise TsaeError(f"{source}: no dictionary is here (config.json and ae.pt, or SAELens' cfg.json){listed}{more}")
    below = str(found.relative_to(snapshot)).removeprefix(".")
    endings = LENS_FILES if (found / "cfg.json").is_file() else RUN_FILES
    fetch(repo_id, [f"{below}/*{ending}".lstrip("/") for ending in endings], revision)
    if endings is LENS_FILES:
        return import_folder(found, out)
    with new_folder(out) as folder:
        shutil.copytree(found, folder / "trainer_0", ignore=shutil.ignore_patterns("*.safetensors", "trainer_*"))
        if (place / "explanations.json").is_file() and found != place:
            shutil.copy(place / "explanations.json", folder)
        load_dictionary(folder, calibrated=False)
    return out


def _tells(path: Path) -> bool:
    """Whether a JSON file is one that lies beside a dictionary."""
    return path.name == "cfg.json" or (path.name == "config.json" and "trainer" in metadata.whole(path))


def upload(folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Send a prepared folder to the hub repository `repo_id`, made if it is missing; returns its address.

    Raises TsaeError without network, without permission and in offline mode.
    """
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi(library_name="tsae")
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload dictionary")
    except OfflineModeIsEnabled:
        raise TsaeError(f"{repo_id}: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it") from None
    except (HfHubHTTPError, LocalTokenNotFoundError, httpx2.HTTPError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TsaeError(
            f"{repo_id}: the hub refused the upload: {reason} (is HF_TOKEN set, with write access?)"
        ) from error
    return f"{api.endpoint}/{repo_id}"


def contents(folder: Path) -> list[tuple[str, int]]:
    """Path and size in bytes of every file below `folder`."""
    return [
        (str(path.relative_to(folder)), path.stat().st_size) for path in sorted(folder.rglob("*")) if path.is_file()
    ]


def _check_repo_id(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise TsaeError(f"{repo_id}: not a hub id: {error}") from None
    if repo_id.count("/") != 1:
        raise TsaeError(f"{repo_id}: name the owner too: owner/{repo_id}")


def _shortened(value: Any) -> Any:
    """A tree with every path of this machine cut to its last part."""
    if isinstance(value, dict):
        return {key: _shortened(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shortened(item) for item in value]
    if isinstance(value, str) and (
        value.startswith(("/", "~", "./", "../")) or ("/" in value and Path(value).exists())
    ):
        return Path(value).name
    return value


def card(source: Source, repo_id: str, licence: str | None, formats: list[str]) -> str:
    """README.md for the hub repository `repo_id`, whose sub-folders hold the dictionary in `formats` as well."""
    parts = [
        _front_matter(source, licence, formats),
        f"# {repo_id.rpartition('/')[2]}\n\n{_summary(source)}",
        _inference(source),
        _measures(source),
        _training(source),
        _loading(repo_id, formats, bool(source.explanations)),
        "## Licence\n\n"
        + (f"{licence}." if licence else "The uploader stated none; ask before you reuse the weights."),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(source: Source, licence: str | None, formats: list[str]) -> str:
    origin = source.origin
    tags = ["sparse-autoencoder", "interpretability"]
    if type(source.dictionary).__name__.startswith("Temporal"):
        tags.insert(1, "temporal-sae")
    if "sae_lens" in formats:
        tags.append("saelens")
    head: dict[str, Any] = {"library_name": "tsae", "tags": tags}
    if licence:
        head["license"] = licence
    if _is_hub_id(origin.model):
        head["base_model"] = origin.model
    if _is_hub_id(origin.dataset):
        head["datasets"] = [origin.dataset]
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---"


def _is_hub_id(name: object) -> bool:
    """Whether `name` has the form owner/name of the hub."""
    return isinstance(name, str) and bool(re.fullmatch(r"[\w-]+(\.[\w-]+)*/[\w.-]+", name))


def _summary(source: Source) -> str:
    dictionary, origin = source.dictionary, source.origin
    title = TITLES.get(type(dictionary).__name__, "Sparse autoencoder")
    place = f"the output of block {origin.layer}" if origin.layer is not None else "activations"
    module = f" (`{origin.module}`)" if origin.module else ""
    text = (
        f"{title} with {dictionary.dict_size:,} latents for the {dictionary.activation_dim} dimensions of {place}{module} of "
        f"`{origin.model}`."
    )
    if len(dictionary.group_sizes) > 1:
        sizes = ", ".join(f"{size:,}" for size in dictionary.group_sizes)
        text += f" The latents lie in nested groups of {sizes}; the first is the high-level split."
    return text


def _inference(source: Source) -> str:
    dictionary, threshold = source.dictionary, source.dictionary.scalar_threshold
    rules = {
        "threshold": f"a latent is active where its rectified pre-activation is above **{threshold}** (strictly)",
        "top_k": f"the {source.config['trainer'].get('k')} largest rectified pre-activations of each token are kept",
        "relu": "every positive pre-activation is kept",
        "latent thresholds": "each latent has its own threshold (strict inequality)",
        "gate": "a latent is active where its gate is open and its magnitude positive",
    }
    centring = "`b_dec` is subtracted first. " if dictionary.centre_input else ""
    lines = [
        f"## Decode rule\n\nApplies to raw activations: nothing has to be normalised. {centring}Encoding: "
        f"{rules.get(dictionary.encode_rule, dictionary.encode_rule)}; `class {type(dictionary).__name__}`."
    ]
    l0 = source.results.get("l0")
    if l0 is not None:
        lines.append(f"With this rule {l0:.4g} latents are active per token on held-out text.")
    calibration = source.config.get("calibration")
    if calibration:
        target, after, before = calibration["target_l0"], calibration["after"], calibration["before"]
        how = (
            "is the one that training tracked"
            if target is None
            else f"was set for {target:.4g} active latents per token"
        )
        text = f"The threshold {how}, on {calibration['tokens']:,} held-out tokens: L0 {after['l0']:.4g}, "
        text += f"fraction of variance explained {after['fve']:.4f}"
        lines.append(text + (f" (before: L0 {before['l0']:.4g}, {before['fve']:.4f})." if before else "."))
    return " ".join(lines)


def _measures(source: Source) -> str:
    results = source.results
    widths, rows = results.get("half_width_95") or {}, []
    for key, measure in REGISTRY.items():
        if measure.card and isinstance(results.get(key), (int, float)):
            interval = "" if widths.get(key) is None else f" ± {widths[key]:.2g}"
            rows.append(f"| {measure.card} | {results[key]:.4g}{interval} |")
    if not rows:
        return "## Measures\n\nNot evaluated."
    counted = f"{results.get('contexts', '?')} held-out contexts of {results.get('documents', '?')} documents"
    return (
        f"## Measures\n\nOn {counted}, with the rule above; ± is the half-width of a 95 % interval over documents.\n\n"
        "| measure | value |\n|---|---|\n" + "\n".join(rows) + "\n\nAll of them: `eval_results.json`."
    )


def _training(source: Source) -> str:
    origin = source.origin
    settings = {key: value for key, value in source.config["trainer"].items() if value is not None}
    data = f"Text: `{origin.dataset or 'not recorded'}`"
    if origin.context_length:
        data += f", contexts of {origin.context_length} tokens"
    if origin.skip_positions:
        data += f", the first {origin.skip_positions} of each left out"
    if origin.commit:
        data += f". Code: `tsae` at commit {origin.commit}"
    table = "\n".join(f"| {key} | `{value}` |" for key, value in settings.items())
    return f"## Training\n\n{data}.\n\n| setting | value |\n|---|---|\n{table}"


def _loading(repo_id: str, formats: list[str], explained: bool) -> str:
    lines = [
        "## Loading\n\n```python\nfrom tsae import load_dictionary\n",
        f'dictionary, config = load_dictionary("{repo_id}")',
        "f = dictionary.encode(x)       # x: [..., activation_dim], f: [..., dict_size]",
        "high = f[..., dictionary.group_slices[0]]",
        "x_hat = dictionary.decode(f)\n```",
    ]
    if explained:
        lines.append('\nWhat latents respond to is in `explanations.json`: {"<latent>": "<text>"}.')
    if "sae_lens" in formats:
        lines.append(
            "\nWith SAELens:\n\n```python\nfrom sae_lens import SAE\n\n"
            f'sae = SAE.from_pretrained("{repo_id}", "sae_lens")\n```'
        )
    if "sae_bench" in formats:
        lines.append("\n`sae_bench/` is for SAEBench's loader of dictionary_learning folders.")
    return "\n".join(lines)
