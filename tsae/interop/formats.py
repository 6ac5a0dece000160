"""How exactly each class of dictionary survives each format: written, read back, and compared on random activations."""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tsae.checkpoint import load_dictionary
from tsae.interop import sae_lens
from tsae.interop.export import Source, write
from tsae.interop.origin import Origin, read_json
from tsae.interop.portable import Portable, encode, has_unit_rows, portable
from tsae.runtime.files import write_json
from tsae.sae.dictionary import Dictionary, ThresholdDictionary
from tsae.sae.init import random_dictionary
from tsae.sae.kinds import AutoEncoder, classes

TOLERANCE = 1e-6
ACTIVATION_DIM, DICT_SIZE, TOKENS = 64, 256, 512


class Row(NamedTuple):
    """One trip through a format; deviations are the largest difference over the largest value."""

    dict_class: str
    format: str
    read_by: str
    encode: float
    decode: float


Codec = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
"""Encode and decode."""


def deviations() -> Iterator[Row]:
    """Every class through every export format, and every SAELens architecture into a class.

    Where SAELens and dictionary_learning are installed, they read our exports, and SAELens checks our reading of its
    architectures.
    """
    x = torch.randn(TOKENS, ACTIVATION_DIM, generator=torch.Generator().manual_seed(1))
    for name in classes():
        dictionary = random_dictionary(name, ACTIVATION_DIM, DICT_SIZE)
        forms = classes()[name].formats
        yield from _exports(dictionary, x, "", forms)
        if isinstance(dictionary, ThresholdDictionary):
            # The objective `predictive` leaves rows their norms; formats with one threshold for all refuse those.
            forms = () if dictionary.selects_per_token else tuple(form for form in forms if form == "sae_lens")
        if not isinstance(dictionary, AutoEncoder):
            dictionary.W_dec.data *= torch.linspace(0.5, 2, DICT_SIZE)[:, None]
            yield from _exports(dictionary, x, ", free norms", forms)
    for architecture in sae_lens.TENSORS:
        for centred in (True, False):
            yield from _imports(_random_form(architecture, centred), x)


def _exports(dictionary: Dictionary, x: Tensor, note: str, forms: Iterable[str]) -> Iterator[Row]:
    name = type(dictionary).__name__
    source = Source(dictionary, _config(dictionary), ORIGIN, {}, {}, name)
    for form in forms:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            write(form, folder, source)
            # Formats with unit rows give each latent its row's norm as a factor.
            scaled = form != "reference" and not has_unit_rows(portable(dictionary, ""))
            norms = dictionary.W_dec.norm(dim=1) if scaled else torch.ones(1)
            expected: Codec = (_scaled(dictionary, norms), dictionary)
            loaded, _ = sae_lens.load(folder) if form == "sae_lens" else load_dictionary(folder)
            # What we read back may have other norms again, with one threshold for all.
            again = loaded.W_dec.norm(dim=1) if scaled else torch.ones(1)
            yield _row(name, form + note, "tsae", expected, (_scaled(loaded, again), loaded), x)
            if form == "sae_lens" and installed("sae_lens"):
                yield _row(name, form + note, "SAELens", expected, _by_sae_lens(folder), x)
            if form != "sae_lens" and installed("dictionary_learning"):
                codec = _by_dictionary_learning(folder)
                if codec is not None:
                    yield _row(name, form + note, "d._learning", expected, codec, x)


def _imports(form: Portable, x: Tensor) -> Iterator[Row]:
    from safetensors.torch import save_file

    title = f"sae_lens {form.architecture}, b_dec {'' if form.centred else 'not '}subtracted"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_file({name: tensor.contiguous() for name, tensor in form.tensors.items()}, folder / sae_lens.WEIGHTS)
        settings: dict[str, Any] = {"architecture": form.architecture, "apply_b_dec_to_input": form.centred}
        settings |= {"d_in": ACTIVATION_DIM, "d_sae": DICT_SIZE, "dtype": "float32"} | ({"k": form.k} if form.k else {})
        write_json(folder / sae_lens.CONFIG, {**settings, "metadata": {"sae_lens_version": sae_lens.VERSION}})
        loaded, _ = sae_lens.load(folder)
        found: Codec = (loaded.encode, loaded)
        expected: Codec = (
            lambda y: encode(form, y),
            lambda y: encode(form, y) @ form.tensors["W_dec"] + form.tensors["b_dec"],
        )
        yield _row(type(loaded).__name__, title, "tsae", expected, found, x)
        if installed("sae_lens"):
            yield _row(type(loaded).__name__, title, "SAELens", _by_sae_lens(folder), found, x)


@torch.no_grad()
def _row(name: str, form: str, reader: str, expected: Codec, found: Codec, x: Tensor) -> Row:
    errors = []
    for one, other in zip(expected, found, strict=True):
        value = one(x)
        errors.append(float((other(x) - value).abs().max() / value.abs().max()))
    return Row(name, form, reader, *errors)


def installed(library: str) -> bool:
    """Whether the library can be imported."""
    return importlib.util.find_spec(library) is not None


def _by_sae_lens(folder: Path) -> Codec:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens import SAE

        sae = SAE.load_from_disk(folder)
    return sae.encode, lambda y: sae.decode(sae.encode(y))


def _scaled(dictionary: Dictionary, factors: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: dictionary.encode(x) * factors


def _by_dictionary_learning(folder: Path) -> Codec | None:
    """None if the one that is installed does not know the class: temporal SAEs exist in the authors' fork only."""
    from dictionary_learning import utils

    if not hasattr(utils, read_json(folder / "config.json")["trainer"]["dict_class"]):
        return None
    dictionary, _ = utils.load_dictionary(str(folder), "cpu")
    return dictionary.encode, lambda y: dictionary.decode(dictionary.encode(y))


def _random_form(architecture: str, centred: bool) -> Portable:
    like = {"standard": "AutoEncoder", "topk": "AutoEncoderTopK", "jumprelu": "JumpReluAutoEncoder"}
    dictionary = random_dictionary(like.get(architecture, "GatedAutoEncoder"), ACTIVATION_DIM, DICT_SIZE, seed=2)
    form = portable(dictionary, architecture)
    tensors = {**form.tensors, "W_dec": form.tensors["W_dec"] * torch.linspace(0.5, 2, DICT_SIZE)[:, None]}
    return form._replace(centred=centred, tensors=tensors)


ORIGIN = Origin("EleutherAI/pythia-160m", 8, "gpt_neox.layers.8", None, 256, 1, False, None)


def _config(dictionary: Dictionary) -> dict[str, Any]:
    metadata = {"model_name": ORIGIN.lens_model, "hook_name": ORIGIN.lens_hook, "context_size": ORIGIN.context_length}
    return sae_lens.imported_config(type(dictionary).__name__, dictionary, {"metadata": metadata}, "config.json")
