"""The model card of a dictionary on the hub: what it is, how good it is, how to load it."""

from __future__ import annotations

import re
from typing import Any

import yaml

import tsae.evaluation.results  # noqa: F401  (declares what the table may hold)
from tsae.evaluation.measures import REGISTRY
from tsae.interop.export import Source

TITLES = {
    "TemporalMatryoshkaBatchTopKSAE": "Temporal Sparse Autoencoder ([arXiv 2511.05541](https://arxiv.org/abs/2511.05541))",
    "MatryoshkaBatchTopKSAE": "Matryoshka BatchTopK sparse autoencoder ([arXiv 2503.17547](https://arxiv.org/abs/2503.17547))",
    "BatchTopKSAE": "BatchTopK sparse autoencoder ([arXiv 2412.06410](https://arxiv.org/abs/2412.06410))",
    "AutoEncoderTopK": "TopK sparse autoencoder ([arXiv 2406.04093](https://arxiv.org/abs/2406.04093))",
    "JumpReluAutoEncoder": "JumpReLU sparse autoencoder ([arXiv 2407.14435](https://arxiv.org/abs/2407.14435))",
    "GatedAutoEncoder": "Gated sparse autoencoder ([arXiv 2404.16014](https://arxiv.org/abs/2404.16014))",
}


def card(source: Source, repo_id: str, licence: str | None, formats: list[str]) -> str:
    """README.md for the hub repository `repo_id`, whose sub-folders hold the dictionary in `formats` as well."""
    parts = [
        _front_matter(source, licence, formats),
        f"# {repo_id.rpartition('/')[2]}\n\n{_summary(source)}",
        _inference(source),
        _measures(source),
        _training(source),
        _loading(repo_id, formats, bool(source.explanations)),
        "## Licence\n\n"
        + (f"{licence}." if licence else "The uploader stated none; ask before you reuse the weights."),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(source: Source, licence: str | None, formats: list[str]) -> str:
    origin = source.origin
    tags = ["sparse-autoencoder", "interpretability"]
    if type(source.dictionary).__name__.startswith("Temporal"):
        tags.insert(1, "temporal-sae")
    if "sae_lens" in formats:
        tags.append("saelens")
    head: dict[str, Any] = {"library_name": "tsae", "tags": tags}
    if licence:
        head["license"] = licence
    if is_hub_id(origin.model):
        head["base_model"] = origin.model
    if is_hub_id(origin.dataset):
        head["datasets"] = [origin.dataset]
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---"


def is_hub_id(name: object) -> bool:
    """Whether `name` has the form owner/name of the hub."""
    return isinstance(name, str) and bool(re.fullmatch(r"[\w-]+(\.[\w-]+)*/[\w.-]+", name))


def _summary(source: Source) -> str:
    dictionary, origin = source.dictionary, source.origin
    title = TITLES.get(type(dictionary).__name__, "Sparse autoencoder")
    place = f"the output of block {origin.layer}" if origin.layer is not None else "activations"
    module = f" (`{origin.module}`)" if origin.module else ""
    text = (
        f"{title} with {dictionary.dict_size:,} latents for the {dictionary.activation_dim} dimensions of {place}{module} of "
        f"`{origin.model}`."
    )
    if len(dictionary.group_sizes) > 1:
        sizes = ", ".join(f"{size:,}" for size in dictionary.group_sizes)
        text += f" The latents lie in nested groups of {sizes}; the first is the high-level split."
    return text


def _inference(source: Source) -> str:
    dictionary, threshold = source.dictionary, source.dictionary.scalar_threshold
    rules = {
        "threshold": f"a latent is active where its rectified pre-activation is above **{threshold}** (strictly)",
        "top_k": f"the {source.config['trainer'].get('k')} largest rectified pre-activations of each token are kept",
        "relu": "every positive pre-activation is kept",
        "latent thresholds": "each latent has its own threshold (strict inequality)",
        "gate": "a latent is active where its gate is open and its magnitude positive",
    }
    centring = "`b_dec` is subtracted first. " if dictionary.centre_input else ""
    lines = [
        f"## Decode rule\n\nApplies to raw activations: nothing has to be normalised. {centring}Encoding: "
        f"{rules.get(dictionary.encode_rule, dictionary.encode_rule)}; `class {type(dictionary).__name__}`."
    ]
    l0 = source.results.get("l0")
    if l0 is not None:
        lines.append(f"With this rule {l0:.4g} latents are active per token on held-out text.")
    calibration = source.config.get("calibration")
    if calibration:
        lines.append(_calibration(calibration))
    return " ".join(lines)


def _calibration(record: dict[str, Any]) -> str:
    """Where the threshold comes from, and what calibrating changed."""
    target = record["target_l0"]
    how = "is the one that training tracked" if target is None else f"was set for {target:.4g} active latents per token"
    text = f"The threshold {how}, on {record['tokens']:,} held-out tokens: L0 {record['after']['l0']:.4g}, "
    text += f"fraction of variance explained {record['after']['fve']:.4f}"
    before = record["before"]
    if before:
        text += f" (before: L0 {before['l0']:.4g}, {before['fve']:.4f})"
    return text + "."


def _measures(source: Source) -> str:
    results = source.results
    rows = [
        f"| {measure.card} | {results[key]:.4g}{_half_width(results, key)} |"
        for key, measure in REGISTRY.items()
        if measure.card and isinstance(results.get(key), (int, float))
    ]
    if not rows:
        return "## Measures\n\nNot evaluated."
    counted = f"{results.get('contexts', '?')} held-out contexts of {results.get('documents', '?')} documents"
    return (
        f"## Measures\n\nOn {counted}, with the rule above; ± is the half-width of a 95 % interval over documents.\n\n"
        "| measure | value |\n|---|---|\n" + "\n".join(rows) + "\n\nAll of them: `eval_results.json`."
    )


def _half_width(results: dict[str, Any], key: str) -> str:
    width = (results.get("half_width_95") or {}).get(key)
    return "" if width is None else f" ± {width:.2g}"


def _training(source: Source) -> str:
    origin = source.origin
    settings = {key: value for key, value in source.config["trainer"].items() if value is not None}
    data = f"Text: `{origin.dataset or 'not recorded'}`"
    if origin.context_length:
        data += f", contexts of {origin.context_length} tokens"
    if origin.skip_positions:
        data += f", the first {origin.skip_positions} of each left out"
    if origin.commit:
        data += f". Code: `tsae` at commit {origin.commit}"
    table = "\n".join(f"| {key} | `{value}` |" for key, value in settings.items())
    return f"## Training\n\n{data}.\n\n| setting | value |\n|---|---|\n{table}"


def _loading(repo_id: str, formats: list[str], explained: bool) -> str:
    lines = [
        "## Loading\n\n```python\nfrom tsae import load_dictionary\n",
        f'dictionary, config = load_dictionary("{repo_id}")',
        "f = dictionary.encode(x)       # x: [..., activation_dim], f: [..., dict_size]",
        "high = f[..., dictionary.group_slices[0]]",
        "x_hat = dictionary.decode(f)\n```",
    ]
    if explained:
        lines.append('\nWhat latents respond to is in `explanations.json`: {"<latent>": "<text>"}.')
    if "sae_lens" in formats:
        lines.append(
            "\nWith SAELens:\n\n```python\nfrom sae_lens import SAE\n\n"
            f'sae = SAE.from_pretrained("{repo_id}", "sae_lens")\n```'
        )
    if "sae_bench" in formats:
        lines.append("\n`sae_bench/` is for SAEBench's loader of dictionary_learning folders.")
    return "\n".join(lines)
