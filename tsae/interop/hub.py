"""A run on the Hugging Face hub: the folder with its model card, and the upload."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tsae.checkpoint import RunFolder, find_dictionary, save_dictionary
from tsae.config.schema import read_yaml
from tsae.interop.card import card
from tsae.interop.explanations import write_explanations
from tsae.interop.export import Source, open_source, write
from tsae.interop.folders import new_folder
from tsae.runtime.errors import TsaeError
from tsae.runtime.files import write_json, write_text

EXTRA_FORMATS = ("sae_lens", "sae_bench")


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
    source = _without_paths(source)
    with new_folder(out) as folder:
        target = RunFolder(folder)
        write_json(target.config_json, source.config)
        save_dictionary(target.weights, source.dictionary)
        _copy_settings(RunFolder(find_dictionary(run)), target)
        if source.results:
            write_json(target.eval_results, source.results)
            figure = RunFolder(find_dictionary(run)).result("eval_results", "png")
            if figure.is_file():
                target.result("eval_results", "png").write_bytes(figure.read_bytes())
        if source.explanations:
            write_explanations(target.result("explanations", "json"), source.explanations)
        for form in formats:
            (folder / form).mkdir()
            write(form, folder / form, source)
        write_text(folder / "README.md", card(source, repo_id, licence, list(formats)))
    return Path(out)


def _copy_settings(run: RunFolder, target: RunFolder) -> None:
    """The whole configuration of our runs, without the places of files."""
    if not run.resolved.is_file():
        return
    settings = _shortened(read_yaml(run.resolved))
    settings.pop("training_hash", None)
    settings.get("store", {}).pop("path", None)
    write_text(target.resolved, yaml.safe_dump(settings, sort_keys=False))


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


def _without_paths(source: Source) -> Source:
    """`source` with local paths (of a model or a text) cut to their last part: where they lay is nobody's business."""
    config: dict[str, Any] = _shortened(source.config)
    origin = source.origin._replace(model=_shortened(source.origin.model), dataset=_shortened(source.origin.dataset))
    return source._replace(config=config, origin=origin, results=_shortened(source.results))


def _shortened(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shortened(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shortened(item) for item in value]
    if isinstance(value, str) and (
        value.startswith(("/", "~", "./", "../")) or ("/" in value and Path(value).exists())
    ):
        return Path(value).name
    return value
