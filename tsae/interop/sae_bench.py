"""A run as SAEBench's own evaluations take it: an SAE object, and the name by which they load its language model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tsae.interop.export import open_source, write
from tsae.runtime.errors import TsaeError


def for_sae_bench(
    run: str | Path,
    *,
    chunk: int | None = None,
    model: str | Path | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> tuple[str, Any]:
    """The `model_name` of SAEBench's settings, and the SAE (of SAELens' class) for the pair (name, SAE) that it evaluates.

    `run` is a folder or hub id, `chunk` takes one group of latents alone (0: the high-level split). A language model in
    a folder in the hub's format, the run's own or `model`, is made known to TransformerLens, which SAEBench loads all
    models with. Raises TsaeError where SAELens is missing, for a place that is no block's output, and as `export` does.
    """
    try:
        from sae_lens import SAE
        from transformer_lens import loading_from_pretrained as loading
    except ImportError:
        raise TsaeError(
            "SAEBench takes SAEs of SAELens' class, which is not installed; pip install 'tsae[sae-lens]'"
        ) from None

    source = open_source(run, chunk=chunk)
    source.origin.require_block(source.where, "SAEBench")
    with tempfile.TemporaryDirectory() as folder:
        write("sae_lens", Path(folder), source)
        sae = SAE.load_from_disk(folder, device=device)
    name = source.origin.lens_model if model is None else str(model)
    if Path(name).is_dir():
        name = str(Path(name).resolve())
        if name not in loading.OFFICIAL_MODEL_NAMES:
            loading.OFFICIAL_MODEL_NAMES.append(name)
    sae.cfg.metadata.model_name = name
    if sae.cfg.metadata.prepend_bos is None:
        sae.cfg.metadata.prepend_bos = True  # as the SAEs that it brings along say of themselves
    sae.cfg.dtype = dtype
    return name, sae
