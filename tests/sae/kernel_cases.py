"""Kernels against dense products; `test_kernels.py` runs this file in a process of its own, interpreted or on a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from tests.interpreter import quicken
from tsae.config import run as configuration
from tsae.config.sections import SaeConfig
from tsae.sae.dictionary import top_k
from tsae.sae.init import new_dictionary
from tsae.sae.kernels import candidates, codes, contrast, nested_gradients, nested_residuals, radix, update
from tsae.sae.kernels.sums import bounds
from tsae.sae.selection.listed import listed_codes
from tsae.sae.selection.screens import round_rows
from tsae.sae.selection.top_k import Encoder, batch_top_k_codes, entries_above, top_k_codes
from tsae.sae.sparse import (
    ByLatent,
    SparseCode,
    add_rows,
    from_dense,
    kernels_for,
    kernels_that_run,
    row_squares,
    sampled_products,
    segment_sums,
    side_by_side,
    weighted_rows,
)
from tsae.training import temporal
from tsae.training.temporal import Pairs, _Logits, _LogitsOfMatches, contrastive, sparse_contrastive
from tsae.training.trainer import Trainer
from tsae.training.update import Adam, lay_out_by_latent, project_and_measure, whole_gradients

quicken()
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def ragged_code(rows: int, width: int) -> SparseCode:
    """Rows with no entry, with one, with more than a tile holds; latents that never fire, and one that always does."""
    dense = torch.relu(normal(rows, width))
    dense[dense < 1.5] = 0
    dense[0] = 0
    dense[1] = normal(width).abs() + 1
    dense[2:, 3] = 2.0
    dense[:, -1] = 0
    return from_dense(dense)


def test_kernels_are_what_runs() -> None:
    assert kernels_for(normal(1)) is not None
    assert kernels_for(normal(1).double()) is None
    assert kernels_for(normal(1).requires_grad_()) is None


@pytest.mark.parametrize("columns", [1, 5, 300])
def test_decode_of_ragged_rows(columns: int) -> None:
    code, matrix = ragged_code(7, 30), normal(30, columns)
    torch.testing.assert_close(weighted_rows(code, matrix), code.dense() @ matrix)


def test_decode_of_an_empty_code() -> None:
    code = from_dense(torch.zeros(3, 4, device=DEVICE))
    assert torch.equal(weighted_rows(code, normal(4, 6)), torch.zeros(3, 6, device=DEVICE))
    assert len(sampled_products(code, normal(3, 6), normal(4, 6))) == 0


@pytest.mark.parametrize("columns", [5, 300])
def test_what_nested_reconstructions_leave(columns: int) -> None:
    code, matrix, x = ragged_code(7, 30), normal(30, columns), normal(7, 2, columns, seed=2)[:, 1]
    parts = [slice(0, 4), slice(4, 21), slice(21, 30)]
    residuals, squares, alone = nested_residuals(*code[:3], matrix, x, parts, [0, 2])
    decoded = [code.dense()[:, part] @ matrix[part] for part in parts]
    expected = [x - sum(decoded[: p + 1]) for p in range(3)]
    torch.testing.assert_close(residuals, torch.stack(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(squares, torch.stack([each.square().sum() for each in expected]))
    of_groups = [(x - each).square().sum() for each in (decoded[0], decoded[1] + decoded[2])]
    torch.testing.assert_close(alone[[0, 2]], torch.stack(of_groups))


@pytest.mark.parametrize("columns", [5, 1100])
@pytest.mark.parametrize("predicts", [True, False])
def test_gradients_of_nested_reconstructions(columns: int, predicts: bool) -> None:
    residuals, factors, pairs = normal(3, 4, columns), normal(4, seed=1), normal(4, 2, columns, seed=2)
    current, partner = pairs.unbind(dim=1)
    found, squares = nested_gradients(residuals, factors, (current, partner) if predicts else None)
    expected = [sum(factors[q] * residuals[q] for q in range(p, 3)) for p in range(3)]
    if predicts:
        further = residuals[0] + partner - current
        expected[0] = expected[0] + factors[3] * further
        torch.testing.assert_close(squares, further.square().sum())
    assert (squares is not None) == predicts
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shifted", [True, False])
def test_squares_of_rows(shifted: bool) -> None:
    x, shift = normal(7, 2, 1100)[:, 1], normal(1100, seed=1) if shifted else None
    expected = (x - shift if shifted else x).square().sum(dim=1)
    torch.testing.assert_close(row_squares(x, shift), expected)


@pytest.mark.parametrize("columns", [1, 5, 300])
def test_sampled_products(columns: int) -> None:
    code, right = ragged_code(7, 30), normal(30, columns, seed=1)
    left = normal(7, 2, columns, seed=2)[:, 1]
    expected = (left @ right.T)[code.rows, code.latents]
    torch.testing.assert_close(sampled_products(code, left, right), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("in_order", [True, False])
def test_weight_gradients_fill_their_rows_and_no_others(in_order: bool) -> None:
    code, x = ragged_code(40, 30), normal(40, 7)
    gradient = torch.full((50, 7), 9.0, device=DEVICE)
    own = gradient[10:40]
    if in_order:
        ByLatent.of(code.rows, code.latents, 30).sum_rows(code.values, x, own, chunk=8)
    else:
        shuffled = torch.randperm(len(code.values), device=DEVICE)
        add_rows(code.rows[shuffled], code.latents[shuffled], code.values[shuffled], x, own)
    torch.testing.assert_close(own, code.dense().T @ x, rtol=1e-5, atol=1e-5)
    assert torch.equal(gradient[:10], torch.full_like(gradient[:10], 9))
    assert torch.equal(gradient[40:], torch.full_like(gradient[40:], 9))


def test_sums_in_order_are_the_same_bits_every_time() -> None:
    code, x = ragged_code(40, 30), normal(40, 7)
    by_latent, sums = ByLatent.of(code.rows, code.latents, 30), torch.empty(2, 30, 7, device=DEVICE)
    for out in sums:
        by_latent.sum_rows(code.values, x, out, chunk=8)
    assert torch.equal(*sums)


def test_segment_sums_with_empty_segments() -> None:
    values, offsets = normal(700), torch.tensor([0, 0, 3, 3, 600, 700, 700], device=DEVICE)
    expected = torch.stack([part.sum() for part in values.tensor_split(offsets[1:-1].tolist())])
    torch.testing.assert_close(segment_sums(values, offsets), expected)


def test_rounding_is_measured() -> None:
    matrix = normal(5, 37)
    low, norms, errors = round_rows(matrix)
    assert (low.float() - matrix).abs().max() < 2**-7 * matrix.abs().max()
    torch.testing.assert_close(errors, (low.float() - matrix).norm(dim=1))
    torch.testing.assert_close(norms, torch.maximum(matrix.norm(dim=1), low.float().norm(dim=1)))
    same, more, most = kernels_that_run(matrix).round_rows(matrix, 1.5, 0.1)
    assert torch.equal(same, low)
    torch.testing.assert_close(more, 1.5 * norms)
    torch.testing.assert_close(most, 1.5 * (errors + 0.1 * norms))


@pytest.mark.parametrize("guess", [0.0, 1.0, 100.0])
def test_candidates_are_all_entries_above_the_guess_in_order(guess: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = normal(11, 6), normal(70, 6, seed=1).T, normal(70, seed=2)
    weight, bias = weight.round(), bias.round()
    encoder = Encoder("float32")
    monkeypatch.setattr(encoder, "block_rows", lambda *_: 4)
    monkeypatch.setattr(candidates, "FIRST_ROOM", 1)
    monkeypatch.setattr(candidates, "TILE", 32)
    rows, latents, values = entries_above(encoder, x.round(), weight, bias, guess)
    dense = x.round() @ weight + bias
    expected = (dense > guess).nonzero(as_tuple=True)
    assert torch.equal(rows, expected[0])
    assert torch.equal(latents, expected[1])
    assert torch.equal(values, dense[expected])


def test_bits_are_listed_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "FIRST_ROOM", 1)
    monkeypatch.setattr(candidates, "TILE", 4)
    chosen = torch.rand(9, 300, generator=torch.Generator().manual_seed(0)) < 0.1
    chosen[2], chosen[4] = True, False
    bits = torch.zeros(9, 320, dtype=torch.int64)
    bits[:, :300] = chosen
    numbers = (bits.view(9, 10, 32) << torch.arange(32)).sum(dim=2)
    words = torch.where(numbers >= 2**31, numbers - 2**32, numbers).to(torch.int32).to(DEVICE)

    def fill(listed: candidates.List) -> None:
        for block in words.split(5):
            listed.add(block, 300)

    listed = candidates.Candidates().all(torch.zeros(9, device=DEVICE), 300, fill)
    rows, latents = chosen.nonzero(as_tuple=True)
    assert torch.equal(listed.rows.cpu(), rows)
    assert torch.equal(listed.latents.cpu(), latents)
    assert torch.equal(listed.ends().cpu(), chosen.sum(dim=1).cumsum(0))


def with_spare(code: SparseCode, spare: int) -> SparseCode:
    """As a selection makes it: what is empty comes last."""
    empty = code.latents.new_full((spare,), -1)
    return code._replace(
        latents=torch.cat([code.latents, empty]),
        values=torch.cat([code.values, empty * 0.0]),
        spare=True,
        known_rows=torch.cat([code.rows, empty + len(code.offsets) - 1]),
    )


def test_groups_of_a_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codes, "OF_ROW", 8)
    code, groups = ragged_code(7, 30), [slice(0, 4), slice(4, 21), slice(21, 30)]
    mass, numbers = with_spare(code, 3).of_groups(groups)
    expected = code.of_groups(groups)
    torch.testing.assert_close(mass, expected[0])
    assert torch.equal(numbers, expected[1])


def codes_of_pairs(rows: int = 9, width: int = 14) -> list[SparseCode]:
    """As the high-level split's of a selection: empty entries at the end of rows, between them, and after all."""
    pair = []
    for seed in range(2):
        dense = torch.relu(normal(rows, width, seed=seed) - 0.5)
        dense[1, :] = normal(width, seed=7).abs() + 0.1
        dense[4, :10] = 0
        code = from_dense(dense)
        pair.append(with_spare(code, 3).within(slice(0, 10)).code)
    return pair


def in_small_pieces(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Tiles smaller than the nine rows and columns, and so many rows' logits at a time."""
    for name, size in {"MATCHES": 2, "COLUMNS": 4, "TALL": 2, "WIDE": 4, "STRIP": 4}.items():
        monkeypatch.setattr(contrast, name, size)
    monkeypatch.setattr(temporal, "LOGITS_BYTES", rows * 9 * 4)


@pytest.mark.parametrize("rows", [4, 9])
@pytest.mark.parametrize("same_document", [True, False])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_the_contrastive_term_is_that_of_all_logits(
    similarity: str, same_document: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_small_pieces(monkeypatch, rows)
    high, other = codes_of_pairs()
    documents = None if same_document else torch.arange(9, device=DEVICE) // 3
    pairs = Pairs(normal(9, 2), normal(9, 2), documents, similarity, 0.5)
    found = sparse_contrastive(high, other, pairs, 0.7)
    dense = [code.dense().double().requires_grad_() for code in (high, other)]
    loss = 0.7 * contrastive(*dense, pairs)
    loss.backward()
    torch.testing.assert_close(found.loss.double(), loss, rtol=1e-6, atol=1e-6)
    for code, gradient, expected in zip((high, other), found[1:], dense, strict=True):
        at_entries = expected.grad[code.rows, code.latents].where(code.latents >= 0, 0)
        torch.testing.assert_close(gradient.double(), at_entries, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [2, 3])
def test_a_process_has_its_rows_of_the_logits_and_a_piece_of_each_column(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_small_pieces(monkeypatch, rows)
    high, other = (from_dense(code.dense()) for code in codes_of_pairs())
    own, documents = high.block(3, 6).code, torch.arange(9, device=DEVICE) // 2
    pair = [built(own, other, 3, 0.5, (documents[3:6], documents)) for built in (_Logits, _LogitsOfMatches)]
    for one, by_kernels in zip(*(logits.sums() for logits in pair), strict=True):
        torch.testing.assert_close(one, by_kernels)
    lse = normal(3).abs() + 3, normal(9).abs() + 3
    for one, by_kernels in zip(*(logits.gradients(*lse, 0.1) for logits in pair), strict=True):
        torch.testing.assert_close(one, by_kernels)


@pytest.mark.parametrize("kind", ["random", "ties", "negative"])
def test_exact_selection_is_that_of_float32(kind: str) -> None:
    x, weight, bias = normal(8, 12), normal(100, 12, seed=1).T, normal(100, seed=2)
    if kind == "ties":
        x, weight, bias = x.round(), weight.round(), bias.round()
    elif kind == "negative":
        bias -= 9
    dense = torch.relu((x.double() @ weight.double() + bias.double()).float())
    # The second guess is far too high, so that it takes several passes.
    first, second = (batch_top_k_codes(Encoder(), [x], weight, bias, 3, [guess])[0] for guess in (None, 30.0))
    top = dense.flatten().topk(24).values
    torch.testing.assert_close(first.code.values.sort(descending=True).values, top[top > 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first.code.values, dense[first.code.rows, first.code.latents], rtol=1e-5, atol=1e-5)
    assert torch.equal(first.code.dense(), second.code.dense())
    assert second.passes > 1


def test_exact_top_k_is_that_of_float32() -> None:
    x, weight, bias = normal(6, 12), normal(200, 12, seed=1).T, normal(200, seed=2)
    (selection,) = top_k_codes(Encoder(), [x], weight, bias, 3, [None])
    expected = top_k(torch.relu(x.double() @ weight.double() + bias.double()).float(), 3)
    torch.testing.assert_close(selection.code.dense(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("room", [1, 64])
@pytest.mark.parametrize(("precision", "per_token"), [("exact", False), ("exact", True), ("float32", False)])
@pytest.mark.parametrize("n_halves", [1, 2])
@pytest.mark.parametrize("kind", ["random", "ties", "negative"])
def test_a_selection_that_is_not_read_back_is_the_same(
    kind: str, precision: str, per_token: bool, room: int, n_halves: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two halves and two budgets, which end within a tile of the screen, or of one; tokens that select have one."""
    monkeypatch.setattr(candidates, "FIRST_ROOM", room)
    monkeypatch.setattr(codes, "PROGRAMS", 3)
    halves, weight, bias = normal(2, 5, 12), normal(100, 12, seed=1).T, normal(100, seed=2)
    halves[1] *= 2
    halves = halves[:n_halves]
    if kind == "ties":
        halves, weight, bias = (halves / 2).round(), (weight / 2).round(), bias.round()
    elif kind == "negative":
        bias -= 9
    one = per_token or n_halves == 1
    budgets = [(slice(0, 100), 3)] if one else [(slice(0, 30), 1), (slice(30, 100), 2)]
    select = top_k_codes if per_token else batch_top_k_codes
    parts = [
        select(Encoder(precision), list(halves), weight[:, latents], bias[latents], k, [None] * n_halves)
        for latents, k in budgets
    ]
    for first in (None, 30.0, 0.0):
        encoder, passes = Encoder(precision), 0
        guesses = None if first is None else halves.new_full((len(budgets), n_halves), first)
        while True:
            selection = listed_codes(encoder, halves, weight, bias, budgets, guesses, per_token)
            passes += 1
            guesses = selection.check.again(selection.check.counts.tolist(), passes)
            if guesses is None:
                break
        for half, code in enumerate(selection.codes):
            of_half = [part[half] for part in parts]
            expected = side_by_side([each.code for each in of_half])
            count = len(expected.values)
            assert len(code.values) == 15
            assert torch.equal(code.offsets, expected.offsets)
            assert torch.equal(code.latents[:count], expected.latents)
            assert torch.equal(code.values[:count], expected.values)
            assert (code.latents[count:] == -1).all()
            assert (code.values[count:] == 0).all()
            assert torch.equal(code.rows[:count], expected.rows)
            for budget, each in enumerate(of_half):
                assert torch.equal(selection.smallest[budget, half], each.code.smallest())
                assert float(selection.cuts[budget, half]) == each.cut
        assert passes > 1 or first != 30 or per_token


@pytest.mark.parametrize("counted", [4, 64])
def test_a_cut_is_found_digit_by_digit(counted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(radix, "COUNTED", counted)
    values = (normal(2, 9, 7).abs() + 0.1) * 10.0 ** normal(2, 9, 7, seed=1)  # from 1e-3 to 1e3
    values[0, 3:7, 2] = values[0, 0, 0]
    values[:, 4] = -torch.inf
    for wanted in ([1, 1], [5, 9], [7, 24], [24, 32], [25, 33]):
        listed = candidates.List(140, values.new_zeros(18, 2), bounds([slice(0, 3), slice(3, 7)], DEVICE))
        listed.rows[:126] = torch.arange(18, device=DEVICE).repeat_interleave(7)
        listed.latents[:126] = torch.arange(7, device=DEVICE).repeat(18)
        listed.values[126:] = 5.0  # of nobody
        listed._ends.append(torch.tensor([126], device=DEVICE))
        listed.values[:126] = values.flatten()
        found = radix.cuts(listed, listed.values, wanted, 2)
        for budget, latents in enumerate((slice(0, 3), slice(3, 7))):
            for half in range(2):
                ordered = values[half, :, latents].flatten().sort(descending=True).values
                assert found[budget, half] == ordered[wanted[budget] - 1]


@pytest.mark.parametrize("clip_norm", [0.5, 1e6])
@pytest.mark.parametrize("columns", [5, 300])
def test_an_update_is_that_of_torchs_operations(
    columns: int, clip_norm: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update, "FLAT", 4)
    single, double = (new_dictionary(SaeConfig(dict_size=7, k=3), columns, seed=0).to(DEVICE) for _ in range(2))
    double.double()
    optimizers = []
    for built in (single, double):
        built.W_dec.data *= 1.5
        lay_out_by_latent(built)
        optimizers.append(Adam(built.parameters(), lr=0.01, betas=(0.9, 0.999), fused=True))
    for step in range(3):
        norms = []
        for built, optimizer in zip((single, double), optimizers, strict=True):
            for number, parameter in enumerate(built.parameters()):
                gradient = normal(*parameter.shape, seed=10 * step + number)
                parameter.grad = torch.empty_like(parameter).copy_(gradient)
            gradients = whole_gradients(built, Tensor.detach)
            norms.append(project_and_measure(built, gradients, unit_rows=step > 0))
            optimizer.update(gradients, norms[-1], clip_norm, built.W_dec if step > 0 else None)
            for state in optimizer.state.values():
                state["step"] += 800 * step  # also where 1 − beta^step is no series any more
        torch.testing.assert_close(norms[0].double(), norms[1], rtol=1e-5, atol=1e-6)
        for one, other in zip(single.parameters(), double.parameters(), strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)
            for name in ("step", "exp_avg", "exp_avg_sq"):
                found, wanted = optimizers[0].state[one][name], optimizers[1].state[other][name]
                torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(single.W_dec.norm(dim=1), torch.ones(7, device=DEVICE), rtol=1e-6, atol=0)


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_training_step_equals_the_dense_definition(deterministic: bool) -> None:
    tree = {
        "sae": {"kind": "temporal", "dict_size": 45, "k": 5, "group_fractions": [0.5, 0.2, 0.3]},
        "objective": {"preset": "reference", "similarity": "cosine", "temperature": 0.5},
        "training": {"warmup_steps": 0, "lr": 0.01, "dead_after": 10, "batch_size": 6, "deterministic": deterministic},
    }
    batch = normal(6, 1, 12) + 0.5 * normal(6, 2, 12, seed=1)
    pair = []
    for engine in ("dense", "sparse"):
        tree["training"]["engine"] = engine
        built = Trainer(configuration.from_mapping(tree, "test"), 12, device=DEVICE)
        pair.append((built.step(batch), built))
    (dense, by_autograd), (sparse, by_kernels) = pair
    for name in ("loss", "l2_loss", "auxk_loss", "temp_loss", "grad_norm", "n_active"):
        torch.testing.assert_close(
            getattr(sparse, name).to(DEVICE),
            getattr(dense, name),
            rtol=1e-4,
            atol=1e-5,
            msg=name,
        )
    expected = dict(by_autograd.dictionary.named_parameters())
    for name, parameter in by_kernels.dictionary.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-5)
