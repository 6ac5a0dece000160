"""Other libraries' dictionaries as run folders of ours."""

from __future__ import annotations

from pathlib import Path

from tsae.checkpoint import RunFolder, save_dictionary
from tsae.interop import sae_lens
from tsae.interop.folders import new_folder
from tsae.runtime.errors import TsaeError
from tsae.runtime.files import write_json


def import_folder(source: str | Path, out: str | Path) -> Path:
    """Write the dictionary in a SAELens folder to the new run folder `out`, where every command finds it.

    The authors' folders and hub repositories need no import: they are read as they are. Raises TsaeError for what
    cannot be read exactly.
    """
    source = Path(source)
    if (source / RunFolder(source).config_json.name).is_file():
        raise TsaeError(f"{source}: is a run folder already (it holds config.json); every command reads it as it is")
    if not (source / sae_lens.CONFIG).is_file():
        raise TsaeError(f"{source}: no {sae_lens.CONFIG} here; a SAELens folder holds it and {sae_lens.WEIGHTS}")
    dictionary, config = sae_lens.load(source)
    with new_folder(out) as folder:
        # A run's files lie in trainer_0/ below its name.
        run = RunFolder(folder / "trainer_0")
        write_json(run.config_json, config)
        save_dictionary(run.weights, dictionary)
    return Path(out)
