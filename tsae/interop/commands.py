"""The commands `tsae export`, `import`, `pull`, `explanations`, `push` and `formats`: parse, call one function, print."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

FORMATS = ("sae_lens", "sae_bench", "reference", "neuronpedia")
EXTRA_FORMATS = ("sae_lens", "sae_bench")

READERS = {"sae_lens": "'tsae[sae-lens]'", "dictionary_learning": "--no-deps dictionary-learning==0.1.0"}
"""Libraries that `formats` asks to read our files, and how they are installed beside ours."""

AddCommand = Callable[[str, object, str], argparse.ArgumentParser]
"""Makes the parser of a command from its name, its function and its help."""


def add_commands(add: AddCommand, write_latents: Callable[[argparse.Namespace], Path]) -> None:
    """Declare the commands; nothing heavy is imported before one runs.

    `write_latents` exports what is no dictionary but its latents, which this room knows nothing of.
    """
    export = add("export", partial(_export, write_latents), "write a trained dictionary in another library's format")
    export.add_argument("source", metavar="RUN", help="a run's name or folder, or a hub id owner/name")
    export.add_argument("--format", required=True, choices=FORMATS)
    export.add_argument("--out", type=Path, required=True, help="new folder to write")
    export.add_argument("--chunk", type=int, default=None, help="one group of latents alone; 0: the high-level split")
    export.add_argument("--checkpoint", type=int, default=None, help="weights of this step instead of the final ones")

    take = add("import", _import, "make a run of a SAELens folder (the authors' folders need no import)")
    take.add_argument("folder", type=Path, metavar="DIR", help="folder with cfg.json and sae_weights.safetensors")
    take.add_argument("--out", type=Path, required=True, help="new run folder")

    pull = add("pull", _pull, "fetch a dictionary from the Hugging Face hub as a run: ours, the authors' or SAELens'")
    pull.add_argument("source", metavar="REPO_ID", help="owner/name, or owner/name/FOLDER where it holds several")
    pull.add_argument("--out", type=Path, default=None, help="new run folder (default: NAME in TSAE_HOME/checkpoints)")
    pull.add_argument("--revision", default=None, help="branch, tag or commit")

    explanations = add(
        "explanations", _explanations, "take a run's explanations.json from SAEBench's autointerp result"
    )
    explanations.add_argument("result", type=Path, metavar="RESULT", help="..._eval_results.json of SAEBench")
    explanations.add_argument(
        "--run", dest="target", required=True, help="the run, by name or folder, that gets explanations.json"
    )

    push = add("push", _push, "upload a run with its model card to the Hugging Face hub")
    push.add_argument("source", metavar="RUN", help="a run's name or folder")
    push.add_argument("repo_id", metavar="REPO_ID", help="owner/name on the hub")
    push.add_argument("--dry-run", action="store_true", help="write the folder, show it, upload nothing")
    push.add_argument("--out", type=Path, default=None, help="keep the uploaded folder here (new folder)")
    push.add_argument("--private", action="store_true", help="make the repository private if it is new")
    push.add_argument("--licence", "--license", default=None, help="licence of the weights, as the hub names it (mit)")
    push.add_argument("--with", dest="formats", action="append", default=[], choices=EXTRA_FORMATS)
    push.add_argument("--checkpoint", type=int, default=None, help="weights of this step instead of the final ones")

    add("formats", _formats, "list what a trip through each format changes, per class of dictionary")


def _export(write_latents: Callable[[argparse.Namespace], Path], options: argparse.Namespace) -> None:
    from tsae.interop.export import export

    if options.format == "neuronpedia":
        print(write_latents(options))
        return
    print(
        export(_found(options.source), options.format, options.out, chunk=options.chunk, checkpoint=options.checkpoint)
    )


def _found(source: str) -> str:
    """The folder of the run that goes by this name under TSAE_HOME/checkpoints; else what was given."""
    from tsae.runtime.environment import home

    named = home() / "checkpoints" / source
    return str(named) if named.is_dir() and not Path(source).is_dir() else source


def _import(options: argparse.Namespace) -> None:
    from tsae.interop.sae_lens import import_folder

    print(import_folder(options.folder, options.out))


def _pull(options: argparse.Namespace) -> None:
    from tsae.interop.hub import pull

    run = pull(options.source, options.out, options.revision)
    print(run)
    print(f"measure it: tsae evaluate {run} data.source=TEXT, or tsae probe {run.name}", file=sys.stderr)


def _explanations(options: argparse.Namespace) -> None:
    from tsae.interop.explanations import import_sae_bench

    print(import_sae_bench(options.result, _found(options.target)))


def _push(options: argparse.Namespace) -> None:
    import os
    import tempfile

    from tsae.interop import hub

    name = options.repo_id.rpartition("/")[2]
    out = options.out
    if out is None and options.dry_run:
        out = Path(tempfile.gettempdir()) / f"tsae-push-{os.getpid()}" / name
    with tempfile.TemporaryDirectory(prefix="tsae-push-") as place:
        folder = hub.prepare(
            _found(options.source),
            options.repo_id,
            out or Path(place) / name,
            licence=options.licence,
            formats=options.formats,
            checkpoint=options.checkpoint,
        )
        if options.dry_run:
            print((folder / "README.md").read_text())
            for name, size in hub.contents(folder):
                print(f"{size:>12,}  {name}")
            print(f"{folder}: nothing was uploaded")
            return
        print(hub.upload(folder, options.repo_id, private=options.private))


def _formats(_: argparse.Namespace) -> int:
    from tsae.interop.formats import TOLERANCE, deviations, installed

    print(f"{'dict_class':32}{'format':42}{'read by':12}{'encode':>9}{'decode':>9}")
    bad = 0
    for row in deviations():
        wrong = not max(row.encode, row.decode) <= TOLERANCE
        bad += wrong
        mark = "  <-- above the bound" if wrong else ""
        print(f"{row.dict_class:32}{row.format:42}{row.read_by:12}{row.encode:9.1e}{row.decode:9.1e}{mark}")
    print(f"largest difference over largest value; bound {TOLERANCE:g}")
    for library, remedy in READERS.items():
        if not installed(library):
            print(f"{library} is not installed, so it read nothing itself: pip install {remedy}", file=sys.stderr)
    return 2 if bad else 0
