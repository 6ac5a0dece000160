"""Stages to job arrays: which stages are submitted with one call, and what each array waits for."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tsae.sweep.cluster import Cluster
from tsae.sweep.resources import StageResources
from tsae.sweep.schedulers.base import Inputs
from tsae.sweep.stage import Stage


@dataclass(eq=False)
class Array:
    """Stages of one kind that ask for the same resources and wait for the same jobs."""

    kind: str
    resources: StageResources
    stages: list[Stage]
    one_by_one: list[Array] = field(default_factory=list)
    """Arrays of which each element is what the element of the same number here waits for."""
    elements: list[Element] = field(default_factory=list)
    """Elements of other arrays that all of this one waits for."""
    jobs: list[str] = field(default_factory=list)
    """Jobs of an earlier launch that all of this one waits for."""

    @property
    def is_free(self) -> bool:
        """Whether it waits for nothing."""
        return not (self.one_by_one or self.elements or self.jobs)

    def inputs(self, id_of: Mapping[Array, str]) -> Inputs:
        """What its jobs wait for; `id_of` gives the ids of the arrays that were submitted before."""
        chosen: list[str] = []
        for array, indices in self._by_array():
            whole = len(indices) == len(array.stages)
            chosen += [id_of[array]] if whole else [f"{id_of[array]}_{index}" for index in indices]
        return Inputs(
            one_by_one=tuple(id_of[array] for array in self.one_by_one),
            jobs=(*chosen, *self.jobs),
            however_they_end=self.stages[0].after_failures,
        )

    def _by_array(self) -> Iterable[tuple[Array, list[int]]]:
        found: dict[Array, list[int]] = defaultdict(list)
        for array, index in self.elements:
            found[array].append(index)
        return found.items()


Element = tuple[Array, int]


def to_arrays(
    stages: Sequence[Stage], cluster: Cluster, max_array: int, alive: Mapping[str, str] | None = None
) -> list[Array]:
    """Few arrays in which every stage waits for its own inputs only, in an order in which they can be submitted.

    `stages` come after their inputs; `alive` gives the jobs of inputs that an earlier launch has submitted.
    """
    place: dict[str, Element] = {}
    arrays: list[Array] = []
    for kind in dict.fromkeys(stage.kind for stage in stages):
        members = [stage for stage in stages if stage.kind == kind]
        for group in _groups(members, cluster, place, alive or {}):
            for first in range(0, len(group), max_array):
                part = group[first : first + max_array]
                array = _connected(part, cluster, place, alive or {})
                arrays.append(array)
                place |= {stage.key: (array, index) for index, stage in enumerate(array.stages)}
    return arrays


def _groups(
    stages: Sequence[Stage], cluster: Cluster, place: Mapping[str, Element], alive: Mapping[str, str]
) -> list[list[Stage]]:
    """Stages that can share an array: the same resources, and the same inputs or inputs of the same numbers."""
    uses = Counter(key for stage in stages for key in stage.depends_on)
    groups: dict[tuple[object, ...], list[Stage]] = defaultdict(list)
    for stage in stages:
        inputs = [place[key] for key in stage.depends_on if key in place and uses[key] == 1]
        shared = sorted(key for key in stage.depends_on if (key in place and uses[key] > 1) or key in alive)
        resources = str(cluster.resources_of(stage.kind, stage.resources))
        arrays = tuple(sorted(id(array) for array, _ in inputs))
        groups[(resources, arrays, tuple(shared))].append(stage)
    cut: list[list[Stage]] = []
    for group in groups.values():
        group.sort(key=lambda stage: [place[key][1] for key in stage.depends_on if key in place and uses[key] == 1])
        whole = all(_is_whole(group, array, place) for array in _arrays_used_once(group, place, uses))
        cut += [group] if whole else [[stage] for stage in group]
    return cut


def _arrays_used_once(stages: Sequence[Stage], place: Mapping[str, Element], uses: Counter[str]) -> set[Array]:
    return {place[key][0] for stage in stages for key in stage.depends_on if key in place and uses[key] == 1}


def _is_whole(stages: Sequence[Stage], array: Array, place: Mapping[str, Element]) -> bool:
    """Whether element i of `array` is what the i-th of `stages` waits for, and nothing is left over."""
    indices = [
        [place[key][1] for key in stage.depends_on if key in place and place[key][0] is array] for stage in stages
    ]
    return indices == [[index] for index in range(len(array.stages))]


def _connected(stages: list[Stage], cluster: Cluster, place: Mapping[str, Element], alive: Mapping[str, str]) -> Array:
    array = Array(stages[0].kind, cluster.resources_of(stages[0].kind, stages[0].resources), stages)
    above = list(dict.fromkeys(place[key] for stage in stages for key in stage.depends_on if key in place))
    for other in dict.fromkeys(other for other, _ in above):
        if len(stages) > 1 and _is_whole(stages, other, place):
            array.one_by_one.append(other)
        else:
            array.elements += [element for element in above if element[0] is other]
    array.jobs = list(dict.fromkeys(alive[key] for stage in stages for key in stage.depends_on if key in alive))
    return array
