"""`tsae store`: look at a store, check it, make one of activations from elsewhere."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_args, get_type_hints

from tsae.config.sections import StoreConfig
from tsae.runtime import preemption


def add_commands(commands: argparse._SubParsersAction) -> None:
    """The commands below `tsae store`."""

    def command(name: str, run: object, text: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + "."
        )
        parser.set_defaults(run=run)
        return parser

    verify = command("verify", _verify, "check every shard of a store")
    verify.add_argument("paths", nargs="+", type=Path, metavar="STORE")
    verify.add_argument("--deep", action="store_true", help="read every byte and check its checksum")

    show = command("show", _show, "print what a store holds: its shape, the norms of its tokens, massive ones")
    show.add_argument("path", type=Path)

    made = command("import", _import, "make a store of activations from elsewhere, of any kind of model")
    made.add_argument(
        "arrays",
        nargs="+",
        type=Path,
        metavar="ARRAY",
        help=".npy, .safetensors or zarr: [sequences, positions, dimensions], or [vectors, dimensions]; several are joined",
    )
    made.add_argument("--out", type=Path, required=True, metavar="STORE", help="folder of the store")
    made.add_argument("--key", help="which array of a .safetensors file or zarr group")
    made.add_argument("--name", default="imported", help="what the activations are of")
    column = ".npy, or a text file with a line for each"
    made.add_argument("--lengths", type=Path, help=f"how many positions of each sequence are no padding: {column}")
    made.add_argument(
        "--documents", type=Path, help=f"what each sequence or vector belongs to: {column}; without it, each to its own"
    )
    made.add_argument("--labels", type=Path, help=f"what each sequence's or vector's document is: {column}")
    made.add_argument("--context-length", type=int, default=128, help="vectors of a sequence (default: 128)")
    made.add_argument("--dtype", choices=get_args(get_type_hints(StoreConfig)["dtype"]), default=StoreConfig().dtype)
    made.add_argument("--shard-mb", type=int, default=StoreConfig().shard_mb, help="largest size of a shard in MB")
    made.add_argument(
        "--holdout", type=float, default=0.1, help="share of the sequences that is held out (default: 0.1)"
    )
    made.add_argument("--seed", type=int, default=0, help="seed of their order, and of which are held out")


def _verify(options: argparse.Namespace) -> int:
    from tsae.store.verify import verify

    damaged = False
    for path in options.paths:
        problems = verify(path, deep=options.deep)
        for problem in problems:
            print(problem, file=sys.stderr)
        if not problems:
            print(f"{path}: every shard is whole")
        damaged = damaged or bool(problems)
    return 2 if damaged else 0


def _show(options: argparse.Namespace) -> None:
    from tsae.store.massive import describe
    from tsae.store.reader import Store

    print(describe(Store.open(options.path)))


@preemption.watched()
def _import(options: argparse.Namespace) -> None:
    from tsae.config import run as configuration
    from tsae.store.importing import import_arrays, open_array, read_column
    from tsae.store.reader import Store

    cut = {"context_length": options.context_length, "holdout": options.holdout, "seed": options.seed, "min_length": 1}
    told = {"data": {**cut, "skip_positions": 0}, "store": {"dtype": options.dtype, "shard_mb": options.shard_mb}}
    config = configuration.from_mapping(told, "command line")
    columns = {name: getattr(options, name) for name in ("lengths", "documents", "labels")}
    path = import_arrays(
        [open_array(array, options.key) for array in options.arrays],
        options.out.absolute(),
        **{name: column and read_column(column) for name, column in columns.items()},
        name=options.name,
        context_length=options.context_length,
        store=config.store,
        holdout=options.holdout,
        seed=options.seed,
    )
    print(Store.open(path))
    print(f"train on it: tsae train RUN.yaml data.source=store store.path={path}")
