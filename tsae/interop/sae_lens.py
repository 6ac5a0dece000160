"""Folders of SAELens 6 (github.com/decoderesearch/SAELens): cfg.json and sae_weights.safetensors, written and read.

A batch-top-k dictionary is written as SAELens writes its own: `jumprelu`, with the threshold repeated. Its architecture
named `temporal` is another method (Lubana et al. 2025, arXiv 2511.01836) and is neither written nor read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsae.checkpoint import RunFolder, save_run
from tsae.interop.folders import new_folder
from tsae.interop.origin import UNKNOWN, Origin, read_json
from tsae.interop.place import Place, find_place, hub_name
from tsae.interop.portable import Portable, has_unit_rows, portable, recentred, state_dict, with_unit_rows
from tsae.runtime import metadata as records
from tsae.runtime.errors import SLIP, TsaeError, suggestion
from tsae.runtime.files import write_json
from tsae.runtime.metadata import COUNT
from tsae.sae.dictionary import Dictionary, ThresholdDictionary
from tsae.sae.kinds import AutoEncoderTopK, TemporalMatryoshkaBatchTopKSAE, classes, from_state

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
SCALER = "activation_scaler.json"

VERSION = "6.54.12"
"""The release the format was tested with; below 6 SAELens would convert the file and drop our metadata."""

TENSORS = {
    "standard": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "topk": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "jumprelu": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
    "gated": ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"),
}

ELSEWHERE = "it reconstructs another place than the one it reads; "
"""What is wrong with a transcoder."""

KEYS = (
    *("architecture", "d_in", "d_sae", "dtype", "device", "metadata", "sae_lens_version"),
    *("apply_b_dec_to_input", "normalize_activations", "reshape_activations"),
)
OWN_KEYS = {"topk": ("k", "rescale_acts_by_decoder_norm")}
"""What an architecture's configuration holds beside KEYS."""
TRAINING_KEYS = (
    *("decoder_init_norm", "l1_coefficient", "l1_warm_up_steps", "lp_norm", "aux_loss_coefficient"),
    *("use_sparse_activations", "jumprelu_bandwidth", "jumprelu_init_threshold", "jumprelu_sparsity_loss_mode"),
    *("jumprelu_ste_to_input", "jumprelu_tanh_scale", "l0_coefficient", "l0_warm_up_steps", "target_l0"),
    "pre_act_loss_coefficient",
)
"""What checkpoints hold besides: it decided the training and changes nothing that a trained SAE computes."""

LOADING = (
    *("fold_ln", "center_unembed", "fold_value_biases", "refactor_factored_attn_matrices", "first_n_layers"),
    *("dtype", "torch_dtype", "attn_implementation", "default_padding_side", "default_prepend_bos"),
    *("device", "device_map", "n_devices", "move_to_device", "low_cpu_mem_usage", "use_safetensors"),
    *("trust_remote_code", "cache_dir", "local_files_only"),
)
"""Arguments that a language model is loaded with and that leave the places that are read here as they are."""


_ABOUT = {
    **dict.fromkeys(("model_name?", "hook_name?", "hook_point?", "hf_hook_name?", "hook_name_out?"), (None, str)),
    **dict.fromkeys(("dataset_path?", "tsae_dict_class?", "tsae_temporal?", "hf_hook_name_out?"), (None, str)),
    **dict.fromkeys(("context_size?", "tsae_k?"), (None, COUNT)),
    **{"prepend_bos?": (None, bool), "tsae_group_sizes?": (None, [COUNT]), "sae_lens_version?": (None, str)},
    "model_from_pretrained_kwargs?": (None, dict),
}
SHAPE = {
    **_ABOUT,
    **{"d_in": COUNT, "d_sae": COUNT, "metadata?": (None, _ABOUT), "activation_fn_kwargs?": (None, dict)},
    "apply_b_dec_to_input?": (None, bool, float),
}
"""What is relied on of a cfg.json of any version."""


def write(folder: Path, dictionary: Dictionary, origin: Origin, notes: dict[str, Any], where: str) -> None:
    """Fill `folder` with what `SAE.load_from_disk` reads; `notes` go into the metadata.

    Decoder rows get norm 1, except those of a top-k dictionary. Raises TsaeError while it is not calibrated.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    form = portable(dictionary, where)
    if form.architecture != "topk":
        form = with_unit_rows(form, where)
    tensors = {name: form.tensors[name].float().contiguous() for name in TENSORS[form.architecture]}
    try:
        save_file(tensors, folder / WEIGHTS)
    except SafetensorError as error:
        raise TsaeError(f"{folder / WEIGHTS}: cannot be written: {error}") from None
    settings: dict[str, Any] = {
        "architecture": form.architecture,
        "d_in": dictionary.activation_dim,
        "d_sae": dictionary.dict_size,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": form.centred,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    if form.k is not None:
        settings |= {"k": form.k, "rescale_acts_by_decoder_norm": False}
    first = origin.skip_positions
    metadata = {
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,
        "model_name": origin.lens_model,
        "model_class_name": "HookedTransformer",
        "hook_name": origin.lens_hook,
        "hf_hook_name": origin.module,
        "hook_head_index": None,
        "prepend_bos": origin.prepends_bos,
        "context_size": origin.context_length,
        "dataset_path": origin.dataset,
        "seqpos_slice": [first, None] if first else [None],
        "model_from_pretrained_kwargs": {},
        "neuronpedia_id": None,
        "tsae_commit": origin.commit,
        "tsae_dict_class": type(dictionary).__name__,
        "tsae_group_sizes": list(dictionary.group_sizes),
        "tsae_k": int(dictionary.k) if isinstance(dictionary, ThresholdDictionary) else None,
        "tsae_threshold": dictionary.scalar_threshold,
        "tsae_unit_decoder_rows": has_unit_rows(form),
        **notes,
    }
    write_json(folder / CONFIG, {**settings, "metadata": metadata})


def load(folder: str | Path) -> tuple[Dictionary, dict[str, Any]]:
    """The dictionary in a SAELens folder, and the config.json that this package would write for it.

    Encode and decode give what SAELens gives, to rounding. A folder that we wrote comes back as the class it was.
    Raises TsaeError for architectures, normalisations and tensors that have no exact counterpart here.
    """
    folder = Path(folder)
    config = records.read(folder / CONFIG, SHAPE)
    modern = _is_modern(config)
    if not modern:
        config = _modernised(config, str(folder / CONFIG))
    form = _form(folder, config)
    metadata = config.get("metadata") or {}
    if modern:  # older files mix an SAE's settings with those of its training
        _refuse_unknown_keys(config, str(folder / CONFIG))
    _refuse_other_activations(metadata, str(folder / CONFIG))
    name, form = _class_for(form, metadata)
    where = str(folder / WEIGHTS)
    k = metadata.get("tsae_k") if form.architecture == "jumprelu" else form.k
    state = state_dict(classes()[name].dictionary, form, k, metadata.get("tsae_group_sizes"))
    dictionary = from_state(name, state, k, where)
    dictionary.require_calibrated(where)
    return dictionary.eval().requires_grad_(False), imported_config(name, dictionary, config, str(folder / CONFIG))


def import_folder(source: str | Path, out: str | Path) -> Path:
    """Write the dictionary in a SAELens folder to the new run folder `out`, where every command finds it.

    The authors' folders and hub repositories need no import: they are read as they are. Raises TsaeError for what
    cannot be read exactly.
    """
    source = Path(source)
    if (source / RunFolder(source).config_json.name).is_file():
        raise TsaeError(f"{source}: is a run folder already (it holds config.json); every command reads it as it is")
    if not (source / CONFIG).is_file():
        raise TsaeError(f"{source}: no {CONFIG} here; a SAELens folder holds it and {WEIGHTS}")
    dictionary, config = load(source)
    with new_folder(out) as folder:
        # A run's files lie in trainer_0/ below its name.
        run = RunFolder(folder / "trainer_0")
        save_run(run, config, dictionary)
    return Path(out)


def _form(folder: Path, config: dict[str, Any]) -> Portable:
    """The numbers in the folder, with every setting either honoured or refused."""
    where = str(folder / CONFIG)
    architecture = config.get("architecture")
    if architecture not in TENSORS:
        checkpoint = "it is a training checkpoint: save it in SAELens with save_inference_model; "
        hints = {
            "temporal": "it is the attention-based SAE of Lubana et al., not a temporal SAE of this package; ",
            "batchtopk": checkpoint,
            "matryoshka_batchtopk": checkpoint,
        }
        transcoder = ELSEWHERE if "transcoder" in str(architecture) else ""
        hint = hints.get(str(architecture)) or transcoder or suggestion(architecture, TENSORS, SLIP)
        raise TsaeError(f"{where}: architecture {architecture!r} cannot be read; {hint}readable: {', '.join(TENSORS)}")
    if config.get("reshape_activations", "none") != "none":
        raise TsaeError(
            f"{where}: reshape_activations {config['reshape_activations']!r}: it reads attention heads, which this "
            "package does not; dictionaries on whole activation vectors ('none') can be read"
        )
    tensors = _tensors(folder / WEIGHTS, architecture)
    k = config.get("k") if architecture == "topk" else None
    if architecture == "topk" and not (isinstance(k, int) and k > 0):
        raise TsaeError(f"{where}: k is {k!r}; a topk SAE needs a positive whole number")
    d_in, d_sae = config.get("d_in"), config.get("d_sae")
    shapes = {"W_enc": [d_in, d_sae], "W_dec": [d_sae, d_in], "b_dec": [d_in]}
    for name, tensor in tensors.items():
        shape = shapes.get(name, [d_sae])
        if list(tensor.shape) != shape:
            raise TsaeError(f"{folder / WEIGHTS}: {name} has shape {list(tensor.shape)}; {CONFIG} says {shape}")
    form = Portable(architecture, bool(config.get("apply_b_dec_to_input", True)), k, tensors)
    if architecture == "topk" and config.get("rescale_acts_by_decoder_norm"):
        # Selected by activation times row norm and decoded by unit rows: scaled once, it is a plain top-k.
        form = with_unit_rows(form._replace(architecture="standard"), where)._replace(architecture="topk")
    return _without_normalisation(form, config.get("normalize_activations", "none"), folder)


def _refuse_unknown_keys(config: dict[str, Any], where: str) -> None:
    known = (*KEYS, *TRAINING_KEYS, *OWN_KEYS.get(config["architecture"], ()))
    unknown = [key for key, value in config.items() if key not in known and not _is_off(value)]
    if unknown:
        raise TsaeError(
            f"{where}: {unknown[0]}: unknown to this architecture, so that it may change what the SAE computes; "
            "save the SAE again in SAELens"
        )


def _refuse_other_activations(metadata: dict[str, Any], where: str) -> None:
    """Refuse what was trained on other activations than the Hugging Face model gives at one place."""
    loading = metadata.get("model_from_pretrained_kwargs") or {}
    for key, value in loading.items():
        if key not in LOADING and not _is_off(value):
            raise TsaeError(
                f"{where}: model_from_pretrained_kwargs: {key} is {value!r}: it was trained on activations that the "
                "model has only when it is loaded so; they cannot be read here"
            )
    if metadata.get("hook_head_index") is not None:
        raise TsaeError(
            f"{where}: hook_head_index {metadata['hook_head_index']}: it reads attention heads, which this package does "
            "not; dictionaries on whole activation vectors can be read"
        )
    for key in ("hook_name", "hf_hook_name"):
        out = metadata.get(f"{key}_out")
        if out and out != metadata.get(key):
            raise TsaeError(f"{where}: {key}_out: {ELSEWHERE}SAEs can be read")


def _is_off(value: object) -> bool:
    return value is None or value is False


def _tensors(path: Path, architecture: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise TsaeError(f"{path}: no such file; a SAELens folder holds {CONFIG} and {WEIGHTS}") from None
    except (SafetensorError, OSError) as error:
        raise TsaeError(f"{path}: not a readable safetensors file: {error}") from None
    scale = tensors.pop("scaling_factor", torch.ones(1))
    missing = [name for name in TENSORS[architecture] if name not in tensors]
    extra = [name for name in tensors if name not in TENSORS[architecture]]
    if missing or extra:
        raise TsaeError(
            f"{path}: not the weights of a {architecture} SAE: missing {missing or 'nothing'}, unexpected {extra or 'nothing'}"
        )
    if not bool((scale == 1).all()):
        raise TsaeError(f"{path}: latents carry a scaling_factor other than 1, which has no counterpart here")
    return {name: tensor.float() for name, tensor in tensors.items()}


def _without_normalisation(form: Portable, rule: object, folder: Path) -> Portable:
    """Fold a constant input scale into the weights; refuse what depends on the single activation."""
    if rule == "none":
        return form
    path = folder / SCALER
    if rule == "expected_average_only_in" and path.is_file():
        scale = read_json(path).get("scaling_factor")
        if not isinstance(scale, (int, float)) or not scale > 0:
            raise TsaeError(f"{path}: scaling_factor is {scale!r}; a positive number is expected")
        tensors = dict(form.tensors)
        tensors |= {"W_enc": tensors["W_enc"] * scale}
        tensors |= {name: tensors[name] / scale for name in ("W_dec", "b_dec")}
        return form._replace(tensors=tensors)
    remedy = f"{SCALER} with its factor is missing" if rule == "expected_average_only_in" else "it is not linear"
    raise TsaeError(
        f"{folder / CONFIG}: normalize_activations {rule!r} cannot be folded into the weights ({remedy}); "
        "fold it in SAELens and save again with 'none'"
    )


def _class_for(form: Portable, metadata: dict[str, Any]) -> tuple[str, Portable]:
    """The class that encodes by this architecture, and the numbers brought to its convention about centring."""
    if form.architecture == "gated":
        return "GatedAutoEncoder", recentred(form, True)
    if form.architecture == "topk":
        return "AutoEncoderTopK", recentred(form, True)
    if form.architecture == "standard":
        # AutoEncoder rescales decoder rows to norm 1, which would change the latents' units.
        if form.centred and has_unit_rows(form):
            return "AutoEncoder", form
        return "AutoEncoderNew", recentred(form, False)
    kind, threshold = classes().get(str(metadata.get("tsae_dict_class"))), form.tensors["threshold"]
    ours = kind.dictionary if kind is not None else Dictionary
    # Rows that were brought to norm 1 have thresholds of their own; in other units one is right for all.
    shared = form.centred and bool((threshold == threshold[-1]).all() or (threshold > 0).all())
    if issubclass(ours, ThresholdDictionary) and metadata.get("tsae_k") and shared:
        factor = torch.where(threshold == threshold[-1], 1, threshold[-1] / threshold)
        for name, by in (("W_enc", factor), ("b_enc", factor), ("W_dec", 1 / factor[:, None])):
            form.tensors[name] = form.tensors[name] * by
        form.tensors["threshold"] = threshold[-1].clone()
        # A top-k dictionary calibrated to a threshold: under its own name it would be read as top-k again.
        return ("BatchTopKSAE" if ours is AutoEncoderTopK else ours.__name__), form
    return "JumpReluAutoEncoder", recentred(form, False)


def _is_modern(config: dict[str, Any]) -> bool:
    """Whether a cfg.json has the form of version 6."""
    version = config.get("sae_lens_version") or (config.get("metadata") or {}).get("sae_lens_version") or "0"
    return bool(re.match(r"0*(\d+)", str(version))) and int(str(version).partition(".")[0]) >= 6


def _modernised(config: dict[str, Any], where: str) -> dict[str, Any]:
    """A cfg.json from before version 6 in the form of version 6. Raises TsaeError for activation functions it lost."""
    config = {**(config.get("metadata") or {}), **config}
    activation = config.get("activation_fn_str") or config.get("activation_fn") or "relu"
    architecture = config.get("architecture") or "standard"
    if activation == "topk":
        architecture = "topk"
        config["k"] = (config.get("activation_fn_kwargs") or {}).get("k")
    elif activation != "relu":
        raise TsaeError(f"{where}: activation_fn {activation!r} cannot be read; readable: relu, topk")
    if config.get("finetuning_scaling_factor"):
        raise TsaeError(
            f"{where}: finetuning_scaling_factor has no counterpart here; fold it in SAELens and save again"
        )
    normalisation = config.get("normalize_activations") or "none"
    hook = config.get("hook_name") or config.get("hook_point")
    head = config.get("hook_head_index", config.get("hook_point_head_index"))
    names: tuple[str, ...] = (
        "model_name",
        "dataset_path",
        "context_size",
        "prepend_bos",
        "neuronpedia_id",
        "hf_hook_name",
    )
    names += ("model_from_pretrained_kwargs", "hook_name_out", "hf_hook_name_out")
    return {
        **config,
        "architecture": architecture,
        "normalize_activations": "expected_average_only_in" if normalisation is True else normalisation,
        "reshape_activations": config.get("reshape_activations") or ("hook_z" if "hook_z" in str(hook) else "none"),
        "metadata": {"hook_name": hook, "hook_head_index": head, **{name: config.get(name) for name in names}},
    }


def imported_config(name: str, dictionary: Dictionary, config: dict[str, Any], where: str) -> dict[str, Any]:
    """The config.json of an imported dictionary of class `name`: what other loaders need, and the metadata as found.

    Raises TsaeError, naming `where`, for a place in the model that is the output of no module.
    """
    metadata = config.get("metadata") or {}
    model = hub_name(str(metadata.get("model_name") or UNKNOWN))
    hook = metadata.get("hf_hook_name") or metadata.get("hook_name")
    place = find_place(str(hook), model, where) if hook else Place(model, None)
    trainer: dict[str, Any] = {
        "trainer_class": classes()[name].trainer_class,
        "dict_class": name,
        "activation_dim": dictionary.activation_dim,
        "dict_size": dictionary.dict_size,
        "layer": place.block,
        "lm_name": model,
        "submodule_name": place.module if place.block is None else f"resid_post_layer_{place.block}",
        "device": "cpu",
    }
    if isinstance(dictionary, ThresholdDictionary):
        trainer["k"] = int(dictionary.k)
    if "group_sizes" in dictionary.file_tensors:
        trainer["group_sizes"] = list(dictionary.group_sizes)
    if isinstance(dictionary, TemporalMatryoshkaBatchTopKSAE):
        trainer["temporal"] = metadata.get("tsae_temporal", "p")
    buffer = {"ctx_len": metadata.get("context_size"), "dataset": metadata.get("dataset_path")}
    return {"trainer": trainer, "buffer": buffer, "sae_lens": metadata}
