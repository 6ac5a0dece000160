"""The configuration of one run: what to read, what to train, what to measure.

A run is one YAML file; the resolved file and its hash lie beside every output.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tsae.config import schema
from tsae.config.experiments import ExperimentsConfig
from tsae.config.paths import Located, as_written, located, restored
from tsae.config.sections import (
    KIND_SETTINGS,
    OBJECTIVE_PRESETS,
    PAIR_RULE_SETTINGS,
    TERM_SETTINGS,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    ObjectiveConfig,
    SaeConfig,
    StoreConfig,
    TrainingConfig,
    parse_pair_rule,
)
from tsae.config.splits import check_splits, empty_split, fills_both
from tsae.config.synthetic import SYNTHETIC_PRESETS, SyntheticConfig
from tsae.runtime import contents, metadata
from tsae.runtime.environment import expanded, home
from tsae.runtime.errors import TsaeError, suggestion

PRESETS = {"objective": OBJECTIVE_PRESETS, "synthetic": SYNTHETIC_PRESETS}
"""Sections with presets, the default one first."""

PAGE = """
# Settings

Every setting of a run, made by `tsae settings --markdown`. In a run's YAML `sae.k` is the key `k` of the section `sae`; in a sweep's
grid, and on a command line (`sae.k=40`), it is written with its whole path. `tsae settings CONFIG sae.k=40` prints what a run would
be made with. A value that cannot be is refused before anything starts.

Two sections take the name of a preset in place of their keys, such as `objective=reference`; keys given beside it come on top.
{presets}. The defaults below are those of the first.
"""

SYNTHETIC = "synthetic"
"""The value of `data.source` that stands for a synthetic world."""
STORED = "store"
"""The value of `data.source` that stands for the activations in the store that is at `store.path`, whatever made them."""


MAX_NORM_MULTIPLE = 6.0
"""What `data.max_norm_multiple: auto` means. Of 642,620 tokens of SmolLM2-135M none reaches 4.3 times the median norm in block 9;
in block 15, 124 are above 6 times and 115 of them above 20 times (up to 174). Those of Gemma-3-270M stand at 9.1 times."""


class Counted(NamedTuple):
    """Which positions of a store are trained on and measured, of those that belong to a document."""

    skip_positions: int = 0
    """Leading positions of each context that do not count."""
    max_norm_multiple: float | None = None
    """Positions with a larger multiple of the median norm do not count."""
    exclude_tokens: tuple[int, ...] = ()
    """Tokens that do not count."""

    @property
    def all_tokens(self) -> bool:
        """Whether no token is left out for its norm or its id."""
        return self.max_norm_multiple is None and not self.exclude_tokens


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything one run depends on."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The language model."""
    data: DataConfig = field(default_factory=DataConfig)
    """The text."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    """The world that takes the place of model and text when `data.source` is `synthetic`."""
    store: StoreConfig = field(default_factory=StoreConfig)
    """The activation store."""
    sae: SaeConfig = field(default_factory=SaeConfig)
    """The dictionary."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """The training objective."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Optimisation."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Measures."""
    experiments: ExperimentsConfig = field(default_factory=ExperimentsConfig)
    """The paper's experiments on the trained dictionary."""

    @property
    def normalize(self) -> str:
        """How activations are scaled, and whether centred, for training."""
        if self.training.normalize != "auto":
            return self.training.normalize
        relative = "centred" if self.objective.preset == "predictive" else "unit_rms"
        return relative if self._relative_errors else "none"

    @property
    def pair_rule(self) -> str:
        """Which token is whose partner."""
        if self.training.pair_rule != "auto":
            return self.training.pair_rule
        return "within:16" if TERM_SETTINGS[self.objective.temporal].predicts else "previous"

    @property
    def counted(self) -> Counted:
        """Which positions are trained on and measured."""
        data, most = self.data, self.data.max_norm_multiple
        if most == "auto":
            most = None if self.objective.preset in ("reference", "paper") else MAX_NORM_MULTIPLE
        return Counted(data.skip_positions, None if self.is_synthetic else most, data.exclude_tokens)

    @property
    def bias_lr(self) -> float:
        """Learning rate of the biases relative to that of the weight matrices."""
        if self.training.bias_lr is not None:
            return self.training.bias_lr
        return 0.3 if self._relative_errors else 1.0

    @property
    def clip_norm(self) -> float:
        """Bound on the gradient's norm."""
        if self.training.clip_norm is not None:
            return self.training.clip_norm
        return 0.005 if self._relative_errors else 1.0

    @property
    def _relative_errors(self) -> bool:
        """Whether reconstruction errors are divided by the variance."""
        return self.objective.reconstruction == "variance" and not KIND_SETTINGS[self.sae.kind].penalised

    @property
    def is_synthetic(self) -> bool:
        """Whether the activations are those of a synthetic world: no language model is read."""
        return self.data.source == SYNTHETIC

    @property
    def is_stored(self) -> bool:
        """Whether the activations are those of a store from elsewhere: no language model is read."""
        return self.data.source == STORED

    @property
    def without_text(self) -> str:
        """In words, what a run without text and language model is trained on; nothing of one that has them."""
        return "a synthetic world" if self.is_synthetic else "stored activations" if self.is_stored else ""

    @cached_property
    def training_hash(self) -> str:
        """Hash of what decides the trained dictionary; a launcher of many runs asks for it again and again."""
        return schema.stable_hash(training_settings(self))

    @cached_property
    def evaluation_hash(self) -> str:
        """Hash of what decides eval_results.json."""
        return schema.stable_hash(evaluation_settings(self))


def load(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """The run described by a YAML file, such as a run folder's resolved.yaml, and `section.key=value` overrides."""
    tree = read(path)
    if "training_hash" in tree:  # the first line of a resolved.yaml
        tree = schema.to_plain(load_resolved(Path(path), used=("evaluation",)))
    extra = parse_overrides(overrides or [])
    # Overrides are checked on their own first, so that an error names the command line, not the file.
    check_part(extra, "command line")
    config = from_mapping(lay_over(tree, extra), str(path))
    refuse_without_effect(config, extra, "command line")
    return config


def load_resolved(path: Path, used: Sequence[str] = ()) -> RunConfig:
    """The configuration that a run folder's resolved.yaml records, perhaps written by another version of tsae.

    What this version does not know is left out where it decides nothing: a setting of evaluation or experiments, or one
    without which the training hash is the recorded one. Raises TsaeError for one that decided the training, and for one
    in the sections that the caller has `used`, such as `evaluation` or `experiments.probe`.
    """
    tree = read(path)
    recorded = tree.pop("training_hash", None)
    schema.add_neutral(RunConfig, tree)
    unknown = schema.drop_unknown(RunConfig, tree)
    config = from_mapping(tree, str(path))
    wanted = [key for key in unknown if key.startswith(tuple(f"{section}." for section in used))]
    if wanted:
        raise TsaeError(f"{path}: {wanted[0]}: unknown key; another version of tsae wrote it, measure with that one")
    deciding = [key for key in unknown if key.partition(".")[0] not in ("evaluation", "experiments")]
    if deciding and config.training_hash != recorded:
        raise TsaeError(
            f"{path}: {deciding[0]}: unknown key; it decided this training, which another version of tsae made; "
            "read the run with that version"
        )
    if recorded not in (None, config.training_hash):
        raise TsaeError(f"{path}: its settings are not those of its training_hash; restore the file from a copy")
    return config


def earlier_meanings(config: RunConfig) -> Iterator[RunConfig]:
    """`config` with what it leaves open as earlier versions took it, for runs that were begun with those.

    `objective` was `scale_free`, and no token was left out.
    """
    changed: dict[str, dict[str, Any]] = {}
    if config.data.max_norm_multiple == "auto":
        changed["data"] = {"max_norm_multiple": None}
    if config.objective.preset == "predictive":
        was, now = dataclasses.asdict(ObjectiveConfig()) | OBJECTIVE_PRESETS["scale_free"], ObjectiveConfig()
        open_still = {
            name: value for name, value in was.items() if getattr(config.objective, name) == getattr(now, name)
        }
        changed["objective"] = {**open_still, "preset": "scale_free"}
    if changed:
        yield replace(config, **changed)


WRITTEN = "written"
"""The key of a resolved file that has the words in which its paths were given, by key path."""


def read(path: str | Path, folder: Path | None = None) -> dict[str, Any]:
    """The tree of settings in a YAML file, its paths absolute; relative ones mean `folder`, by default the file's."""
    tree = schema.read_yaml(path)
    if tree.pop(metadata.DIGEST, None) is not None and (wrong := metadata.yaml_fault(Path(path).read_text("utf-8"))):
        raise TsaeError(f"{path}: {wrong}")
    written = schema.convert(dict[str, Any], tree.pop(WRITTEN, {}), str(path), WRITTEN)
    places, folder = schema.places(RunConfig), folder or Path(path).absolute().parent
    for key, value in list(schema.flatten(tree)):
        if key in written:
            schema.put(tree, key, restored(value, written[key]))
        elif key in places:
            schema.put(tree, key, located(value, folder, places[key]))
    return tree


def locate(flat: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Settings by key path with their paths absolute; relative ones mean `folder`."""
    places = schema.places(RunConfig)
    return {key: located(value, folder, places[key]) if key in places else value for key, value in flat.items()}


def parse_overrides(assignments: list[str], folder: Path | None = None) -> dict[str, Any]:
    """`section.key=value` of a command line by key path; relative paths mean the working directory, or `folder`."""
    return locate(schema.parse_overrides(assignments), folder or Path.cwd())


def to_yaml(config: RunConfig) -> dict[str, Any]:
    """`config` as the tree of a resolved file, from which `read` makes the same one wherever it lies."""
    tree = schema.to_plain(config)
    given = {key: value for key, value in schema.flatten(tree) if key in schema.places(RunConfig) and _moved(value)}
    words = {
        key: [*map(as_written, value)] if isinstance(value, list) else as_written(value) for key, value in given.items()
    }
    return {**tree, WRITTEN: words} if words else tree


def _moved(value: Any) -> bool:
    return any(isinstance(item, Located) for item in (value if isinstance(value, list) else [value]))


def lay_over(tree: dict[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Lay settings by key path over a tree, in place, whatever their order.

    A preset's name stands for the section that it fills: `objective=reference` takes the place of all that the tree says
    of the objective, and `objective.temporal_alpha=1` beside it comes on top.
    """
    for name in PRESETS:
        if isinstance(tree.get(name), str):
            tree[name] = {"preset": tree[name]}
        if name in asked:
            tree[name] = {"preset": asked[name]}
    for path, value in asked.items():
        if path not in PRESETS:
            schema.put(tree, path, value)
    return tree


def check_part(asked: Mapping[str, Any], where: str) -> None:
    """Refuse settings by key path that no run can have, whatever stands below them. Raises TsaeError."""
    for name in PRESETS:
        if name in asked and f"{name}.preset" in asked:
            raise TsaeError(f"{where}: {name}.preset: {name} names a preset too; give one of them")
    refuse_without_effect(_build(lay_over({}, asked), where), asked, where)


def refuse_without_effect(config: RunConfig, asked: Mapping[str, Any], where: str) -> None:
    """Refuse settings that were asked for and that another one, asked for or of the base, takes all effect from.

    What only a base or a resolved.yaml says of them is passed over: it may be laid over, or be a default.
    """
    sae, steer, sequences = config.sae, config.experiments.steer, config.experiments.sequences
    made = ("max_documents", "max_tokens", "min_length", "packing", "holdout", "seed")
    shadowed = {
        **{f"data.{name}": ("data.source: store, whose contexts are made", config.is_stored) for name in made},
        "sae.split_fraction": ("sae.group_fractions", sae.group_fractions is not None),
        "experiments.steer.choose": ("experiments.steer.latents", bool(steer.latents)),
        "experiments.steer.max_concepts": ("experiments.steer.concepts", bool(steer.concepts)),
        "experiments.sequences.labels": ("experiments.sequences.texts", bool(sequences.texts)),
    }
    for key, (other, given) in shadowed.items():
        if given and key in asked:
            raise TsaeError(f"{where}: {key}: it has no effect beside {other}; leave one of them out")


def from_mapping(tree: Mapping[str, Any], where: str) -> RunConfig:
    """A validated RunConfig; `where` names the source in errors."""
    config = _build(tree, where)
    config = _by_block(config)
    _validate(config, where)
    training = config.training
    if training.init_from is not None and training.init_sha256 is None:
        weights = initial_weights(training.init_from, f"{where}: training.init_from")
        config = replace(config, training={"init_sha256": contents.sha256_of(weights)})
    return config


def _by_block(config: RunConfig) -> RunConfig:
    """With a residual stream that is named as TransformerLens does by its block: one place is one store, however called."""
    hook = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(post|pre)", config.model.hook_point or "")
    block = int(hook[1]) - (hook[2] == "pre") if hook else -1
    return config if block < 0 else replace(config, model={"layer": block, "hook_point": None})


def initial_weights(name: str, where: str) -> Path:
    """The weights file of the run that `training.init_from` names. Raises TsaeError if there is none."""
    folder = expanded(name)
    for place in (folder, folder / "trainer_0", home() / "checkpoints" / name / "trainer_0"):
        if (place / "ae.pt").is_file():
            return place / "ae.pt"
    raise TsaeError(
        f"{where}: {name}: no ae.pt is here, nor in a trainer_0/, nor in a run of that name under {home() / 'checkpoints'}; "
        "a dictionary of another library or of the hub becomes a run by `tsae import`"
    )


def _build(tree: Mapping[str, Any], where: str) -> RunConfig:
    tree = dict(tree)
    for name, presets in PRESETS.items():
        if name in tree:
            tree[name] = _with_preset(name, presets, tree[name], where)
    return schema.build(RunConfig, tree, where)


def _with_preset(name: str, presets: Mapping[str, dict[str, Any]], section: Any, where: str) -> Any:
    """Section `name` with what its preset, the first one by default, says of keys that are not given."""
    if isinstance(section, str):
        section = {"preset": section}
    if not isinstance(section, Mapping):
        return section
    preset = section.get("preset", next(iter(presets)))
    if not isinstance(preset, str) or preset not in presets:
        raise TsaeError(
            f"{where}: {name}.preset: {preset!r} is not allowed; {suggestion(preset, presets)}"
            f"allowed: {', '.join(presets)}"
        )
    return {**presets[preset], **section}


def _validate(config: RunConfig, where: str) -> None:
    """Refuse settings that are possible each and not together; what is impossible by itself, its field has refused."""

    def check(path: str, possible: bool, allowed: str) -> None:
        if not possible:
            section, name = path.split(".")
            value = getattr(getattr(config, section), name)
            shown = list(value) if isinstance(value, tuple) else value
            raise TsaeError(f"{where}: {path}: {shown} is impossible; {allowed}")

    model, sae, objective, training, data = config.model, config.sae, config.objective, config.training, config.data
    check(
        "model.max_memory", model.max_memory is None or model.device_map is not None, "it needs model.device_map: auto"
    )
    check("sae.k", sae.k <= sae.dict_size, f"at most sae.dict_size ({sae.dict_size}) latents can be active")
    shares = sae.group_fractions
    check(
        "sae.group_fractions",
        shares is None or (all(share > 0 for share in shares) and abs(sum(shares) - 1) < 1e-6),
        "positive fractions that sum to 1 are allowed",
    )
    check("sae.dict_size", min(sae.group_sizes) > 0, f"group sizes {sae.group_sizes} leave a group empty")

    weights, groups = objective.group_weights, len(sae.fractions)
    if not isinstance(weights, str):
        check(
            "objective.group_weights",
            len(weights) == groups,
            f"one weight for each of the {groups} groups is expected",
        )
        check(
            "objective.group_weights",
            min(weights) >= 0 and max(weights) > 0,
            "weights of at least 0, not all of them 0, are expected",
        )
    check(
        "objective.same_document",
        objective.same_document or TERM_SETTINGS[objective.temporal].contrastive,
        "only objective.temporal: contrastive can leave them out",
    )
    kind = KIND_SETTINGS[sae.kind]
    if kind.temporal:
        apart = (training.selection == "local" and training.processes) or 1
        check_splits(sae, objective, training.batch_size // apart, check)
    check(
        "objective.target_l0",
        objective.target_l0 is None or objective.target_l0 <= sae.dict_size,
        f"a number above 0 and at most sae.dict_size ({sae.dict_size}) is allowed",
    )

    steps = training.steps
    check(
        "training.init_sha256",
        training.init_from is not None or training.init_sha256 is None,
        "it is the content of what training.init_from names, and that is not given",
    )
    check(
        "training.warmup_steps",
        training.warmup_steps is None or training.warmup_steps < steps,
        f"training ends after {steps}",
    )
    check(
        "training.save_steps",
        all(step < steps for step in training.save_steps),
        f"steps from 0 to {steps - 1} are allowed",
    )
    check(
        "training.decay_start",
        training.decay_start is None or training.warmup < training.decay_start < steps,
        f"it must lie after training.warmup_steps ({training.warmup}) and before training.steps ({steps})",
    )
    if kind.needs_threshold:
        start = training.threshold_start_step
        check(
            "training.threshold_start_step",
            start is None or start < steps - 1,
            f"the threshold must be tracked before the last of training.steps ({steps}), or the dictionary has none",
        )
    rule, _ = parse_pair_rule(config.pair_rule, f"{where}: training.pair_rule")
    if kind.temporal:
        *most, last = [
            f"{name}:N" if settings.numbered else name
            for name, settings in PAIR_RULE_SETTINGS.items()
            if settings.paired
        ]
        needed = f"a temporal SAE needs pairs: {', '.join(most)} or {last}"
        check("training.pair_rule", PAIR_RULE_SETTINGS[rule].paired, needed)
        check("training.batch_size", training.batch_size > 1, "a T-SAE needs at least 2 pairs")
    check(
        "training.batch_size",
        training.batch_size > 1 or not config._relative_errors,
        "a single token has no variance for objective.reconstruction: variance to divide by; squared_error has no need",
    )

    length = data.context_length
    check(
        "data.skip_positions",
        data.skip_positions < length - 1,
        f"at least two positions of the context of {length} must remain",
    )
    check(
        "data.exclude_tokens",
        not (config.is_synthetic and data.exclude_tokens),
        "a synthetic world has no tokens",
    )
    check("data.min_length", data.min_length <= length, f"it may be at most data.context_length ({length})")

    if config.is_stored and config.store.path is None:
        raise TsaeError(f"{where}: store.path: missing; data.source: {STORED} trains on the store that it names")
    check("store.window", not (config.is_stored and config.store.window), "nothing can make what has left it again")

    world = config.synthetic
    scales = len(world.switch)
    for name in ("n_slow", "k_slow"):
        even = getattr(world, name) % scales == 0
        check(f"synthetic.{name}", even, f"it is shared out evenly among {scales} time scales")
    check("synthetic.k_slow", world.k_slow <= world.n_slow, f"there are only {world.n_slow} slow features")
    check("synthetic.k_fast", world.k_fast <= world.n_fast, f"there are only {world.n_fast} fast features")

    steer = config.experiments.steer
    if not steer.prompts and not steer.text_prompts:
        raise TsaeError(f"{where}: experiments.steer.prompts: empty, and text_prompts is 0; nothing can be continued")


def require_processes(config: RunConfig, world: int) -> None:
    """Refuse to train by `world` processes: another number than was asked for, or one that does not fit.

    Raises TsaeError. A launcher that starts fewer than it was told to, and says nothing, is caught here.
    """
    settings = config.training
    if settings.processes not in (None, world):
        raise TsaeError(
            f"training.processes: {settings.processes} were asked for, but {world} {'is' if world == 1 else 'are'} "
            f"training; start it with: torchrun --nproc-per-node {settings.processes} -m tsae.cli train ..."
        )
    if world > 1 and settings.engine == "dense" and not KIND_SETTINGS[config.sae.kind].penalised:
        raise TsaeError(f"training.engine: dense works in one process, not in {world}; use sparse")
    if settings.batch_size % world:
        nearest = max(1, round(settings.batch_size / world)) * world
        raise TsaeError(
            f"training.batch_size: {settings.batch_size} cannot be shared by {world} processes; use a multiple, "
            f"such as {nearest}"
        )
    sae, objective, share = config.sae, config.objective, settings.batch_size // world
    if KIND_SETTINGS[sae.kind].temporal and settings.selection == "local" and not fills_both(sae, objective, share):
        raise TsaeError(
            f"objective.high_share: {objective.high_share} is impossible with training.selection: local in {world} "
            f"processes; {empty_split(sae, share)}"
        )


def group_weights(config: RunConfig) -> tuple[float, ...]:
    """Weight of each nested reconstruction, before they are combined."""
    fractions, chosen = config.sae.fractions, config.objective.group_weights
    n = len(fractions)
    named = {"fractions": fractions, "uniform": (1 / n,) * n, "ones": (1.0,) * n}
    return named[chosen] if isinstance(chosen, str) else chosen


def store_settings(config: RunConfig) -> dict[str, Any]:
    """The part of a configuration that decides the content of the activation store."""
    if config.is_stored:  # which of them, a run's binding to its data says
        return {"data": {"source": STORED}, "store": {}}
    world = config.is_synthetic
    plain = _plain(config, ("data", "store", "synthetic" if world else "model"))
    del plain["store"]["path"]
    if config.store.window is not None:
        plain["store"]["window"] = "all"  # whatever its size, the numbers are the same
    if world:
        plain["data"] = {name: plain["data"][name] for name in ("source", "context_length", "holdout", "seed")}
        return plain
    for name in ("device", "device_map", "max_memory", "batch_size"):
        plain["model"].pop(name, None)
    for name in Counted._fields:
        plain["data"].pop(name, None)
    return plain


def text_settings(config: RunConfig) -> dict[str, Any]:
    """What decides a forward pass over the text: stores that agree in it can be written together."""
    plain = store_settings(config)
    if config.without_text:
        return {**plain, "path": str(config.store.path)}
    plain["model"] |= {"layer": None, "hook_point": None}
    model = config.model
    return {**plain, "on": [model.device, model.device_map, model.max_memory], "batch_size": model.batch_size}


def left_out_settings(config: RunConfig) -> dict[str, Any]:
    """Which positions do not count, as hashes and files have it: without what came later and leaves nothing out."""
    counted = config.counted
    left_out = {"max_norm_multiple": counted.max_norm_multiple, "exclude_tokens": list(counted.exclude_tokens)}
    return {"skip_positions": counted.skip_positions, **{name: value for name, value in left_out.items() if value}}


def _plain(config: RunConfig, sections: Iterable[str]) -> dict[str, Any]:
    """Some sections as hashes see them; a plan of a thousand runs would wait for all of them."""
    return {name: schema.identity(getattr(config, name)) for name in sections}


def reading_settings(config: RunConfig) -> dict[str, Any]:
    """What decides the batches a run reads: runs that agree in it can share one process."""
    names = ("batch_size", "seed", "pool_sequences", "device", "precision")
    reading = {"pair_rule": config.pair_rule, **{name: getattr(config.training, name) for name in names}}
    return {
        **store_settings(config),
        **reading,
        **left_out_settings(config),
        "path": config.store.path,
    }


def training_settings(config: RunConfig) -> dict[str, Any]:
    """The part that decides a trained dictionary: everything but evaluation and where things run."""
    apart = {"model", "data", "synthetic", "store", "evaluation", "experiments"}
    others = (section.name for section in dataclasses.fields(config) if section.name not in apart)
    plain = {**store_settings(config), **_plain(config, others)}
    plain["data"] |= left_out_settings(config)
    plain["training"]["pair_rule"] = config.pair_rule
    places = ("init_from", "device", "processes", "shard", "trackers", "wandb_project", "wandb_entity")
    for name in (*places, "resume_every", "resume_minutes", "resume_keep", "keep_state", "pack", "cuda_graphs"):
        plain["training"].pop(name, None)
    return plain


def evaluation_settings(config: RunConfig) -> dict[str, Any]:
    """The part that decides eval_results.json."""
    plain = {**training_settings(config), "evaluation": schema.identity(config.evaluation)}
    del plain["evaluation"]["batch_size"]
    return plain


def experiment_settings(config: RunConfig, name: str) -> dict[str, Any]:
    """The part that decides the results of experiment `name`."""
    own, texts = getattr(config.experiments, name, None), schema.identity(config.experiments.texts)
    identity = {} if own is None else schema.identity(own)  # an experiment may have no settings
    return {**training_settings(config), "experiment": identity, "texts": texts}


def help_text() -> str:
    """Every setting with its type, default and meaning."""
    return "\n".join(schema.describe(RunConfig)).strip()


def help_page() -> str:
    """The same as a page of the documentation."""
    presets = "; ".join(f"`{name}`: {', '.join(map('`{}`'.format, kinds))}" for name, kinds in PRESETS.items())
    return "\n".join([PAGE.format(presets=presets).strip(), *schema.describe_in_markdown(RunConfig)])


def replace(config: RunConfig, **sections: Mapping[str, Any]) -> RunConfig:
    """A copy with some fields of some sections changed: `replace(config, sae={"k": 40})`."""
    changed = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **changed)
