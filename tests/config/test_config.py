"""Configuration: what is read, what is refused, and in which words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tsae.config import run as configuration
from tsae.config import schema
from tsae.config.sections import OBJECTIVE_PRESETS
from tsae.runtime import environment
from tsae.runtime.errors import TsaeError


def refused(tree: dict) -> str:
    with pytest.raises(TsaeError) as caught:
        configuration.from_mapping(tree, "run.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("run.yaml: ")
    return message


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"sae": {"dict_sise": 3}}, "sae.dict_sise: unknown key; did you mean 'dict_size'? allowed: kind, dict_size"),
        ({"sea": {}}, "sea: unknown key; did you mean 'sae'?"),
        ({"sae": {"k": "many"}}, "sae.k: a whole number is expected, found 'many'"),
        ({"sae": {"k": 2.5}}, "sae.k: a whole number is expected"),
        ({"sae": {"k": True}}, "sae.k: a whole number is expected"),
        ({"sae": 4}, "sae: a mapping is expected, found 4"),
        ({"sae": {"k": 40, "dict_size": 32}}, "sae.k: 40 is impossible; at most sae.dict_size (32)"),
        (
            {"sae": {"group_fractions": [0.5, 0.4]}},
            "sae.group_fractions: [0.5, 0.4] is impossible; positive fractions that sum to 1",
        ),
        (
            {"sae": {"group_fractions": [1.0]}},
            "objective.temporal: prediction is impossible; sae.group_fractions leaves no low-level split",
        ),
        (
            {"sae": {"group_fractions": [1.0]}, "objective": {"preset": "scale_free", "high_share": 0.3}},
            "objective.high_share: 0.3 is impossible; sae.group_fractions leaves no latents outside the high-level split",
        ),
        (
            {"sae": {"group_fractions": [1.0]}, "objective": {"preset": "scale_free", "coarse_fraction": 0.1}},
            "objective.coarse_fraction: 0.1 is impossible; sae.group_fractions leaves no latents outside the high-level split",
        ),
        (
            {"sae": {"dict_size": 100, "split_fraction": 0.95}},
            "objective.coarse_fraction: 0.1 is impossible; it must be at least one of sae.dict_size (100) latents",
        ),
        ({"sae": {"kind": "temporl"}}, "sae.kind: 'temporl' is not allowed; did you mean 'temporal'?"),
        (
            {"training": {"decay_start": 5, "warmup_steps": 10}},
            "training.decay_start: 5 is impossible; it must lie after",
        ),
        (
            {"training": {"steps": 50, "threshold_start_step": 50}},
            "training.threshold_start_step: 50 is impossible; the",
        ),
        ({"training": {"steps": 40, "warmup_steps": 700}}, "training.warmup_steps: 700 is impossible; training ends"),
        (
            {"training": {"steps": 40, "save_steps": [10, 40]}},
            "training.save_steps: [10, 40] is impossible; steps from 0",
        ),
        ({"training": {"seed": 10**20}}, "training.seed: 100000000000000000000 is impossible"),
        ({"data": {"seed": -5}}, "data.seed: -5 is impossible"),
        ({"model": {"device": "banana"}}, "model.device: banana is impossible; allowed: auto, cpu"),
        ({"training": {"lr": 0}}, "training.lr: 0.0 is impossible; it must be greater than 0"),
        (
            {"training": {"pair_rule": "within"}},
            "training.pair_rule: 'within' is not allowed; did you mean 'within:8'?",
        ),
        ({"training": {"pair_rule": "none"}}, "training.pair_rule: none is impossible; a temporal SAE needs pairs"),
        ({"objective": "papers"}, "objective.preset: 'papers' is not allowed; did you mean 'paper'?"),
        ({"objective": {"group_weights": [1, 1, 1]}}, "one weight for each of the 2 groups"),
        ({"data": {"holdout": 1.5}}, "data.holdout: 1.5 is impossible; a share between 0 and 1"),
        ({"model": {"layer": -1}}, "model.layer: -1 is impossible"),
        ({"training": {"lr": ".nan"}}, "training.lr: a number is expected"),
        ({"data": {"max_norm_multiple": 1}}, "data.max_norm_multiple: 1.0 is impossible; it must be greater than 1"),
        ({"data": {"max_norm_multiple": "aut"}}, "data.max_norm_multiple: 'aut' is not allowed; did you mean 'auto'?"),
        ({"data": {"exclude_tokens": [-1]}}, "data.exclude_tokens[0]: -1 is impossible; it must be at least 0"),
        ({"data": {"exclude_tokens": 3}}, "data.exclude_tokens: a list is expected, found 3"),
        (
            {"data": {"source": "synthetic", "exclude_tokens": [3]}},
            "data.exclude_tokens: [3] is impossible; a synthetic world has no tokens",
        ),
        ({"training": {"pair_rule": "within:²"}}, "training.pair_rule: 'within:²' is not allowed"),
        ({"objective": {"preset": ["paper"]}}, "objective.preset: ['paper'] is not allowed; "),
        ({"synthetic": {"preset": ["place"]}}, "synthetic.preset: ['place'] is not allowed; "),
        (
            {"sae": {"group_fractions": [1]}, "objective": {"preset": "paper", "high_share": 0.5}},
            "objective.high_share: 0.5 is impossible; sae.group_fractions leaves no latents outside the high-level",
        ),
        (
            {"sae": {"dict_size": 1000, "group_fractions": [0.2, 0.05, 0.75]}},
            "objective.coarse_fraction: 0.1 is impossible; it must be at least one of sae.dict_size (1000) latents and "
            "leave one of the 50 that follow",
        ),
        (
            {"objective": {"coarse_fraction": 1e-9}},
            "objective.coarse_fraction: 1e-09 is impossible; it must be at least one of sae.dict_size (16384) latents",
        ),
        (
            {"sae": {"dict_size": 20, "k": 10}, "objective": {"high_share": 0.9}},
            "objective.high_share: 0.9 is impossible; sae.k (10) can be divided between a high-level split of 4 latents "
            "and 16 others by shares from 0 to 0.4",
        ),
        (
            {"sae": {"dict_size": 20, "k": 18}, "objective": {"high_share": 0.05}},
            "and 16 others by shares from 0.111 to 0.222",
        ),
        (
            {"sae": {"k": 4}, "training": {"batch_size": 64}, "objective": {"high_share": 0.001}},
            "objective.high_share: 0.001 is impossible; of the 256 active latents that are selected among 64 tokens",
        ),
        (
            {"sae": {"k": 4}, "training": {"batch_size": 64}, "objective": {"high_share": 0.999}},
            "objective.high_share: 0.999 is impossible; of the 256 active latents that are selected among 64 tokens",
        ),
        (
            {
                "sae": {"k": 4},
                "training": {"batch_size": 64, "processes": 4, "selection": "local"},
                "objective": {"high_share": 0.005},
            },
            "objective.high_share: 0.005 is impossible; of the 64 active latents that are selected among 16 tokens",
        ),
        (
            {"sae": {"kind": "batch_topk"}, "training": {"batch_size": 1}},
            "training.batch_size: 1 is impossible; a single token has no variance",
        ),
        (
            {"training": {"dead_after": 10**23}},
            "training.dead_after: 100000000000000000000000 is impossible; its size must",
        ),
        (
            {"objective": {"temporal_alpha": 1e20, "temporal_anneal": 1e20}},
            "objective.temporal_anneal: 1e+20 is impossible; times objective.temporal_alpha it is 1e+40, and weights up",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(tree: dict, said: str) -> None:
    assert said in refused(tree)


def test_what_only_a_temporal_sae_has_is_no_matter_to_other_kinds_and_presets() -> None:
    lonely, tiny = {"group_fractions": [1]}, {"dict_size": 5, "k": 5}
    configuration.from_mapping({"sae": lonely, "objective": "reference"}, "x")
    configuration.from_mapping({"sae": {**lonely, **tiny, "kind": "matryoshka"}}, "x")
    configuration.from_mapping({"sae": {**tiny, "kind": "batch_topk"}}, "x")
    configuration.from_mapping({"sae": tiny, "objective": "paper"}, "x")


def test_a_share_of_a_batch_that_leaves_a_split_empty_is_refused_where_processes_select_by_themselves() -> None:
    def config(selection: str) -> configuration.RunConfig:
        training = {"batch_size": 64, "selection": selection}
        tree = {"sae": {"k": 4}, "training": training, "objective": {"high_share": 0.002}}
        return configuration.from_mapping(tree, "x")

    configuration.require_processes(config("global"), 2)
    configuration.require_processes(config("local"), 1)
    with pytest.raises(
        TsaeError, match=r"0\.002 is impossible with training\.selection: local in 2 processes; of the 128"
    ):
        configuration.require_processes(config("local"), 2)


def test_every_preset_is_a_set_of_known_objective_settings() -> None:
    for name, settings in OBJECTIVE_PRESETS.items():
        resolved = configuration.from_mapping({"objective": name}, "run.yaml").objective
        assert resolved.preset == name
        assert all(getattr(resolved, key) == value for key, value in settings.items())
    own = configuration.from_mapping({"objective": {"preset": "paper", "temporal_alpha": 2}}, "run.yaml").objective
    assert (own.temporal_alpha, own.similarity) == (2.0, "cosine")


def test_no_is_a_choice_where_yaml_reads_a_truth_value(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("training: {precision: bf16}\n")
    assert configuration.load(path, ["training.precision=no"]).training.precision == "no"
    with pytest.raises(TsaeError, match=r"training\.engine: False is not allowed"):
        configuration.load(path, ["training.engine=no"])


def test_overrides_change_the_file_and_are_blamed_themselves(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("objective: paper\nsae: {k: 8}\n")
    config = configuration.load(path, ["sae.k=9", "training.lr=3e-4", "objective.temperature=0.5"])
    assert (config.sae.k, config.training.lr, config.objective.temperature) == (9, 3e-4, 0.5)
    assert config.objective.similarity == "cosine"
    with pytest.raises(TsaeError, match=r"^command line: sae\.kk: unknown key; did you mean 'k'"):
        configuration.load(path, ["sae.kk=9"])
    for empty in ("sae.k", "sae={}", "sae.k={}", "sae={k: {}}"):
        with pytest.raises(TsaeError, match="an override has the form"):
            configuration.load(path, [empty])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "line 1: not valid YAML"),
        ("a: {k: 1}\na: {}", "line 2: not valid YAML: 'a' stands twice"),
        ("- 1", "a mapping of settings is expected"),
        ("sae: &all {k: 4, again: *all}", "not valid YAML: it is nested too deeply, or refers to itself"),
        (None, "No such file"),
    ],
)
def test_files_that_hold_no_settings(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(TsaeError, match=said):
        configuration.load(path)


def test_resolved_configuration_reads_back_and_hashes_the_same(tmp_path: Path) -> None:
    tree = {"objective": "paper", "sae": {"group_fractions": [0.1, 0.3, 0.6]}, "training": {"save_steps": [1, 2]}}
    config = configuration.from_mapping(tree, "x")
    path = tmp_path / "resolved.yaml"
    path.write_text(yaml.safe_dump({"training_hash": config.training_hash, **schema.to_plain(config)}))
    assert configuration.load(path) == config
    before = schema.stable_hash(configuration.training_settings(config))
    assert before == schema.stable_hash(configuration.training_settings(configuration.load(path)))


def test_hashes_change_with_what_decides_the_output_and_with_nothing_else() -> None:
    base = configuration.RunConfig()

    def hashes(config: configuration.RunConfig) -> tuple[str, str, str]:
        parts = (configuration.store_settings, configuration.training_settings, configuration.evaluation_settings)
        return tuple(schema.stable_hash(part(config)) for part in parts)  # type: ignore[return-value]

    store, training, evaluation = hashes(base)
    where = configuration.replace(base, model={"device": "cpu"}, training={"device": "cpu", "pack": 4})
    assert hashes(where) == (store, training, evaluation)
    other_k = hashes(configuration.replace(base, sae={"k": 3}))
    assert (other_k[0] == store, other_k[1] == training, other_k[2] == evaluation) == (True, False, False)
    other_layer = hashes(configuration.replace(base, model={"layer": 1}))
    assert other_layer[0] != store


def test_help_names_every_setting_with_its_sentence() -> None:
    text = configuration.help_text()

    def names(tree: dict[str, object], path: str = "") -> list[str]:
        return [
            name
            for key, value in tree.items()
            for name in (names(value, f"{path}{key}.") if isinstance(value, dict) else [f"{path}{key}"])
        ]

    found = names(schema.to_plain(configuration.RunConfig()))
    assert "experiments.steer.judge.timeout" in found
    for name in found:
        assert f"  {name} (" in text


def test_dotenv_sets_what_is_not_set(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("TSAE_HOME=/from/dotenv\n")
    code = "from tsae.runtime.environment import home, load_dotenv; load_dotenv(); print(home())"

    def printed(**extra: str) -> str:
        environment = {"PATH": "/usr/bin:/bin", **extra}
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        return run.stdout.strip()

    assert printed() == "/from/dotenv"
    assert printed(TSAE_HOME="/from/shell") == "/from/shell"
    (tmp_path / ".env").write_bytes(b"SOME=/with/\0\n")
    (tmp_path / "run.yaml").write_text("{}")
    done = command("settings", "run.yaml", home=str(tmp_path), folder=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert ".env: not plain UTF-8 text" in done.stderr


def test_help_and_configuration_load_nothing_heavy() -> None:
    code = (
        "import sys, tsae.cli, tsae.stages, tsae.config.run\n"
        "tsae.cli._parser()\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'zarr', 'nnsight', 'sklearn') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_command_prints_one_line_and_exits_with_2(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("sae: {kk: 3}\n")
    run = subprocess.run(
        [sys.executable, "-m", "tsae.cli", "train", str(path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 2
    assert run.stderr.startswith(f"tsae: {path}: sae.kk: unknown key")
    assert run.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("value", ["2026-13-45", "[" * 3000, "9" * 5000])
def test_values_that_break_the_yaml_reader_are_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(TsaeError, match="is not a YAML value"):
        schema.parse_overrides([f"sae.k={value}"])
    path = tmp_path / "run.yaml"
    path.write_text(f"sae: {{k: {value}}}")
    with pytest.raises(TsaeError, match="not valid YAML"):
        configuration.load(path)


def command(*arguments: str, home: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "TSAE_HOME": home}
    words = [sys.executable, "-m", "tsae.cli", *arguments]
    return subprocess.run(words, capture_output=True, text=True, cwd=folder, env=environment)


def test_what_the_file_system_refuses_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "run.yaml").write_text("data: {max_tokens: 1000}")
    done = command("harvest", "run.yaml", home=str(tmp_path / "file"), folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Not a directory" in done.stderr


def test_overrides_may_follow_options_and_run_names_stay_below_the_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("{}")
    (tmp_path / "home/checkpoints/one/trainer_0").mkdir(parents=True)
    for arguments, said in (
        (["train", "run.yaml", "--run-name", "one/trainer_0"], "--run-name 'one/trainer_0': it would lie inside a run"),
        (["train", "run.yaml", "--run-name", "one/two"], "--run-name 'one/two': it would lie inside a run"),
        (["train", "run.yaml", "--run-name", "a\x1b[31mred"], "--run-name 'a\\x1b[31mred': a folder name"),
        (["train", "."], "tsae: .: a folder; the YAML file of a run is expected"),
        (["runs", "nowhere"], "tsae: nowhere: no such folder"),
        (["runs", "run.yaml"], "tsae: run.yaml: no such folder"),
        (["sweep", "seeds", "--cancel", "--dry-run"], "--cancel: it starts nothing; leave --dry-run out"),
        (
            ["sweep", "seeds", "--executor", "debug", "--detach"],
            "--detach: the executor debug works in this very process",
        ),
        (["status", "seeds", "--logs", "x", "--watch"], "--logs: it prints the end of logs once; leave --watch out"),
        (["train", "run.yaml", "--run-name", "x", "sae.kk=3"], "command line: sae.kk: unknown key"),
        (["evaluate", "run.yaml", "--run-name", "../evil"], "--run-name '../evil'"),
        (["evaluate", "run.yaml", "--run-name", ""], "--run-name ''"),
        (["harvest", "run.yaml", "--task", "0", "--tasks", "0"], "--tasks 0: at least 1"),
    ):
        done = command(*arguments, home=str(tmp_path / "home"), folder=tmp_path)
        assert done.returncode == 2, done
        assert said in done.stderr


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: 'two': a whole number, at least 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: '0'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK: '2': a whole number, 0 to 1"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "-1"}, "LOCAL_RANK: '-1'"),
    ],
)
def test_variables_of_a_launcher_that_make_no_sense_are_named(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (environment.process_count(), environment.process_rank(), environment.local_rank()) == (1, 0, 0)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TsaeError, match=said):
        _ = environment.process_count(), environment.process_rank(), environment.local_rank()


def test_a_reader_that_has_enough_is_no_error(tmp_path: Path) -> None:
    words = [sys.executable, "-u", "-m", "tsae.cli", "settings"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
