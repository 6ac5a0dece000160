"""Expansion of a sweep into named points, and the one-line refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from tsae.config import run as configuration
from tsae.runtime.errors import TsaeError
from tsae.sweep.plan import make_plan
from tsae.sweep.sweepfile import load_sweep

REPOSITORY = Path(__file__).resolve().parents[2]


def names(plan):
    return [point.name for point in plan.points]


def test_a_grid_is_a_product_named_by_the_last_component_of_each_axis(plan_of):
    plan = plan_of(grid={"sae.split_fraction": [0.2, 0.5], "training.seed": [0, 1]})
    assert names(plan) == [
        "split_fraction=0.2,seed=0",
        "split_fraction=0.2,seed=1",
        "split_fraction=0.5,seed=0",
        "split_fraction=0.5,seed=1",
    ]
    assert [(p.config.sae.split_fraction, p.config.training.seed) for p in plan.points] == [
        (0.2, 0),
        (0.2, 1),
        (0.5, 0),
        (0.5, 1),
    ]


def test_nested_and_dotted_axes_mean_the_same(plan_of):
    assert names(plan_of(grid={"sae": {"k": [8, 16]}})) == names(plan_of(grid={"sae.k": [8, 16]}))


def test_ambiguous_axes_are_named_in_full(plan_of):
    plan = plan_of(grid={"training.seed": [0], "data.seed": [1]})
    assert names(plan) == ["training.seed=0,data.seed=1"]


def test_zip_goes_in_parallel_and_list_is_explicit(plan_of):
    plan = plan_of(
        zip={"sae.k": [8, 16], "training.steps": [100, 200]},
        list=[{"sae.kind": "temporal"}, {"sae.kind": "batch_topk", "training.pair_rule": "none"}],
    )
    assert names(plan) == [
        "k=8,steps=100,kind=temporal",
        "k=8,steps=100,kind=batch_topk,pair_rule=none",
        "k=16,steps=200,kind=temporal",
        "k=16,steps=200,kind=batch_topk,pair_rule=none",
    ]


def test_names_of_runs_are_names_of_files(plan_of):
    plan = plan_of(grid={"training.pair_rule": ["within:8"], "model.hook_point": ["a/b c"]})
    assert names(plan) == ["pair_rule=within-8,hook_point=a-b-c"]


def test_a_named_preset_replaces_the_objective_of_the_base(plan_of):
    # The embedded base has a temperature and a weight of its own.
    swept = plan_of(grid={"objective": ["paper", "reference"]})
    named = plan_of(command_line=["objective=paper"], grid={"sae.k": [8]})
    for point, preset in (*zip(swept.points, ("paper", "reference"), strict=True), (named.points[0], "paper")):
        assert point.config.objective == configuration.from_mapping({"objective": preset}, "test").objective


def test_a_named_preset_survives_an_axis_in_its_section(plan_of):
    plan = plan_of(command_line=["objective=paper"], grid={"objective.temporal_alpha": [0.5]})
    objective = plan.points[0].config.objective
    assert (objective.similarity, objective.temporal_alpha) == ("cosine", 0.5)


def test_overrides_lie_over_the_sweep_which_lies_over_the_base(plan_of):
    plan = plan_of(command_line=["sae.k=9"], grid={"training.seed": [0]}, overrides={"sae.k": 8, "data.seed": 3})
    config = plan.points[0].config
    assert (config.sae.k, config.data.seed, config.training.batch_size) == (9, 3, 1024)


def test_overrides_and_base_that_change_results_get_folders_of_their_own(plan_of):
    grid = {"training.seed": [0]}
    assert plan_of(grid=grid).name == "little-embedded"
    assert plan_of(command_line=["sae.k=9"], grid=grid).name == "little-embedded,sae.k=9"
    assert plan_of(command_line=["training.device=cpu"], grid=grid).name == "little-embedded"
    assert plan_of(on="pythia-160m", grid=grid).name == "little-pythia-160m"
    assert plan_of(named="mine", command_line=["sae.k=9"], grid=grid).name == "mine"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"grid": {"sae.split_fractoin": [0.1]}},
            "grid.sae.split_fractoin: no such axis; did you mean 'sae.split_fraction'",
        ),
        ({"grid": {"split_fraction": [0.1]}}, "did you mean 'sae.split_fraction'"),
        ({"grid": {}}, "grid: empty"),
        ({"grid": {"sae.k": []}}, "grid.sae.k: the list is empty"),
        ({"grid": {"sae.k": 8}}, "grid.sae.k: a list of values is expected, found 8"),
        ({"grid": {"sae.k": ["many"]}}, "sae.k: a whole number is expected, found 'many'"),
        ({"grid": {"sae.k": [99999]}}, "k=99999: sae.k: 99999 is impossible"),
        ({"grid": {"sae.k": [8, 8]}}, "are the same run"),
        (
            {"grid": {"sae.k": [8]}, "name": "../other"},
            "name '../other': a folder name below TSAE_HOME/sweeps is expected",
        ),
        ({"grid": {"model.layer": [9]}}, "model.layer: 9 is impossible"),
        ({"gird": {"sae.k": [8]}}, "gird: unknown key; did you mean 'grid'"),
        ({"zip": {"sae.k": [8, 9], "training.seed": [0]}}, "zip: lists of one length are expected"),
        ({"grid": {"sae.k": [8]}, "zip": {"sae.k": [9]}}, "zip.sae.k: grid varies it too"),
        ({"grid": {"sae.k": [8]}, "base": "embeded"}, "there is no base 'embeded'; did you mean 'embedded'"),
        ({"grid": {"sae.k": [8]}, "stages": ["trian"]}, "stages[0]: 'trian' is not allowed; did you mean 'train'"),
        ({"grid": {"sae.k": [8]}, "report": {"x": "sae.kk"}}, "report.x: sae.kk is not swept; did you mean 'sae.k'"),
        ({"grid": {"sae.k": [8]}, "resources": {"train": {"cpu": 1}}}, "resources.train.cpu: unknown key"),
        (
            {"grid": {"sae.k": [8]}, "report": {"baseline": {"sae.kk": 8}}},
            "report.baseline: sae.kk is no setting; did you mean 'sae.k'",
        ),
        (
            {"grid": {"sae.k": [8]}, "report": {"baseline": {"sae.k": 9, "training.seed": 0}}},
            "report.baseline: no point of this sweep has sae.k=9, training.seed=0",
        ),
        (
            {"grid": {"sae.k": [8]}, "overrides": {"data.source": "synthetic"}, "stages": ["train", "probe"]},
            "k=8: probe: the run is trained on a synthetic world, without text to experiment with",
        ),
        (
            {
                "grid": {"sae.k": [8]},
                "overrides": {"experiments.steer.judge.backend": "endpoint"},
                "stages": ["train", "steer"],
            },
            "k=8: experiments.steer.judge.model: is needed for the backend endpoint",
        ),
        (
            {
                "grid": {"sae.k": [8]},
                "overrides": {"experiments.probe.dataset": "few.jsonl"},
                "stages": ["train", "probe"],
            },
            "k=8: experiments.probe.dataset: few.jsonl: no such file or folder; known: embedded, ",
        ),
        (
            {
                "grid": {"sae.k": [8]},
                "overrides": {"experiments.tsne.dataset": "wikipeda"},
                "stages": ["train", "tsne"],
            },
            "k=8: experiments.tsne.dataset: wikipeda: no such file or folder; did you mean 'wikipedia'?",
        ),
        (
            {
                "grid": {"sae.k": [8]},
                "overrides": {"experiments.sequences.latents": [3, 2048], "sae.dict_size": 2048},
                "stages": ["train", "sequences"],
            },
            "k=8: experiments.sequences.latents: [3, 2048] is impossible; latents are counted from 0 to 2047",
        ),
        (
            {"grid": {"sae.k": [8]}, "overrides": {"experiments.steer.latents": [3]}, "stages": ["train", "steer"]},
            "k=8: experiments.steer.latents: [3] is impossible; one for each of experiments.steer.concepts is expected",
        ),
        (
            {"grid": {"data.seed": [1, 2], "store.path": ["st"]}},
            "is that of seed=1",
        ),
    ],
)
def test_bad_sweeps_are_refused_in_one_line_that_names_the_file(plan_of, home, sections, message):
    with pytest.raises(TsaeError) as caught:
        plan_of(**sections)
    line = str(caught.value)
    assert "little.yaml" in line
    assert message in line
    assert "\n" not in line
    assert not home.exists()


def test_what_was_launched_before_it_was_refused_can_be_looked_at(write_sweep):
    sections = {"base": "synthetic", "grid": {"sae.k": [8, 9]}, "stages": ["train", "probe", "report"]}
    sweep = load_sweep(write_sweep(**sections, report={"baseline": {"sae.k": 7}}))
    with pytest.raises(TsaeError, match=r"report\.baseline: no point of this sweep has sae\.k=7"):
        make_plan(sweep)
    assert len(make_plan(sweep, to_look_at=True).points) == 2


def test_a_launched_sweep_goes_by_its_folder_whatever_its_file_calls_it(write_sweep):
    path = write_sweep(base="synthetic", grid={"sae.k": [8, 9]}, name="mine/first")
    assert load_sweep(path, name="mine-first").folder_name == "mine-first"
    with pytest.raises(TsaeError, match="name 'mine/first': a folder name"):
        load_sweep(path)


def test_an_override_of_a_swept_setting_is_refused(plan_of):
    with pytest.raises(TsaeError, match=r"command line: sae\.k: .* sweeps it"):
        plan_of(command_line=["sae.k=9"], grid={"sae.k": [8]})


def test_malformed_yaml_is_refused_with_its_line(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("grid:\n  sae.k: [8\n")
    with pytest.raises(TsaeError, match=r"bad\.yaml: line \d+: not valid YAML"):
        load_sweep(path)


SHIPPED = sorted((REPOSITORY / "sweeps").glob("*.yaml"))
SYNTHETIC = [path for path in SHIPPED if "base: synthetic" in path.read_text()]


@pytest.mark.parametrize("sweep", SYNTHETIC, ids=lambda path: path.stem)
def test_every_shipped_sweep_of_synthetic_worlds_works(sweep):
    plan = make_plan(load_sweep(sweep))
    assert all(point.config.is_synthetic for point in plan.points)
    worlds = {(point.config.synthetic, point.config.data.seed) for point in plan.points}
    assert sum(stage.kind == "harvest" for stage in plan.stages) == len(worlds)


def test_overrides_of_a_synthetic_world_get_folders_of_their_own():
    path = REPOSITORY / "sweeps" / "ground_truth.yaml"
    plain, louder = load_sweep(path), load_sweep(path, overrides=["synthetic.scale=20"])
    assert louder.folder_name == f"{plain.folder_name},synthetic.scale=20"


BASES = ("embedded", "smollm2-135m", "pythia-160m", "gemma-2-2b")
OWN_BASE_ALONE = "objective_embedded"
"""Its points are differences from the embedded base's objective, so on another base two of them may be the same."""


@pytest.mark.parametrize(
    ("sweep", "base"),
    [
        pytest.param(path, base, id=f"{path.stem}-{base}")
        for path in SHIPPED
        for base in BASES
        if path not in SYNTHETIC and (path.stem != OWN_BASE_ALONE or base == "embedded")
    ],
)
def test_every_shipped_sweep_works_on_every_shipped_base(sweep, base):
    plan = make_plan(load_sweep(sweep, base))
    assert len(plan.points) >= 3
    assert sum(stage.kind == "harvest" for stage in plan.stages) == 1  # of several layers, too


def test_the_large_bases_carry_the_papers_settings():
    for base, layer in (("pythia-160m", 8), ("gemma-2-2b", 12)):
        plan = make_plan(load_sweep(REPOSITORY / "sweeps" / "split_fraction.yaml", base))
        config = next(point.config for point in plan.points if point.config.sae.split_fraction == 0.2)
        assert config.sae.group_sizes == (3276, 13108)
        assert (config.model.layer, config.sae.k, config.data.context_length) == (layer, 20, 256)
        assert (config.training.steps, config.training.batch_size, config.training.lr) == (200_000, 8192, 3e-4)
        assert (config.training.warmup_steps, config.training.pair_rule) == (1000, "previous")


DRAWS = {"training.lr": {"log_uniform": [1e-4, 1e-2]}, "sae.k": {"integers": [4, 40]}, "training.seed": [0, 1]}


def test_random_points_lie_within_their_bounds_and_are_the_same_every_time(plan_of):
    axes = DRAWS | {"sae": {"split_fraction": {"uniform": [0.1, 0.5]}}}
    points = plan_of(random={"n": 12, "seed": 3, **axes}).points
    assert len(set(names(plan_of(random={"n": 12, "seed": 3, **axes})))) == 12
    assert [p.axes for p in points] == [p.axes for p in plan_of(random={"n": 12, "seed": 3, **axes}).points]
    assert [p.axes for p in points] != [p.axes for p in plan_of(random={"n": 12, "seed": 4, **axes}).points]
    assert all(1e-4 <= p.config.training.lr <= 1e-2 and 4 <= p.config.sae.k <= 40 for p in points)
    assert all(0.1 <= p.config.sae.split_fraction <= 0.5 for p in points)
    assert {p.config.training.seed for p in points} == {0, 1}


def test_more_draws_and_another_axis_leave_the_draws_that_are_there(plan_of):
    few = plan_of(random={"n": 4, "seed": 0, **DRAWS}).points
    many = plan_of(random={"n": 9, "seed": 0, **DRAWS}).points
    assert [p.axes for p in few] == [p.axes for p in many[:4]]
    wider = plan_of(random={"n": 4, "seed": 0, **DRAWS, "sae.dict_size": [512, 1024]}).points
    assert [p.axes["training.lr"] for p in wider] == [p.axes["training.lr"] for p in few]


def test_random_points_multiply_with_a_grid(plan_of):
    plan = plan_of(
        random={"n": 3, "seed": 0, "sae.k": [4, 8, 16, 32]}, grid={"training.pair_rule": ["previous", "random"]}
    )
    assert len(plan.points) == 6


@pytest.mark.parametrize(
    ("random", "message"),
    [
        ({"n": 2, "sae.k": [1, 2]}, "seed: a whole number is expected"),
        ({"n": 0, "seed": 0, "sae.k": [1, 2]}, "n: 0 is impossible"),
        ({"n": 5, "seed": 0, "sae.k": [8, 16]}, "5 distinct points are asked for; these axes gave 2"),
        ({"n": 2, "seed": 0}, "no axis besides n and seed"),
        ({"n": 2, "seed": 0, "sae.kk": [1]}, "random.sae.kk: no such axis; did you mean 'sae.k'"),
        ({"n": 2, "seed": 0, "training.lr": {"loguniform": [1, 2]}}, "loguniform: unknown; did you mean 'log_uniform'"),
        ({"n": 2, "seed": 0, "training.lr": {"log_uniform": [0, 2]}}, "low must be greater than 0"),
        ({"n": 2, "seed": 0, "training.lr": {"uniform": [3, 2]}}, "low below high"),
        ({"n": 2, "seed": 0, "sae.k": {"integers": [1.5, 2]}}, "whole numbers"),
        ({"n": 2, "seed": 0, "sae.k": 3}, "a list of values is expected"),
    ],
)
def test_random_axes_that_make_no_sense_are_refused(plan_of, random, message):
    with pytest.raises(TsaeError, match=message.replace("(", r"\(")):
        plan_of(random=random)
