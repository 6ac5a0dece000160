"""Settings that cannot work: refused with the key path, the value, and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tsae.config.sections import KIND_SETTINGS, TERM_SETTINGS
from tsae.runtime.errors import TsaeError, suggestion

if TYPE_CHECKING:
    from tsae.config.run import RunConfig

POSITIVE = """model.batch_size data.max_documents data.max_tokens data.context_length data.min_length store.shard_mb
    sae.dict_size sae.k objective.temperature objective.bandwidth training.steps training.batch_size training.lr
    training.dead_after training.clip_norm training.pack training.processes training.pool_sequences training.log_every
    training.resume_minutes training.resume_keep
    evaluation.sequences evaluation.batch_size evaluation.loss_sequences"""
NOT_NEGATIVE = """model.layer data.skip_positions objective.temporal_alpha objective.auxk_alpha
    objective.sparsity_penalty objective.sparsity_warmup_steps training.warmup_steps training.resume_every training.bias_lr"""


def validate(config: RunConfig, where: str) -> None:
    """Raise TsaeError for the first setting of `config` that is impossible; `where` names its source."""
    check = _Check(config, where)
    for path in POSITIVE.split():
        check.at(path, lambda value: value is None or value > 0, "it must be greater than 0")
    for path in NOT_NEGATIVE.split():
        check.at(path, lambda value: value is None or value >= 0, "it must be at least 0")
    for path in ("training.seed", "data.seed"):
        check.at(path, lambda seed: 0 <= seed < 2**63, "a whole number from 0 to 2^63 - 1 is allowed")
    device = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
    check.at("model.device", lambda name: bool(device.fullmatch(name)), "allowed: auto, cpu, cuda, cuda:N, mps")
    check.at("model.name", lambda name: bool(name.strip()), "a hub id, a folder or 'embedded' is expected")
    _check_dictionary(config, check)
    _check_objective(config, check)
    _check_training(config, check, where)
    _check_data(config, check)
    if config.is_synthetic:
        _check_synthetic(config, check)


class _Check:
    """Looks at settings by key path."""

    def __init__(self, config: RunConfig, where: str) -> None:
        self._config, self._where = config, where

    def at(self, path: str, possible: Callable[[Any], bool], allowed: str) -> None:
        """Refuse the setting at `path` unless it is `possible`."""
        section, name = path.split(".")
        value = getattr(getattr(self._config, section), name)
        if not possible(value):
            shown = list(value) if isinstance(value, tuple) else value
            raise TsaeError(f"{self._where}: {path}: {shown} is impossible; {allowed}")


def _check_dictionary(config: RunConfig, check: _Check) -> None:
    size = config.sae.dict_size
    check.at("sae.k", lambda k: k <= size, f"at most sae.dict_size ({size}) latents can be active")
    check.at(
        "sae.group_fractions",
        lambda shares: shares is None or (all(share > 0 for share in shares) and abs(sum(shares) - 1) < 1e-6),
        "positive fractions that sum to 1 are allowed",
    )
    check.at("sae.split_fraction", lambda share: 0 < share < 1, "a fraction between 0 and 1 is allowed")
    sizes = config.sae.group_sizes
    check.at("sae.dict_size", lambda _: min(sizes) > 0, f"group sizes {sizes} leave a group empty")


def _check_objective(config: RunConfig, check: _Check) -> None:
    groups, size = len(config.sae.fractions), config.sae.dict_size
    check.at(
        "objective.group_weights",
        lambda weights: isinstance(weights, str) or len(weights) == groups,
        f"one weight for each of the {groups} groups is expected",
    )
    check.at(
        "objective.group_weights",
        lambda weights: isinstance(weights, str) or (min(weights) >= 0 and max(weights) > 0),
        "weights of at least 0, not all of them 0, are expected",
    )
    check.at(
        "objective.same_document",
        lambda kept: kept or TERM_SETTINGS[config.objective.temporal].contrastive,
        "only objective.temporal: contrastive can leave them out",
    )
    check.at(
        "objective.target_l0",
        lambda target: target is None or 0 < target <= size,
        f"a number above 0 and at most sae.dict_size ({size}) is allowed",
    )


def _check_training(config: RunConfig, check: _Check, where: str) -> None:
    warmup, steps = config.training.warmup, config.training.steps
    check.at("training.warmup_steps", lambda chosen: chosen is None or chosen < steps, f"training ends after {steps}")
    check.at(
        "training.save_steps",
        lambda chosen: all(0 <= step < steps for step in chosen),
        f"steps from 0 to {steps - 1} are allowed",
    )
    check.at(
        "training.decay_start",
        lambda start: start is None or warmup < start < steps,
        f"it must lie after training.warmup_steps ({warmup}) and before training.steps ({steps})",
    )
    kind = KIND_SETTINGS[config.sae.kind]
    if kind.needs_threshold:
        check.at(
            "training.threshold_start_step",
            lambda start: start is None or start < steps - 1,
            f"the threshold must be tracked before the last of training.steps ({steps}), or the dictionary has none",
        )
    check.at("training.threshold_beta", lambda beta: 0 <= beta < 1, "a decay in [0, 1) is allowed")
    parse_pair_rule(config.training.pair_rule, f"{where}: training.pair_rule")
    if kind.temporal:
        remedy = "a temporal SAE needs pairs: previous, random or within:N"
        check.at("training.pair_rule", lambda rule: rule != "none", remedy)
        check.at("training.batch_size", lambda size: size > 1, "a contrastive term needs at least 2 pairs")


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


def _check_data(config: RunConfig, check: _Check) -> None:
    length = config.data.context_length
    check.at("data.holdout", lambda share: 0 < share < 1, "a share between 0 and 1 is allowed")
    check.at(
        "data.skip_positions",
        lambda skipped: skipped < length - 1,
        f"at least two positions of the context of {length} must remain",
    )
    check.at("data.min_length", lambda least: least <= length, f"it may be at most data.context_length ({length})")


def _check_synthetic(config: RunConfig, check: _Check) -> None:
    world = config.synthetic
    scales = len(world.switch)
    for name in ["activation_dim", "n_slow", "k_slow", "n_fast", "k_fast", "scale"]:
        check.at(f"synthetic.{name}", lambda value: value > 0, "it must be greater than 0")
    for name in ["popularity", "jitter", "drift", "n_distractors", "noise"]:
        check.at(f"synthetic.{name}", lambda value: value >= 0, "it must be at least 0")
    for name in ["silence", "relatedness", "distractor_rate"]:
        check.at(f"synthetic.{name}", lambda value: 0 <= value <= 1, "a probability is allowed")
    check.at("synthetic.sequences", lambda n: n > 1, "one to train on and one to hold out are needed")
    check.at(
        "synthetic.switch",
        lambda rates: scales > 0 and all(0 < rate <= 1 for rate in rates),
        "probabilities above 0, one for each time scale, are allowed",
    )
    for name in ("n_slow", "k_slow"):
        check.at(f"synthetic.{name}", lambda n: n % scales == 0, f"it is shared out evenly among {scales} time scales")
    check.at("synthetic.k_slow", lambda k: k <= world.n_slow, f"there are only {world.n_slow} slow features")
    check.at("synthetic.k_fast", lambda k: k <= world.n_fast, f"there are only {world.n_fast} fast features")
    for name in ("slow_amplitude", "fast_amplitude"):
        check.at(
            f"synthetic.{name}",
            lambda ends: len(ends) == 2 and 0 < ends[0] <= ends[1],
            "two positive numbers, the smaller one first, are expected",
        )


def parse_pair_rule(rule: str, where: str = "pair_rule") -> tuple[str, int | None]:
    """`"within:8"` → `("within", 8)`; the other rules have no number. Raises TsaeError."""
    name, colon, number = rule.replace(" ", "").partition(":")
    if name == "within" and number.isdigit() and int(number) > 0:
        return name, int(number)
    if name in ("previous", "random", "none") and not colon:
        return name, None
    raise TsaeError(
        f"{where}: {rule!r} is not allowed; {suggestion(rule, ('previous', 'random', 'within:8', 'none'))}"
        "allowed: previous, random, within:N (N at least 1), none"
    )
