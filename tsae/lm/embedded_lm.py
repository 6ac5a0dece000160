"""The embedded language model: a small GPT-NeoX over the embedded corpus, shipped with the package.

`tsae embedded-lm` makes it again: tokenizer, weights (bfloat16) and a recipe with its measured figures.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsae.config import schema
from tsae.config.sections import DataConfig
from tsae.runtime.errors import TsaeError
from tsae.runtime.files import write_atomically, write_json
from tsae.runtime.progress import Progress

if TYPE_CHECKING:
    from transformers import GPTNeoXForCausalLM, PreTrainedTokenizerFast

    from tsae.lm.embedded_text import Rows
    from tsae.lm.pretraining import Recipe

TOKENS = 10_000_000
CHECKPOINT_MINUTES = 10.0
PROBED_LAYER = 2
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "scikit-learn")


def train_embedded_lm(
    out: Path, tokens: int = TOKENS, seed: int = 0, data: DataConfig | None = None, **settings: Any
) -> dict[str, Any]:
    """Train the embedded language model into `out` (a folder in the hub's format) and return its recipe.

    One torch thread; every few minutes the unfinished model is written beside `out` as `<out>.unfinished`. `data` names
    another text than the embedded corpus; `settings` are further fields of Recipe. Raises TsaeError when `out` is not
    empty, and for less than one token.
    """
    import torch

    from tsae.lm.pretraining import Recipe, initial_model

    if tokens < 1:
        raise TsaeError(f"--tokens {tokens} is impossible; it must be at least 1 (the one that ships: {TOKENS:,})")
    if out.exists() and any(out.iterdir()):
        raise TsaeError(f"{out}: is not empty; name a new folder")
    recipe = Recipe(tokens=tokens, seed=seed, **settings)
    torch.set_num_threads(1)
    tokenizer, train, heldout, text = _prepare(data or DataConfig(), recipe)
    model = initial_model(recipe)
    training = _pretrain(model, train, recipe, tokenizer, _unfinished(out))
    weights_sha256 = save_folder(model, tokenizer, out)
    record = {
        "recipe": schema.to_plain(recipe),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "text": text,
        "training": training,
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "heldout": measure(out, train, heldout, recipe),
        "weights_sha256": weights_sha256,
    }
    write_json(out / "recipe.json", record)
    shutil.rmtree(_unfinished(out), ignore_errors=True)
    return record


def _unfinished(out: Path) -> Path:
    return out.with_name(out.name + ".unfinished")


def _prepare(data: DataConfig, recipe: Recipe) -> tuple[PreTrainedTokenizerFast, Rows, Rows, dict[str, Any]]:
    """Tokenizer (from the training documents alone), training rows, held-out rows, and their description."""
    from tsae.data.documents import fingerprint, read_documents
    from tsae.lm.embedded_text import SPLIT_RULE, is_held_out, make_rows, train_tokenizer

    documents = list(read_documents(data))
    train = [document for document in documents if not is_held_out(document.text)]
    heldout = [document for document in documents if is_held_out(document.text)]
    if not train or not heldout:
        raise TsaeError(f"data.source: {len(documents)} documents in {data.source} are too few to hold one in 20 out")
    label_names = tuple(sorted({document.label or "" for document in documents}))
    tokenizer = train_tokenizer((document.text for document in train), recipe.vocabulary, recipe.context_length)
    cut = (tokenizer, label_names, recipe.context_length, recipe.min_length)
    train_rows, heldout_rows = make_rows(train, *cut), make_rows(heldout, *cut)
    text = {
        "source": data.source,
        "fingerprint": fingerprint(data),
        "python": platform.python_version(),
        "split": SPLIT_RULE,
        "documents": {"train": len(train), "heldout": len(heldout)},
        "tokens": {"train": int(train_rows.lengths.sum()), "heldout": int(heldout_rows.lengths.sum())},
        "topics": list(label_names),
    }
    return tokenizer, train_rows, heldout_rows, text


def _pretrain(
    model: GPTNeoXForCausalLM, rows: Rows, recipe: Recipe, tokenizer: Any, unfinished: Path
) -> dict[str, Any]:
    from tsae.lm.pretraining import pretrain

    progress = Progress("embedded-lm", recipe.tokens, "tokens")
    began, cpu, saved = time.monotonic(), time.process_time(), time.monotonic()

    def report(step: int, seen: int, loss: float) -> None:
        nonlocal saved
        progress.update(seen, step=step, loss=loss)
        if time.monotonic() - saved > 60 * CHECKPOINT_MINUTES:
            saved = time.monotonic()
            save_folder(model, tokenizer, unfinished)

    steps, seen = pretrain(model, rows, recipe, report)
    return {
        "steps": steps,
        "tokens_seen": seen,
        "epochs": round(seen / int(rows.lengths.sum()), 2),
        "precision": "float32 weights, bfloat16 autocast; shipped as bfloat16",
        "threads": 1,
        "wall_seconds": round(time.monotonic() - began),
        "cpu_seconds": round(time.process_time() - cpu),
    }


def save_folder(model: GPTNeoXForCausalLM, tokenizer: Any, out: Path) -> str:
    """Write config, tokenizer and bfloat16 weights, readable by everyone; returns the sha256 of the weights' file."""
    import torch
    from safetensors.torch import save

    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(out)
    state = {name: value.detach().to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    packed = save(state, metadata={"format": "pt"})
    write_atomically(out / "model.safetensors", lambda stream: stream.write(packed))
    for path in out.iterdir():
        os.chmod(path, 0o644)
    return hashlib.sha256(packed).hexdigest()


def measure(folder: Path, train: Rows, heldout: Rows, recipe: Recipe) -> dict[str, Any]:
    """Held-out figures of the weights as written to `folder`, beside the baselines on the same rows."""
    import torch
    from transformers import AutoModelForCausalLM

    from tsae.lm.embedded_text import ngram_losses
    from tsae.lm.pretraining import initial_model, mean_loss
    from tsae.lm.topic_probe import majority_share, probe_accuracy

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    unigram, bigram = ngram_losses(train, heldout, recipe.vocabulary)
    return {
        "loss_nats": round(mean_loss(model, heldout), 4),
        "unigram_loss_nats": round(unigram, 4),
        "bigram_loss_nats": round(bigram, 4),
        "topic_probe": {
            "layer": PROBED_LAYER,
            "trained": round(probe_accuracy(model, train, heldout, PROBED_LAYER), 4),
            "random_init": round(probe_accuracy(initial_model(recipe).eval(), train, heldout, PROBED_LAYER), 4),
            "majority": round(majority_share(heldout), 4),
        },
    }
