"""The table of experiments: the commands, the driver, the stages of a sweep and the report read it.

A new experiment is a module and a line here. The module has `measure(subject, settings, chunk)` and `draw(results, path)`,
as `driver` says, and is imported when the experiment runs; this table is read by `tsae --help`, so it imports nothing.
The `__init__` of its folder may declare its headline measures, as tsae.evaluation.measures says.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from tsae.runtime.errors import TsaeError

if TYPE_CHECKING:
    from tsae.config.run import RunConfig


class Experiment(NamedTuple):
    """Where an experiment is, and what it is made of."""

    file: str
    """Stem of its results."""
    splits: bool
    """Whether it is made for each split of the latents; else once for the run."""
    dense: bool
    """Whether it can be made for the residual stream itself."""
    help: str
    """What the command does, and what the report calls it."""
    explained: bool = False
    """Whether its results show explanations of latents."""
    reads_store: bool = False
    """Whether it reads the activations that the run was trained on, beside labelled texts or instead of them."""
    version: int = 1
    """Raised when its numbers are computed in another way: results of an older version are made again."""
    compared: bool = False
    """Whether its picture shows the results beside it, too, some of which are made later."""
    answers: str = ""
    """Its setting that names a language model which is asked, if it has one."""
    module: str = ""
    """Where `measure` and `draw` are; by default tsae.experiments.NAME.experiment."""


EXPERIMENTS = {
    "probe": Experiment(
        "probing", True, True, "probe feature activations for semantics, context and syntax", version=2, compared=True
    ),
    "tsne": Experiment("tsne", True, True, "map feature activations with t-SNE, coloured by three labels"),
    "sequences": Experiment(
        "sequences", True, False, "follow latents over passages spliced into one context", explained=True
    ),
    "align": Experiment("alignment", True, False, "compare latents on chosen and rejected responses", explained=True),
    "steer": Experiment(
        "steering", True, False, "generate text while a latent is held up", explained=True, answers="judge"
    ),
    "explain": Experiment(
        "autointerp",
        False,
        False,
        "explain latents with a language model, and score that",
        reads_store=True,
        answers="answers",
    ),
    "features": Experiment(
        "features", False, False, "make one page with all latents of a run", explained=True, reads_store=True, version=2
    ),
}
"""Command → experiment. Its settings are the section experiments.NAME, if config/experiments.py has one."""


def module_of(name: str) -> ModuleType:
    """The module that measures and draws the experiment `name`."""
    return import_module(_module(name))


def require_possible(name: str, config: RunConfig, where: str, dict_size: int | None = None) -> None:
    """Refuse, before anything is read or trained, what the settings alone rule out. Raises TsaeError.

    `dict_size` is that of a dictionary to be trained; of one that is there `measure` knows its own.
    """
    if config.without_text:
        raise TsaeError(
            f"{where}: {name}: the run is trained on {config.without_text}, without text to experiment with"
        )
    settings = settings_of(config, name)
    if dict_size is not None and hasattr(settings, "require_possible"):
        settings.require_possible(where, dict_size)
    if hasattr(settings, "dataset"):
        from tsae.data.labelled import require_there

        require_there(settings.dataset, f"{where}: experiments.{name}.dataset:")
    if EXPERIMENTS[name].answers:
        answers = getattr(settings, EXPERIMENTS[name].answers)
        answers.require_whole(f"{where}: experiments.{name}.{EXPERIMENTS[name].answers}")


def declare_measures() -> None:
    """Import the experiments' folders, whose `__init__` says what their headline measures are; nothing heavy."""
    for folder in (_module(name).rpartition(".")[0] for name in EXPERIMENTS):
        if folder:
            import_module(folder)


def _module(name: str) -> str:
    return EXPERIMENTS[name].module or f"tsae.experiments.{name}.experiment"


def settings_of(config: RunConfig, name: str) -> Any:
    """The experiment's own section of the settings; None for one without."""
    return getattr(config.experiments, name, None)
