"""The evaluation stage: held-out contexts of the store through a trained dictionary, to eval_results.json and .png."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from tsae.checkpoint import RunFolder, load_dictionary
from tsae.config.run import Counted, RunConfig
from tsae.evaluation import figure, ground_truth
from tsae.evaluation.held_out import held_out_batches, held_out_rows
from tsae.evaluation.identity import made_from, measured_with
from tsae.evaluation.loss_recovered import SequenceLosses, sequence_losses
from tsae.evaluation.results import loss_results, plain, summarise, truth_results
from tsae.evaluation.scores import Scores
from tsae.interop.origin import require_same_place
from tsae.parallel.group import Group, in_turns
from tsae.parallel.rendezvous import together
from tsae.runtime import metadata
from tsae.runtime.environment import own_device
from tsae.runtime.errors import TsaeError
from tsae.runtime.progress import Progress
from tsae.sae.dictionary import Dictionary
from tsae.sae.inference import reconstruct
from tsae.store import binding
from tsae.store.moments import moments_of
from tsae.store.reader import Store
from tsae.store.rolling import open_store


def evaluate(config: RunConfig, run: RunFolder) -> dict[str, Any]:
    """Measure the dictionary in `run` on the held-out part of its store; write and return the results.

    eval_results.json is written last: where it carries the hash of `config`, the evaluation is complete.
    Processes that were started together all call this and take batches of contexts in turns; the numbers are those
    of one process to the last bit, and the first one writes them.
    Raises TsaeError if the dictionary was trained on another place, does not fit the store, or nothing is held out.
    """
    run.require_same_training(config)
    binding.require_unchanged(run, config)
    with together(cpu=config.training.device == "cpu") as group:
        dictionary, written = load_dictionary(run.path, own_device(config.training.device, "training.device"))
        if run.training_hash() is None:  # of a run of ours, its hash says where it reads
            require_same_place(config, written, run.path)
        store = open_store(config)
        if dictionary.activation_dim != store.activation_dim:
            raise TsaeError(
                f"{run.path}: reads activations of {dictionary.activation_dim} dimensions, "
                f"the store {store.path} holds {store.activation_dim}"
            )
        scores, with_all = _score(config, run, dictionary, store, group)
        losses = None
        if config.evaluation.loss_recovered and not config.without_text:
            losses = _loss_recovered(config, run, dictionary, store, group)
        group.on_first(lambda: _write(config, run, dictionary, store, scores, with_all, losses))
    return run.read_results()


def _write(
    config: RunConfig,
    run: RunFolder,
    dictionary: Dictionary,
    store: Store,
    scores: Scores,
    with_all: Scores | None,
    losses: tuple[dict[str, tuple[float, float]], dict[str, int]] | None,
) -> None:
    results = summarise(scores, with_all)
    rows = held_out_rows(store, config.evaluation.sequences)
    every, counting = (store.valid(counted, rows) for counted in (Counted(config.data.skip_positions), config.counted))
    results["tokens_left_out"] = int((every & ~counting).sum())
    if config.is_synthetic:
        # No language model stands behind a synthetic world; the truth takes the place of its loss.
        results |= truth_results(ground_truth.measure(config, run, dictionary, store))
    if losses is not None:
        intervals, left_out = losses
        for name, interval in intervals.items():
            results[name], results["half_width_95"][name] = (plain(number) for number in interval)
        results["left_out"] |= left_out
        results["loss_ablation"] = config.evaluation.ablation
    results |= {
        "encode_rule": dictionary.encode_rule,
        "threshold": dictionary.scalar_threshold,
        "config_hash": config.evaluation_hash,
        "made_from": made_from(config, run),
        "measured_with": measured_with(config),
        "trained_on_other_data": binding.is_measured_elsewhere(run),
        **binding.inexact(run),
    }
    figure.draw(results, run.result("eval_results", "png"))
    metadata.write(run.eval_results, results)


def _score(
    config: RunConfig, run: RunFolder, dictionary: Dictionary, store: Store, group: Group
) -> tuple[Scores, Scores | None]:
    """Score the held-out contexts, one batch of sequences at a time; in the first process, those of all.

    Beside them, where tokens are left out, those contexts with all their tokens; contexts that lose none are not scored
    twice.
    """
    settings, counted, everything = config.evaluation, config.counted, Counted(config.data.skip_positions)
    rows = held_out_rows(store, settings.sequences)
    scores = _scored(config, run, dictionary, store, rows, counted, group)
    if counted.all_tokens:
        return scores, None
    short = rows[(store.valid(counted, rows) != store.valid(everything, rows)).any(1)]
    return scores, scores.with_all(_scored(config, run, dictionary, store, short, everything, group))


def _scored(
    config: RunConfig,
    run: RunFolder,
    dictionary: Dictionary,
    store: Store,
    rows: np.ndarray,
    counted: Counted,
    group: Group,
) -> Scores:
    scores, device = Scores(dictionary), dictionary.b_dec.device
    progress = Progress(f"evaluate {run.path.parent.name}", len(rows), "sequences", run.progress)
    for batch in group.polled(held_out_batches(store, rows, config.evaluation.batch_size, counted, group)):
        scores.add(batch.x.to(device), batch.lengths, batch.documents, batch.whole)
        progress.update(batch.sequences_done)
    scores.collect(group)
    return scores


def _loss_recovered(
    config: RunConfig, run: RunFolder, dictionary: Dictionary, store: Store, group: Group
) -> tuple[dict[str, tuple[float, float]], dict[str, int]] | None:
    """Losses of the language model on the first held-out sequences, with half-widths; in the first process."""
    from tsae.lm.model import load_language_model

    settings = config.evaluation
    model = load_language_model(config.model, store.attributes["model"].get("revision"))
    dictionary = dictionary.to(model.device)
    ablation = torch.zeros(dictionary.activation_dim)
    if settings.ablation == "mean":
        ablation = moments_of(store, config.counted).mean

    rows = held_out_rows(store, settings.loss_sequences)
    valid = store.valid(config.counted, rows)
    tokens, lengths, document = (
        torch.from_numpy(array[rows]) for array in (store.tokens, store.lengths, store.document)
    )
    progress = Progress(f"evaluate {run.path.parent.name}: loss recovered", len(rows), "sequences", run.progress)
    batches = []
    for start in group.polled(group.turns(len(rows), settings.batch_size)):
        part = slice(start, start + settings.batch_size)
        batches.append(
            sequence_losses(
                model,
                functools.partial(reconstruct, dictionary),
                tokens[part],
                lengths[part],
                document[part],
                torch.from_numpy(valid[part]),
                ablation,
            )
        )
        progress.update(min(part.stop, len(rows)))
    batches = in_turns(group.collect(batches))
    if not batches:
        return None
    losses = SequenceLosses(*(np.concatenate(column) for column in zip(*batches, strict=True)))
    # A sequence is one draw of the document that its valid part begins with.
    first = np.argmax(valid, axis=1)
    return loss_results(losses, document.numpy()[np.arange(len(rows)), first], settings.ablation)
