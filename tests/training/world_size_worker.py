"""What every process of the world-size tests does.

Four processes train each case, then the first two of them, on the same batches, and write `world_4.pt` and
`world_2.pt`. They read what one process left there before: a state to make a single step from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.training.recorded import record_gradients
from tsae.config import run as configuration
from tsae.parallel.group import Group, Processes
from tsae.sae.selection.global_top_k import global_top_k_codes
from tsae.sae.selection.top_k import Encoder, batch_top_k_codes
from tsae.store.moments import Moments
from tsae.training.sparse_engine import SparseGradients
from tsae.training.trainer import Terms, Trainer

WORLDS = (4, 2)
STEPS, BATCH, DIM, FEATURES = 50, 96, 24, 80
MIDDLE = 14
MOMENTS = Moments(1, torch.linspace(-1, 1, DIM), torch.full((DIM,), 0.3, dtype=torch.float64), 9.0)
DOCUMENT = torch.arange(BATCH) % 20
FEWER_STEPS = MIDDLE + 2
CASES: dict[str, dict[str, Any]] = {
    "contrastive": {"objective": "reference"},
    "cosine": {"objective": {"preset": "scale_free", "similarity": "cosine", "temperature": 0.1, "directions": "mean"}},
    "linear": {
        "objective": {
            "preset": "scale_free",
            "temporal": "linear",
            "similarity": "cosine",
            "reconstruction": "variance",
        }
    },
    "other_documents": {
        "objective": {"preset": "scale_free", "similarity": "cosine", "temperature": 0.1, "same_document": False}
    },
    "l1": {"objective": {"temporal": "l1"}},
    "prediction": {"objective": "predictive"},
    "matryoshka": {"sae": {"kind": "matryoshka"}},
    "batch_topk": {"sae": {"kind": "batch_topk"}},
    "topk": {"sae": {"kind": "topk"}},
    # A gate that opens is a jump: rounding in single precision would open others.
    "jump_relu": {"sae": {"kind": "jump_relu"}, "double": True},
    "gated": {"sae": {"kind": "gated"}, "double": True},
    "double": {"double": True},
    "sharded": {"training": {"shard": "optimizer"}},
    "sharded jump_relu": {"sae": {"kind": "jump_relu"}, "double": True, "training": {"shard": "optimizer"}},
    "centred": {"training": {"normalize": "centred"}},
    "local": {"training": {"selection": "local", "negatives": "local"}},
}
LONG = ("contrastive", "l1", "matryoshka", "batch_topk", "sharded")


def trainer(case: dict[str, Any], group: Group) -> Trainer:
    training = {
        "batch_size": BATCH,
        "warmup_steps": 5,
        "lr": 0.003,
        "dead_after": 3 * BATCH,
        "threshold_start_step": 10,
        "threshold_beta": 0.9,
        "normalize": "none",
        **case.get("training", {}),
    }
    sae = {"dict_size": 200, "k": 4, "group_fractions": [0.25, 0.75], **case.get("sae", {})}
    tree = {"sae": sae, "objective": case.get("objective", "reference"), "training": training}
    built = Trainer(configuration.from_mapping(tree, "test"), DIM, moments=MOMENTS, group=group)
    if case.get("double"):
        built.dictionary.double()
    return built


def batches(case: dict[str, Any]) -> list[Tensor]:
    """Pairs of sparse mixtures [STEPS, B, 2, D]; the halves share their first feature."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(FEATURES, DIM, generator=generator)
    shape = (STEPS, BATCH, 2, 3)
    chosen = torch.randint(FEATURES, shape, generator=generator)
    chosen[:, :, 1, 0] = chosen[:, :, 0, 0]
    amplitudes = 0.5 + torch.rand(shape, generator=generator)
    mixtures = (directions[chosen] * amplitudes[..., None]).sum(dim=-2)
    noisy = mixtures + 0.05 * torch.randn(mixtures.shape, generator=generator)
    return list(noisy.double() if case.get("double") else noisy)


def own_share(batch: Tensor, group: Group) -> Tensor:
    return batch[group.share(len(batch) // group.world)]


def plain(terms: Terms) -> dict[str, Any]:
    """As numbers and lists of numbers."""
    return {key: torch.as_tensor(value).tolist() for key, value in terms._asdict().items()}


def train_case(name: str, group: Group, folder: Path) -> dict[str, Any]:
    case = CASES[name]
    built = trainer(case, group)
    terms, first = [], dict[str, Tensor]()
    gradients = record_gradients(built)
    for step, batch in enumerate(batches(case)[: STEPS if name in LONG else FEWER_STEPS]):
        if group.world == 1 and step == MIDDLE:
            torch.save(built.state(), folder / f"{name}.pt")
        terms.append(plain(built.step(own_share(batch, group), own_share(DOCUMENT, group))))
        first = first or dict(gradients)
    single = trainer(case, group)
    single.load_state(torch.load(folder / f"{name}.pt", weights_only=True))
    single_gradients = record_gradients(single)
    single_terms = plain(single.step(own_share(batches(case)[MIDDLE], group), own_share(DOCUMENT, group)))
    return {
        "terms": terms,
        "weights": {key: tensor.clone() for key, tensor in built.dictionary.state_dict().items()},
        "first": first,
        "single": single_gradients,
        "single_terms": single_terms,
        "tokens_since_fired": built.tokens_since_fired,
    }


def exchanges(name: str, group: Group, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a step does, in order: x an exchange that is waited for at once, b one that is begun, w its wait,
    ( the encoder's gradient in the sparse engine, ) the end of autograd's backward pass.
    """
    built, events, case = trainer(CASES[name], group), list[str](), CASES[name]
    first, second = (own_share(batch, group) for batch in batches(case)[:2])
    built.step(first, own_share(DOCUMENT, group))
    for operation in (dist.all_reduce, dist.reduce, dist.broadcast, dist.all_gather):

        def exchange(*arguments: Any, operation: Any = operation, async_op: bool = False, **named: Any) -> Any:
            events.append("b" if async_op else "x")
            work = operation(*arguments, async_op=async_op, **named)
            return _Begun(work, events) if async_op else work

        monkeypatch.setattr(dist, operation.__name__, exchange)
    encoder, backward = SparseGradients.encoder, Tensor.backward
    monkeypatch.setattr(SparseGradients, "encoder", lambda *given: (events.append("("), encoder(*given)))
    monkeypatch.setattr(Tensor, "backward", lambda *given: (backward(*given), events.append(")")))
    built.step(second, own_share(DOCUMENT, group))
    monkeypatch.undo()
    return "".join(events)


class _Begun:
    def __init__(self, work: Any, events: list[str]) -> None:
        self._work, self._events = work, events

    def wait(self) -> None:
        self._events.append("w")
        self._work.wait()


def selected(group: Group, levels: int, first_guess: float | None) -> list[tuple[Tensor, float]]:
    """Dense codes [2][B, F] of both halves, selected together, and their cuts; few `levels` make many ties."""
    generator = torch.Generator().manual_seed(levels)
    x = torch.randint(-levels, levels + 1, (2, BATCH, DIM), generator=generator).float()
    x[1, BATCH // 4 :] = 0  # all that fire are in the first process's share
    weight = torch.randint(-levels, levels + 1, (DIM, 150), generator=generator).float()
    halves = [own_share(half, group) for half in x]
    bias = torch.full((150,), -1.0)
    guesses = [first_guess, first_guess]
    if group.world == 1:
        found = batch_top_k_codes(Encoder(), halves, weight, bias, 5, guesses)
    else:
        found = global_top_k_codes(Encoder(), halves, weight, bias, 5, guesses, group)
    return [(group.gather(selection.code.dense()), selection.cut) for selection in found]


def everything(group: Group, folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {name: train_case(name, group, folder) for name in CASES}
    results["selections"] = [selected(group, levels, guess) for levels in (1, 2, 50) for guess in (None, 1e9)]
    results["exchanges"] = {name: exchanges(name, group, pytest.MonkeyPatch()) for name in CASES}
    own = torch.arange(3 * group.rank)  # none in the first process
    results["ragged"] = group.gather_ragged(own, [3 * rank for rank in range(group.world)])
    differing = [name for name in CASES for w in results[name]["weights"].values() if not _same(w, group)]
    assert not differing, f"the weights of {differing} are not the same in all processes"
    return results


def _same(tensor: Tensor, group: Group) -> bool:
    copies = group.gather(tensor[None])
    return bool((copies == copies[:1]).all())


def work_together(rank: int, folder: Path) -> None:
    """Be process `rank`."""
    torch.set_num_threads(1)
    for world in WORLDS:
        if rank < world:
            meeting = f"file://{folder}/meeting_{world}"
            dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
            results = everything(Processes(), folder)
            if rank == 0:
                torch.save(results, folder / f"world_{world}.pt")
            dist.destroy_process_group()
