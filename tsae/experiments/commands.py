"""The commands `tsae probe`, `tsne`, `sequences`, `align`, `steer`, `explain` and `features`: the flags they share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tsae.experiments.registry import EXPERIMENTS

AddCommand = Callable[[str, object, str], argparse.ArgumentParser]
"""Makes the parser of a command from its name, its function and its help."""


def add_commands(add: AddCommand, run: Callable[[str, argparse.Namespace], None]) -> None:
    """Declare the commands, which call `run` with the experiment's name and the options."""
    for name, experiment in EXPERIMENTS.items():
        parser = add(name, partial(run, name), experiment.help)
        parser.add_argument(
            "overrides",
            nargs="*",
            metavar="RUN section.key=value",
            help="the run's name, or its folder (baseline_model: the dense residual stream); then settings, such as "
            f"experiments.{name}.…",
        )
        _option(parser, "run-name", metavar="RUN", help="the same run by a flag, as the authors' scripts take it")
        _option(parser, "checkpoints-path", type=Path, help="folder of runs (default: TSAE_HOME/checkpoints)")
        _option(parser, "checkpoint", help="step of an intermediate checkpoint (default: the final weights)")
        _option(parser, "model", help="language model (default: the run's own)")
        _option(parser, "layer", type=int, help="block whose output is read (default: the run's own)")
        _option(parser, "dataset", help="labelled texts (default: experiments.NAME.dataset)")
        add_accept_argument(parser)
        add_out_argument(parser)
        if experiment.splits:
            _option(
                parser, "chunk", type=int, choices=(0, 1, 2), help="0: high-level split, 1: the rest, 2: all latents"
            )
        if name == "probe":
            _option(parser, "protocol", choices=("disjoint", "reference"), help="reference: that of the released code")
        if name == "explain":
            parser.add_argument(
                "--dry-run",
                action="store_true",
                help="say which latents, questions and tokens it takes, and ask nothing",
            )
        if name == "features":
            _option(parser, "beside", help="another run, whose latents are matched with this one's")
        if experiment.explained:
            _option(
                parser,
                "explanation-path",
                type=Path,
                help="explanations.json or a SAEBench result (default: the explanations.json beside the run)",
            )


def add_accept_argument(parser: argparse.ArgumentParser) -> None:
    """The flag by which somebody decides that changed data are meant."""
    parser.add_argument(
        "--accept-new-data",
        action="store_true",
        help="measure a trained run on its text and language model as they are now, although they have changed since",
    )


def add_out_argument(parser: argparse.ArgumentParser, what: str = "results and locks") -> None:
    """The flag by which a run is measured that lies where nothing may be written."""
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"folder for {what} (default: the run's own)")


def _option(parser: argparse.ArgumentParser, name: str, **options: object) -> None:
    """A flag in both spellings, `--run-name` and the authors' `--run_name`."""
    spellings = dict.fromkeys([f"--{name}", f"--{name.replace('-', '_')}"])
    parser.add_argument(*spellings, **options)  # type: ignore[arg-type]
