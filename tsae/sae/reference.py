"""What the reference implementation calls things: the keys of its config.json."""

from __future__ import annotations

from typing import Any

from tsae.config.run import RunConfig, group_weights, left_out_settings
from tsae.config.sections import KIND_SETTINGS, TERM_SETTINGS
from tsae.sae.kinds import KINDS


def reference_config(config: RunConfig, activation_dim: int, norm_factor: float = 1.0) -> dict[str, Any]:
    """The content of config.json: every key the reference's scripts read, and those it forgot to write.

    `norm_factor` is what activations were divided by in training, after `normalize: centred` has subtracted their mean;
    the files are for raw activations all the same.
    """
    kind = KIND_SETTINGS[config.sae.kind]
    trainer = _common_keys(config, activation_dim) | {"norm_factor": norm_factor, "normalize": config.normalize}
    trainer |= _penalty_keys(config) if kind.penalised else _selection_keys(config, activation_dim)
    if kind.grouped:
        trainer |= _group_keys(config)
    if kind.temporal:
        trainer |= _temporal_keys(config)
    return {"trainer": trainer, "buffer": _buffer_keys(config, activation_dim)}


def _common_keys(config: RunConfig, activation_dim: int) -> dict[str, Any]:
    sae, training = config.sae, config.training
    kind = KINDS[sae.kind]
    return {
        "trainer_class": kind.trainer_class,
        "dict_class": kind.dictionary.__name__,
        "lr": training.lr or 2e-4 / (sae.dict_size / 16384) ** 0.5,
        "steps": training.steps,
        "warmup_steps": training.warmup,
        "decay_start": training.decay_start,
        "seed": training.seed,
        "activation_dim": activation_dim,
        "dict_size": sae.dict_size,
        "device": "cpu",
        "layer": config.model.layer,
        "lm_name": config.data.source if config.without_text else config.model.name,
        "wandb_name": kind.dictionary.__name__,
        "submodule_name": config.model.hook_point or f"resid_post_layer_{config.model.layer}",
        # The reference leaves these out although they decide the result.
        "dead_feature_threshold": training.dead_after,
        "pair_rule": config.pair_rule,
        "bias_lr": config.bias_lr,
    }


def _selection_keys(config: RunConfig, activation_dim: int) -> dict[str, Any]:
    """Of kinds that select the largest activations."""
    return {
        "k": config.sae.k,
        "reconstruction": config.objective.reconstruction,
        "auxk_alpha": config.objective.auxk_alpha,
        "top_k_aux": activation_dim // 2,
        "threshold_beta": config.training.threshold_beta,
        "threshold_start_step": config.training.threshold_start,
        "selection": config.training.selection,
    }


def _penalty_keys(config: RunConfig) -> dict[str, Any]:
    """Of kinds that are sparse because of a penalty; an L1 weight of none was adjusted to reach the target."""
    objective, warmup = config.objective, config.objective.sparsity_warmup_steps
    keys = {
        "target_l0": objective.target_l0 or config.sae.k,
        "sparsity_warmup_steps": config.training.warmup if warmup is None else warmup,
    }
    weight = KINDS[config.sae.kind].penalty_weight
    if weight is None:
        return {**keys, "l1_penalty": objective.sparsity_penalty}
    weight = weight if objective.sparsity_penalty is None else objective.sparsity_penalty
    return {**keys, "sparsity_penalty": weight, "bandwidth": objective.bandwidth}


def _group_keys(config: RunConfig) -> dict[str, Any]:
    return {
        "group_fractions": list(config.sae.fractions),
        "group_weights": list(group_weights(config)),
        "group_sizes": list(config.sae.group_sizes),
        "group_reduction": config.objective.group_reduction,
    }


def _temporal_keys(config: RunConfig) -> dict[str, Any]:
    objective, rule = config.objective, config.pair_rule
    return {
        "temporal": {"previous": "p", "random": "r"}.get(rule, rule),
        "temp_alpha": objective.temporal_alpha,
        "temp_anneal": objective.temporal_anneal,
        "temporal_term": objective.temporal,
        "high_share": objective.high_share,
        "coarse_fraction": objective.coarse_fraction,
        "contrastive": TERM_SETTINGS[objective.temporal].contrastive,
        "similarity": objective.similarity,
        "temperature": objective.temperature,
        "same_document": objective.same_document,
        "directions": objective.directions,
        "negatives": config.training.negatives,
    }


def _buffer_keys(config: RunConfig, activation_dim: int) -> dict[str, Any]:
    return {
        "d_submodule": activation_dim,
        "io": "out",
        "n_ctxs": config.training.pool_sequences,
        "ctx_len": config.data.context_length,
        "refresh_batch_size": config.model.batch_size,
        "out_batch_size": config.training.batch_size,
        "device": "cpu",
        "dataset": config.data.source,
        **left_out_settings(config),
    }
