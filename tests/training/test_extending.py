"""What a new kind of SAE, and a new temporal term, cost: a name among the settings, and an entry with what it does."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import tsae
from tests.training.recorded import record_gradients
from tsae import cli
from tsae.checkpoint import RunFolder, load_dictionary
from tsae.config import run as configuration
from tsae.config import schema
from tsae.config.run import RunConfig
from tsae.config.sections import KIND_SETTINGS, TERM_SETTINGS, KindSettings, TermSettings
from tsae.evaluation.driver import evaluate
from tsae.interop.export import export
from tsae.runtime.errors import TsaeError
from tsae.sae.dictionary import top_k
from tsae.sae.kinds import KINDS, AutoEncoderNew, Kind, MatryoshkaBatchTopKSAE, Penalised, PenaltySettings
from tsae.sae.sparse import SparseCode
from tsae.training.run import train
from tsae.training.temporal import TERMS, Differentiated, Pairs, Term
from tsae.training.trainer import Trainer


class MatryoshkaTopKSAE(MatryoshkaBatchTopKSAE):
    """Nested groups, and k latents for every token of a training batch."""

    selects_per_token: ClassVar[bool] = True

    def keep_largest(self, activations: Tensor) -> Tensor:
        return top_k(activations, int(self.k))


class LogPenaltySAE(AutoEncoderNew):
    """A ReLU SAE whose penalty grows with the logarithm of activations, so that large ones are hardly shrunk."""

    @property
    def encode_rule(self) -> str:
        return "relu, however it was trained"


def logarithms(dictionary: LogPenaltySAE, x: Tensor, _: PenaltySettings) -> Penalised:
    f = dictionary.encode(x)
    return Penalised(f, f.log1p().sum(dim=-1).mean(), f.new_zeros(()))


NEW = {
    "matryoshka_topk": (
        KindSettings(grouped=True, needs_threshold=True),
        Kind(dictionary=MatryoshkaTopKSAE, trainer_class="MatryoshkaTopKTrainer"),
    ),
    "log_penalty": (
        KindSettings(penalised=True),
        Kind(dictionary=LogPenaltySAE, trainer_class="LogPenaltyTrainer", penalty=logarithms),
    ),
}


@pytest.mark.parametrize("name", NEW)
def test_a_new_kind_is_trained_saved_loaded_evaluated_and_refused_by_formats(
    name: str,
    normalised: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tree = schema.to_plain(configuration.replace(normalised, sae={"kind": name}))
    with pytest.raises(TsaeError, match=rf"sae\.kind: '{name}' is not allowed"):
        configuration.from_mapping(tree, "test")
    settings, kind = NEW[name]
    monkeypatch.setitem(KIND_SETTINGS, name, settings)
    monkeypatch.setitem(KINDS, name, kind)
    config, run = configuration.from_mapping(tree, "test"), RunFolder.of(tmp_path, "run")
    train(config, run)
    dictionary, written = load_dictionary(run.path)
    assert type(dictionary) is kind.dictionary
    assert written["trainer"]["trainer_class"] == kind.trainer_class
    assert dictionary.group_sizes == config.sae.group_sizes
    results = evaluate(run.load_config(), run)
    assert results["frac_variance_explained_pooled"] > 0.1
    for form in ("sae_lens", "sae_bench", "reference"):
        with pytest.raises(TsaeError, match=f"no {form} file can carry a {kind.dictionary.__name__}"):
            export(run.path, form, tmp_path / form)
    assert cli.main(["export", str(run.path), "--format", "sae_lens", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("tsae: ")
    assert said.endswith("formats that can: none")
    assert not (tmp_path / "out").exists()


def agreement(high: Tensor, other: Tensor, _: Pairs) -> Tensor:
    """Minus the mean dot product of high-level codes [B, F0] of the two tokens of a pair."""
    return -(high * other).sum(dim=-1).mean()


def sparse_agreement(high: SparseCode, other: SparseCode, pairs: Pairs, weight: float) -> Differentiated:
    scale = -weight / (pairs.group.world * len(pairs.current))
    of_partner, of_current = other.dense()[high.rows, high.latents], high.dense()[other.rows, other.latents]
    return Differentiated(scale * (high.values * of_partner).sum(), scale * of_partner, scale * of_current)


def test_a_new_temporal_term_is_one_objective_in_both_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    def trainer(engine: str) -> Trainer:
        tree: dict[str, Any] = {"sae": {"dict_size": 60, "k": 4}, "objective": {"temporal": "agreement"}}
        tree["training"] = {"engine": engine, "warmup_steps": 0, "lr": 0.01, "batch_size": 24, "normalize": "none"}
        built = Trainer(configuration.from_mapping(tree, "test"), 12)
        built.dictionary.double()
        return built

    with pytest.raises(TsaeError, match=r"objective\.temporal: 'agreement' is not allowed"):
        trainer("sparse")
    monkeypatch.setitem(TERM_SETTINGS, "agreement", TermSettings())
    monkeypatch.setitem(TERMS, "agreement", Term(agreement, sparse_agreement, lambda _: 0.5))
    pair = trainer("dense"), trainer("sparse")
    gradients = [record_gradients(built) for built in pair]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        shared = torch.randn(24, 1, 12, dtype=torch.float64, generator=generator)
        batch = shared + torch.randn(24, 2, 12, dtype=torch.float64, generator=generator)
        dense, sparse = (built.step(batch) for built in pair)
        assert float(dense.temp_loss) < 0
        assert float(sparse.temp_loss) == pytest.approx(float(dense.temp_loss), rel=1e-10)
        assert float(sparse.loss) == pytest.approx(float(dense.loss), rel=1e-10)
        for name, expected in gradients[0].items():
            assert (gradients[1][name] - expected).norm() <= 1e-10 * expected.norm(), name
        pair[1].dictionary.load_state_dict(pair[0].dictionary.state_dict())


def test_both_tables_of_a_choice_have_the_same_names() -> None:
    assert KINDS.keys() == KIND_SETTINGS.keys()
    # Prediction is a term of reconstructions, not of codes; the objective itself has it.
    assert TERMS.keys() == TERM_SETTINGS.keys() - {"prediction"}
    for name, kind in KINDS.items():
        assert KIND_SETTINGS[name].penalised == (kind.penalty is not None), name


def names_compared(code: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of every kind or term that is compared, or matched, with something called kind or temporal."""
    for node in ast.walk(code):
        subject, others = None, list[ast.AST]()
        if isinstance(node, ast.Compare):
            subject, others = node.left, list(node.comparators)
        elif isinstance(node, ast.Match):
            subject, others = node.subject, [case.pattern for case in node.cases]
        called = getattr(subject, "attr", getattr(subject, "id", ""))
        if called.strip("_") in ("kind", "temporal", "name"):
            for constant in (found for other in others for found in ast.walk(other)):
                if isinstance(constant, ast.Constant) and constant.value in {*KIND_SETTINGS, *TERM_SETTINGS}:
                    yield constant.lineno, str(constant.value)


def test_no_code_asks_for_a_kind_or_a_term_by_name() -> None:
    assert list(names_compared(ast.parse("if sae.kind in ('topk', 'x') and self._kind == 'gated': pass")))
    package = Path(tsae.__file__).parent
    found = [
        f"{path.relative_to(package)}:{line}: {name}"
        for path in sorted(package.rglob("*.py"))
        for line, name in names_compared(ast.parse(path.read_text()))
    ]
    assert not found
