"""The `tsae` command: parse, call one function, print. No logic; heavy imports wait until a command runs."""

from __future__ import annotations

import argparse
import functools
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tsae.bench.command import add_arguments as add_bench_arguments
from tsae.experiments.commands import add_accept_argument, add_out_argument
from tsae.experiments.commands import add_commands as add_experiment_commands
from tsae.interop.commands import add_commands
from tsae.runtime import preemption
from tsae.runtime.environment import forget_what_is_for_others, home, load_dotenv, process_count, process_rank
from tsae.runtime.errors import TsaeError, os_error_line, suggestion
from tsae.runtime.interrupts import interrupted, repeat_lost_interrupts
from tsae.runtime.processes import end_without_a_search
from tsae.store.commands import add_commands as add_store_commands
from tsae.sweep.commands import INEXACT_HELP, PROBE_HELP
from tsae.sweep.commands import add_commands as add_sweep_commands
from tsae.sweep.schedulers import adopt_place

if TYPE_CHECKING:
    from tsae.checkpoint import RunFolder
    from tsae.config.run import RunConfig


def main(arguments: Sequence[str] | None = None, script: str = "") -> int:
    """Run one command; bad input becomes one line on stderr and exit code 2, preemption exit code 75.

    `script` is the one of `launch/` by which a user called it.
    """
    options = _parse(arguments, script)
    options.status_command = "python launch/status.py" if script else "tsae status"
    speaker = "error" if script else "tsae"
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # where the terminal's encoding lacks a letter
    end_without_a_search()
    repeat_lost_interrupts()
    try:
        load_dotenv()
        forget_what_is_for_others()
        adopt_place()
        return int(options.run(options) or 0)
    except TsaeError as error:
        print(f"{speaker}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of a pipe, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        print(f"{speaker}: {os_error_line(error, home())}", file=sys.stderr)
        return 2
    except preemption.Preempted as preempted:
        print(f"tsae: {preempted}", file=sys.stderr)
        return preemption.REQUEUE
    except (KeyboardInterrupt, Exception) as error:
        if not interrupted(error):
            raise
        print(f"{speaker}: interrupted; the same command continues", file=sys.stderr)
        return 130


def door(command: str) -> int:
    """`python launch/<command>.py …`, which is `tsae <command> …`."""
    return main([command, *sys.argv[1:]], f"launch/{command}.py")


def _parse(arguments: Sequence[str] | None, script: str) -> argparse.Namespace:
    """The command's options; overrides may stand anywhere among them."""
    parser = _parser(script)
    options, rest = parser.parse_known_args(arguments)
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    if len(overrides) < len(rest) or (rest and not hasattr(options, "overrides")):
        unknown = [word for word in rest if word not in overrides] or rest
        of_command = parser.of(sys.argv[1:] if arguments is None else arguments)
        near = suggestion(
            unknown[0].partition("=")[0],
            [name for name in of_command.options if name.startswith("--") and name != "--help"],
        )
        of_command.refuse(f"unrecognized arguments: {' '.join(unknown)}", near)
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with the nearest of the choices where a word is none, and takes no option by half its name."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        self.refuse(message, suggestion(wrong[1], re.findall(r"[\w-]+", wrong[2])) if wrong else "")

    def refuse(self, message: str, near: str) -> NoReturn:
        """End with `message`, and what may have been meant."""
        said = f"{message}; {near.rstrip()}" if near else message
        self.exit(2, f"{self.prog}: error: {said} (`{self.prog} --help` shows what there is)\n")

    @property
    def options(self) -> Collection[str]:
        """What options are called."""
        return self._option_string_actions

    def of(self, words: Sequence[str]) -> _Parser:
        """The parser of the command that `words` name, or of the command's own."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for place, word in enumerate(words):
                    if word in action.choices:
                        found: _Parser = action.choices[word]
                        return found.of(words[place + 1 :])
        return self


def _parser(script: str = "") -> _Parser:
    parser = _Parser(prog="tsae", description="Temporal Sparse Autoencoders: harvest, train, evaluate, sweep.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    harvest = _command(commands, "harvest", _harvest, "read a language model's activations into a zarr store")
    _add_run_arguments(harvest, "YAML file of a run", named=False)
    harvest.add_argument("--task", type=int, default=0, help="which part of the shards to write, from 0")
    harvest.add_argument("--tasks", type=int, default=1, help="into how many parts the harvest is split")
    _add_cost_arguments(harvest)

    train = _command(commands, "train", _train, "train a dictionary on a store (harvested first if it is missing)")
    _add_run_arguments(train, "YAML file of a run", named=True)
    train.add_argument("--inexact", action="store_true", help=f"{INEXACT_HELP}; provenance and results say so")
    _add_cost_arguments(train)
    evaluate = _command(commands, "evaluate", _evaluate, "measure a trained dictionary on held-out activations")
    _add_run_arguments(evaluate, "YAML file of a run, a run's name, or its folder")
    add_out_argument(evaluate)

    add_experiment_commands(functools.partial(_command, commands), _experiment)

    calibrate = _command(
        commands, "calibrate", _calibrate, "set a run's threshold to a wanted number of active latents"
    )
    _add_measured_arguments(calibrate)
    add_out_argument(calibrate, "a copy of the run, which is calibrated in its place")
    how = calibrate.add_mutually_exclusive_group()
    how.add_argument("--target-l0", type=float, help="active latents per held-out token (default: sae.k)")
    add_accept_argument(calibrate)
    how.add_argument("--keep", action="store_true", help="take the threshold that training tracked, and measure it")

    synthetic = _command(commands, "synthetic", _synthetic, "measure a run on a synthetic world against the truth")
    _add_measured_arguments(synthetic)
    add_out_argument(synthetic)

    settings = _command(commands, "settings", _settings, "print every setting, or a run's resolved configuration")
    what = settings.add_mutually_exclusive_group()
    what.add_argument("config", nargs="?", type=Path, metavar="CONFIG", help="YAML file of a run")
    what.add_argument("--markdown", action="store_true", help="print every setting as the page docs/settings.md")
    settings.add_argument("overrides", nargs="*", metavar="section.key=value")
    measures = _command(
        commands, "measures", _measures, "print every measure with its key, unit, direction and formula"
    )
    measures.add_argument("--markdown", action="store_true", help="print the table of docs/measures.md")

    store = commands.add_parser("store", help="inspect, check and make activation stores").add_subparsers(
        required=True, metavar="COMMAND"
    )
    add_store_commands(store)

    add_commands(functools.partial(_command, commands), _export_latents)

    bench = _command(commands, "bench", _bench, "time a training step against the dense path, the floor and others")
    add_bench_arguments(bench)

    add_sweep_commands(functools.partial(_command, commands))
    if script:
        commands.choices[Path(script).stem].prog = script

    _command(commands, "selftest", _selftest, "check that this installation works here, without a network")

    embedded = _command(commands, "embedded-lm", _embedded_lm, "train the small language model that ships inside")
    embedded.add_argument("--out", type=Path, required=True, help="folder for the model and its recipe")
    embedded.add_argument(
        "--tokens", type=int, default=None, help="training tokens (default: those of the shipped one)"
    )
    embedded.add_argument("--seed", type=int, default=0)
    return parser


def _command(commands: argparse._SubParsersAction, name: str, run: object, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    return parser


class _Version(argparse.Action):
    """Asks for the version only when it is wanted: installed packages are slow to search."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib import metadata

        print(f"tsae {metadata.version('tsae')}")
        parser.exit()


class _SettingsHelp(argparse.Action):
    """`--help` of a command that takes a configuration: the usage, then every setting."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from tsae.config import run as configuration

        parser.print_help()
        print("\nSettings (YAML sections, or section.key=value):\n\n" + configuration.help_text())
        parser.exit()


def _add_measured_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", type=Path, metavar="RUN", help="a run's folder, or its name under TSAE_HOME/checkpoints"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.key=value",
        help="such as evaluation.…, or data.… of a run from elsewhere",
    )


def _add_run_arguments(parser: argparse.ArgumentParser, what: str, named: bool = True) -> None:
    parser.add_argument("--help-settings", action=_SettingsHelp, nargs=0, help="show every setting and exit")
    parser.add_argument("config", type=Path, metavar="CONFIG", help=what)
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings that replace the file's"
    )
    if named:
        parser.add_argument(
            "--checkpoints-path",
            "--checkpoints_path",
            type=Path,
            help="folder of runs (default: TSAE_HOME/checkpoints)",
        )
        parser.add_argument("--run-name", "--run_name", help="name of the run (default: the configuration file's)")
        add_accept_argument(parser)


def _add_cost_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="say what it costs, and start nothing")
    parser.add_argument("--probe", action="store_true", help=PROBE_HELP)


def _harvest(options: argparse.Namespace) -> None:
    from tsae.config import run as configuration
    from tsae.stages import harvest_stage

    config = configuration.load(options.config, options.overrides)
    if options.tasks < 1:
        raise TsaeError(f"--tasks {options.tasks}: at least 1 is expected")
    if not 0 <= options.task < options.tasks:
        raise TsaeError(f"--task {options.task}: tasks are counted from 0 to {options.tasks - 1}")
    if _costs_first(config, None, options):
        return
    path = harvest_stage(config, options.task, options.tasks)
    from tsae.report.headline import of_harvest

    _print_once(path, said=lambda: of_harvest(path))


@preemption.watched()
def _train(options: argparse.Namespace) -> None:
    from tsae.checkpoint import RunFolder
    from tsae.config import run as configuration
    from tsae.config.run import require_processes
    from tsae.stages import harvest_stage, refuse_other_data, train_stage
    from tsae.training.trackers import require as require_trackers

    run = _run_of(options)
    config = RunFolder.of(*run).as_begun(configuration.load(options.config, options.overrides))
    RunFolder.of(*run).require_free(config)  # before the harvest, as all of these
    require_processes(config, process_count())
    require_trackers(config.training.trackers if process_rank() == 0 else ())
    _accept(options, config, RunFolder.of(*run))
    refuse_other_data(config, RunFolder.of(*run))
    if _costs_first(config, RunFolder.of(*run), options):
        return
    harvest_stage(config)
    path = train_stage(config, *run, options.inexact)
    from tsae.report.headline import of_training

    _print_once(path, said=lambda: of_training(RunFolder(path)))


def _costs_first(config: RunConfig, run: RunFolder | None, options: argparse.Namespace) -> bool:
    """Say what a harvest, and the training of `run`, will cost; refuse what cannot fit. Whether that was all."""
    if process_rank() == 0:
        from tsae.sweep.cost import cost_of_run

        cost = cost_of_run(config, run)
        if not options.dry_run:
            cost.require()  # what cannot fit is one line
        out = sys.stdout if options.dry_run else sys.stderr
        if cost.notable or options.dry_run:
            print("\n".join(cost.lines) or "nothing to do", file=out)
        if options.probe:
            from tsae.sweep.probe import probe

            print("\n".join(probe(cost.works)), file=out)
        cost.require()
    return bool(options.dry_run)


def _evaluate(options: argparse.Namespace) -> None:
    from tsae.stages import evaluate_run, harvest_elsewhere

    config, run = _measured(options, options.config)
    _accept(options, config, run)
    harvest_elsewhere(config, run)
    path = evaluate_run(config, run)
    from tsae.report.headline import of_evaluation

    _print_once(path, said=lambda: of_evaluation(run))


def _measured(options: argparse.Namespace, named: Path) -> tuple[RunConfig, RunFolder]:
    """The run that a YAML, a name or a folder stands for, and the settings by which it is measured."""
    from tsae.checkpoint import RunFolder
    from tsae.config import run as configuration
    from tsae.interop.settings import find_run, settings_of

    checkpoints = getattr(options, "checkpoints_path", None) or home() / "checkpoints"
    if hasattr(options, "config") and (named.is_file() or named.suffix in (".yaml", ".yml")):
        folder, name = _run_of(options)
        run = RunFolder(RunFolder.of(folder, name).path, options.out)
        return run.as_begun(configuration.load(named, options.overrides)), run
    if getattr(options, "run_name", None) is not None:
        raise TsaeError(f"--run-name {options.run_name}: {named} is a run already; leave --run-name out")
    run = find_run(named, checkpoints, options.out)
    extra = configuration.parse_overrides(options.overrides)
    configuration.check_part(extra, "command line")
    return settings_of(run, extra, ("evaluation",)), run


def _accept(options: argparse.Namespace, config: RunConfig, run: RunFolder) -> None:
    """With --accept-new-data, have a trained run measured on the text and the model that are there now."""
    if options.accept_new_data:
        from tsae.stages import accept_new_data

        accept_new_data(config, run)


def _experiment(name: str, options: argparse.Namespace) -> None:
    from tsae.experiments.registry import EXPERIMENTS
    from tsae.experiments.request import arguments_of
    from tsae.stages import experiment_run, harvest_elsewhere

    asked = arguments_of(name, options)
    _accept(options, asked["config"], asked["run"])
    if EXPERIMENTS[name].reads_store:
        harvest_elsewhere(asked["config"], asked["run"])
    if getattr(options, "dry_run", False):
        from tsae.experiments.driver import cost

        print("\n".join(cost(name, asked["config"], asked["run"], asked["checkpoint"])))
        return
    from tsae.report.headline import of_experiment

    made = [Path(path) for path in experiment_run(**asked)]
    _print_once(*made, said=lambda: of_experiment(made))


def _print_once(*paths: Path, said: Callable[[], list[str]]) -> None:
    """Print results in the first of the processes that made them together, and before, on stderr, what they say."""
    if process_rank() == 0:
        for line in said():
            print(line, file=sys.stderr, flush=True)
        print("\n".join(map(str, paths)))


def _calibrate(options: argparse.Namespace) -> None:
    from tsae.evaluation.calibration import calibrate, calibrate_copy, summary
    from tsae.runtime import locks
    from tsae.stages import harvest_elsewhere, run_lock

    out, options.out = options.out, None
    config, run = _measured(options, options.path)
    _accept(options, config, run)
    harvest_elsewhere(config, run, calibrated=False)
    if out is None:
        run.require_place()
        with locks.hold(run_lock(run, "train"), f"calibrate {run.path.parent.name}"):
            run.remove_leftovers(run.weights.name, run.config_json.name, run.calibration.name)
            record = calibrate(run, config, options.target_l0, keep=options.keep)
    else:
        record = calibrate_copy(run, out, config, options.target_l0, keep=options.keep)
    print(summary(record))


def _synthetic(options: argparse.Namespace) -> None:
    from tsae.evaluation.ground_truth import measure_run, summary

    print(summary(measure_run(*_measured(options, options.path))))


def _run_of(options: argparse.Namespace) -> tuple[Path, str]:
    """Folder of runs and name of the run that a YAML is about; a run's own resolved.yaml is about that run."""
    place = options.config.absolute().parent
    if options.run_name is None and options.config.name == "resolved.yaml" and place.name == "trainer_0":
        return place.parents[1], place.parent.name
    if options.config.is_dir():
        raise TsaeError(f"{options.config}: a folder; the YAML file of a run is expected")
    name = options.config.stem if options.run_name is None else options.run_name
    checkpoints, parts = options.checkpoints_path or home() / "checkpoints", name.split("/")
    if not name.isprintable() or Path(name).is_absolute() or any(part in ("", ".", "..") for part in parts):
        raise TsaeError(f"--run-name {name!r}: a folder name below the checkpoints is expected")
    around = (checkpoints.joinpath(*parts[:depth]) for depth in range(1, len(parts)))
    if "trainer_0" in parts or any((folder / "trainer_0").exists() for folder in around):
        raise TsaeError(
            f"--run-name {name!r}: it would lie inside a run, whose folder has a trainer_0/; give another name"
        )
    return checkpoints, name


def _settings(options: argparse.Namespace) -> None:
    from tsae.config import run as configuration

    if options.config is None:
        print(configuration.help_page() if options.markdown else configuration.help_text())
        return
    import yaml

    resolved = configuration.to_yaml(configuration.load(options.config, options.overrides))
    print(yaml.safe_dump(resolved, sort_keys=False), end="")


def _measures(options: argparse.Namespace) -> None:
    import tsae.report.summary  # noqa: F401  (declares them)
    from tsae.evaluation import measures

    print(measures.markdown() if options.markdown else measures.help_text())


def _export_latents(options: argparse.Namespace) -> Path:
    from tsae.experiments.features.neuronpedia import export
    from tsae.interop.settings import find_run

    for name in ("chunk", "checkpoint"):
        if getattr(options, name) is not None:
            raise TsaeError(f"--{name}: a page of latents is of the whole dictionary at its end; leave it out")
    return export(find_run(options.source, home() / "checkpoints"), options.out)


def _bench(options: argparse.Namespace) -> None:
    from tsae.bench.command import run

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does: stores made for it are removed
    print(run(options))


def _selftest(_options: argparse.Namespace) -> int:
    from tsae.selftest import selftest

    return selftest()


def _embedded_lm(options: argparse.Namespace) -> None:
    from tsae.lm.embedded_lm import train_embedded_lm

    sizes = {} if options.tokens is None else {"tokens": options.tokens}
    print(train_embedded_lm(options.out, seed=options.seed, **sizes))


if __name__ == "__main__":
    sys.exit(main())
