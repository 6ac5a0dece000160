"""Stages: merged where they are the same work, skipped where they are done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tsae.config import run as configuration
from tsae.evaluation.identity import made_from
from tsae.runtime.errors import TsaeError
from tsae.stages import harvest_stage


def finish(plan, point, **results):
    """Leave in the run folder of `point` what training and evaluation leave."""
    run = plan.run(point)
    run.claim(point.config)
    run.weights.write_bytes(b"weights")
    if results:
        content = {"made_from": made_from(point.config, run), **results}
        run.eval_results.write_text(json.dumps(content))


def kinds(stages):
    return [stage.kind for stage in stages]


def test_one_harvest_serves_all_points_that_read_the_same_activations(plan_of):
    plan = plan_of(grid={"sae.k": [8, 16], "training.pair_rule": ["previous", "random"]})
    assert kinds(plan.stages) == ["harvest"] + ["train"] * 4 + ["evaluate"] * 4
    assert plan.stages[0].points == tuple(point.name for point in plan.points)


def test_points_that_read_other_activations_harvest_their_own(plan_of):
    plan = plan_of(grid={"data.seed": [1, 2], "sae.k": [8, 16]})
    assert kinds(plan.stages).count("harvest") == 2
    assert len({stage.key for stage in plan.stages}) == len(plan.stages) == 10


def test_layers_of_one_text_are_one_harvest_until_only_one_is_missing(plan_of):
    small = {"data.max_tokens": 2000, "model.layer": 1, "model.device": "cpu"}
    asked = {"stages": ["harvest", "train"], "overrides": small}
    places = {"zip": {"model.layer": [1, 2, 2], "model.hook_point": [None, None, "gpt_neox.layers.2.mlp"]}}
    harvest, *trainings = plan_of(**places, **asked).stages
    assert len(harvest.config) == len(trainings) == 3
    assert harvest.subject.endswith(" and 2 more")
    assert all(train.depends_on == (harvest.key,) for train in trainings)
    harvest_stage(plan_of(grid={"sae.k": [4]}, **asked).points[0].config)
    first, rest, *_ = plan_of(**places, **asked).stages
    assert first.is_done()
    assert len(rest.config) == 2
    apart = plan_of(grid={"model.layer": [1, 2], "data.seed": [1, 2]}, resources={"harvest": {"jobs": 2}}, **asked)
    assert [len(stage.config) for stage in apart.stages if stage.kind == "harvest"] == [2, 2, 2, 2]


def test_two_sweeps_share_a_store_but_no_run(plan_of):
    one, other = (plan_of(file=file, grid={"sae.k": [8]}) for file in ("one", "other"))
    assert one.stages[0].key == other.stages[0].key
    assert one.stages[1].key != other.stages[1].key


def test_stages_depend_on_what_they_read(plan_of):
    harvest, train, evaluate = plan_of(grid={"sae.k": [8]}).stages
    assert (harvest.depends_on, train.depends_on) == ((), (harvest.key,))
    assert evaluate.depends_on == (harvest.key, train.key)


def test_experiments_that_show_explanations_wait_for_them(plan_of):
    experiments = ["sequences", "steer", "explain", "align", "features", "probe", "tsne"]
    plan = plan_of(grid={"sae.k": [8]}, stages=["harvest", "train", *experiments])
    (explain,) = (stage.key for stage in plan.stages if stage.kind == "explain")
    waiting = {stage.kind for stage in plan.stages if explain in stage.depends_on}
    assert waiting == {"sequences", "align", "steer", "features"}
    unexplained = plan_of(grid={"sae.k": [8]}, stages=["harvest", "train", "steer"])
    assert len(unexplained.stages[-1].depends_on) == 2


def test_what_is_complete_is_skipped(plan_of):
    plan = plan_of(grid={"sae.k": [8, 16]})
    assert len(plan.unfinished()) == 5
    finish(plan, plan.points[0], l0=8.0)
    assert [stage.label for stage in plan.unfinished()[1:]] == ["train k=16", "evaluate k=16"]
    finish(plan, plan.points[1])
    assert kinds(plan.unfinished()) == ["harvest", "evaluate"]


@pytest.mark.parametrize("pack", [1, 2])
def test_trainings_alone_are_told_to_go_on_inexactly(plan_of, pack):
    plan = plan_of(grid={"sae.k": [8, 16]}, overrides={"training": {"pack": pack}})
    inexact = plan.inexact()
    assert [stage.key for stage in inexact.stages] == [stage.key for stage in plan.stages]
    told = {stage.kind for stage, before in zip(inexact.stages, plan.stages, strict=True) if stage != before}
    assert told == {"train"}
    assert all(stage.arguments[-1] is True for stage in inexact.stages if stage.kind == "train")


def test_a_finished_sweep_needs_no_store(plan_of):
    plan = plan_of(grid={"sae.k": [8]})
    finish(plan, plan.points[0], l0=8.0)
    assert plan.unfinished() == []


def test_results_of_other_measuring_settings_are_made_again(plan_of):
    plan = plan_of(grid={"sae.k": [8]})
    finish(plan, plan.points[0], l0=8.0)
    plan = plan_of(grid={"sae.k": [8]}, overrides={"evaluation.sequences": 7})
    assert kinds(plan.unfinished()) == ["harvest", "evaluate"]


def test_a_run_folder_of_another_configuration_is_refused_with_the_difference(plan_of):
    plan = plan_of(grid={"sae.k": [8]})
    finish(plan, plan.points[0])
    with pytest.raises(TsaeError, match=r"training.steps is \d+ there, 77 here.*--name"):
        plan_of(grid={"sae.k": [8]}, overrides={"training.steps": 77})


def test_only_the_stages_asked_for_are_planned(plan_of):
    assert kinds(plan_of(grid={"sae.k": [8, 16]}, stages=["harvest"]).stages) == ["harvest"]


def test_jobs_read_configurations_that_say_exactly_what_the_point_is(plan_of, tmp_path):
    plan = plan_of(command_line=["objective=paper"], grid={"sae.k": [8, 16]})
    texts = plan.config_texts(list(plan.stages))
    assert set(texts) == {point.name for point in plan.points}
    for point, train in zip(plan.points, (s for s in plan.stages if s.kind == "train"), strict=True):
        path = Path(train.arguments_in(tmp_path)[0])
        path.write_text(texts[path.stem])
        assert configuration.load(path) == point.config


def test_a_harvest_may_be_shared_by_several_jobs(plan_of):
    plan = plan_of(grid={"sae.k": [8]}, resources={"harvest": {"jobs": 3}})
    *harvests, train, _evaluate = plan.stages
    assert [stage.arguments for stage in harvests] == [(0, 3), (1, 3), (2, 3)]
    assert train.depends_on == tuple(stage.key for stage in harvests)
    assert len({stage.lock for stage in harvests}) == len({stage.record for stage in harvests}) == 3


def test_the_jobs_of_one_harvest_are_done_when_their_own_shards_are(plan_of):
    small = {"synthetic.sequences": 300, "store.shard_mb": 1}
    asked = {"resources": {"harvest": {"jobs": 2}}, "stages": ["harvest"], "overrides": small}
    plan = plan_of(base="synthetic", grid={"sae.k": [5]}, **asked)
    first, second = plan.stages
    assert plan.unfinished() == [first, second]
    harvest_stage(plan.points[0].config, *first.arguments)
    assert plan.unfinished() == [second]
    harvest_stage(plan.points[0].config, *second.arguments)
    assert plan.unfinished() == []


def test_experiments_follow_training_and_those_that_show_explanations_follow_these(plan_of):
    asked = ["harvest", "train", "evaluate", "features", "explain", "probe", "report"]
    plan = plan_of(grid={"sae.k": [8]}, stages=asked)
    harvest, train, _evaluate, *experiments = plan.stages
    by_kind = {stage.kind: stage for stage in experiments}
    assert list(by_kind) == ["explain", "probe", "features"]
    assert by_kind["probe"].depends_on == by_kind["explain"].depends_on == (harvest.key, train.key)
    assert by_kind["features"].depends_on == (harvest.key, train.key, by_kind["explain"].key)
    report = plan.report()
    assert report.after_failures
    assert set(report.depends_on) == {stage.key for stage in plan.stages}
    finish(plan, plan.points[0], l0=8.0)
    assert kinds(plan.unfinished()) == ["harvest", "explain", "probe", "features"]


def test_a_store_that_is_read_by_nothing_unfinished_is_not_needed_but_training_alone_can_be_asked_for(plan_of):
    plan = plan_of(grid={"sae.k": [8]}, stages=["harvest", "train"])
    assert kinds(plan.unfinished()) == ["harvest", "train"]
    finish(plan, plan.points[0])
    assert plan.unfinished() == []


def test_trainings_that_read_the_same_batches_are_packed(plan_of) -> None:
    grid = {"sae.k": [4, 5, 6], "training.seed": [0, 1]}
    plan = plan_of(base="embedded", grid=grid, overrides={"training": {"pack": 2}})
    trainings = [stage for stage in plan.stages if stage.kind == "train"]
    # Three points share each seed's batches: a pack of two and one alone, for both seeds.
    assert sorted(len(stage.points) for stage in trainings) == [1, 1, 2, 2]
    for evaluation in (stage for stage in plan.stages if stage.kind == "evaluate"):
        (training,) = (stage for stage in trainings if stage.key in evaluation.depends_on)
        assert evaluation.subject in training.points
    assert len(plan.unfinished()) == 1 + 4 + 6
