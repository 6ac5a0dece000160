"""Every number in a configuration has a bound beside its field, or stands here with the reason for which it has none."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin

import pytest

from tsae.config import run as configuration
from tsae.config import schema
from tsae.config.bounds import Bound
from tsae.config.run import RunConfig
from tsae.runtime.errors import TsaeError
from tsae.sweep.cluster import Cluster
from tsae.sweep.sweepfile import SweepConfig

ANY_NUMBER = {
    "sae.group_fractions": "positive and of sum 1, which the whole list is checked for",
    "objective.group_weights": "as many as groups, which is checked together with them",
}


def numbers(cls: type = RunConfig, path: str = "") -> Iterator[tuple[str, list[Bound]]]:
    """Every setting that is or holds a number, and its bounds."""
    for name, hint in schema.type_hints(cls).items():
        dotted = f"{path}.{name}" if path else name
        if dataclasses.is_dataclass(hint):
            yield from numbers(hint, dotted)  # type: ignore[arg-type]
            continue
        leaves, bounds = parts(hint)
        if {int, float} & leaves:
            yield dotted, bounds


def parts(hint: Any) -> tuple[set[Any], list[Bound]]:
    if get_origin(hint) is None:
        return {hint}, []
    own = [mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Bound)]
    inner = [parts(part) for part in (get_args(hint)[:1] if get_origin(hint) is Annotated else get_args(hint))]
    return set().union(*(leaves for leaves, _ in inner)), own + [bound for _, bounds in inner for bound in bounds]


@pytest.mark.parametrize("cls", [Cluster, SweepConfig])
def test_every_number_of_sweeps_and_sites_has_a_bound(cls):
    found = dict(numbers(cls))
    assert found
    assert all(found.values()), found


def test_every_number_has_a_bound_or_a_reason():
    unbounded = {path for path, bounds in numbers() if not bounds}
    assert unbounded == set(ANY_NUMBER)
    assert len(list(numbers())) > 100


@pytest.mark.parametrize("path", [path for path, bounds in numbers() if bounds])
def test_an_impossible_number_is_one_line_that_names_its_key(path):
    default = configuration.RunConfig()
    for name in path.split("."):
        default = getattr(default, name)
    for wrong in (-1, -(10**30)):
        value = [wrong] * max(1, len(default)) if isinstance(default, tuple) else wrong
        with pytest.raises(TsaeError) as refused:
            configuration.from_mapping(configuration.lay_over({}, {path: value}), "here.yaml")
        line = str(refused.value)
        assert line.startswith(f"here.yaml: {path}")
        assert " is impossible; " in line


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("experiments.probe.seeds", 0),
        ("experiments.steer.tokens", -3),
        ("experiments.probe.features", [1, 0]),
        ("experiments.probe.gap", 0),
        ("experiments.align.pairs", 19),
        ("experiments.sequences.texts", ["one text"]),
        ("experiments.sequences.splices", 9),
        ("experiments.steer.bootstrap", 99),
        ("experiments.steer.tokens", 3),
        ("experiments.steer.multiples", [1, -0.5]),
        ("experiments.steer.coherence", 1.5),
        ("experiments.probe.features", []),
        ("experiments.explain.answers.tries", 0),
        ("experiments.steer.judge.timeout", 0),
        ("synthetic.switch", [0.5, 0]),
        ("training.save_steps", [-1]),
        ("sae.split_fraction", 1.0),
    ],
)
def test_siblings_are_refused_too(path, value):
    with pytest.raises(TsaeError, match=r"is impossible;"):
        configuration.from_mapping(configuration.lay_over({}, {path: value}), "here.yaml")
