"""The sections of a run's configuration and what each setting means.

Each field is followed by the sentence that `--help` prints. The settings of synthetic worlds and of experiments stand
with what they belong to.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tsae.config.bounds import (
    Added,
    Bound,
    Count,
    Device,
    Fraction,
    Natural,
    NonNegative,
    OneOf,
    Positive,
    Seed,
    above,
    matching,
)
from tsae.config.paths import MODEL_FILES, Place
from tsae.runtime.errors import TsaeError, suggestion

UNITS = ("B", "kB", "MB", "GB", "TB")
SIZE = rf"(\d+(?:\.\d+)?) ?({'|'.join(UNITS[1:])})"
MEMORY = rf"(\d+|cpu)={SIZE}(, ?(\d+|cpu)={SIZE})*"
MEMORY_WORDS = "sizes of devices such as 0=20GB,1=20GB,cpu=60GB are expected"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The language model and the place where its activations are read."""

    name: Annotated[
        str,
        matching(r".*\S.*", "a hub id, a folder, a GGUF file or 'embedded' is expected"),
        Place(names=("embedded",), holds=MODEL_FILES, ending=".gguf"),
    ] = "embedded"
    """Hugging Face model id, a local folder in the hub's format, a `.gguf` file or a folder that holds one, or `embedded` (the small GPT-NeoX shipped inside)."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    layer: Natural = 2
    """Index of the block whose output is read: `hidden_states[layer + 1]` of the Hugging Face model."""
    hook_point: str | None = None
    """Path of any module to read instead of a block, such as `gpt_neox.layers.3.mlp`, or a name of TransformerLens and SAELens: `blocks.N.hook_resid_post`, `hook_resid_pre`, `hook_attn_out`, `hook_mlp_out`; `layer` is then only a label."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision in which the language model runs."""
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    """Attention kernel, where the model's own choice should be overruled."""
    device: Device = "auto"
    """`auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`."""
    device_map: Annotated[Literal["auto"] | None, Added(None)] = None
    """`auto`: the model is spread over all GPUs, then the CPU's memory, then the disk, as accelerate does it, and of a harvest what comes after the last place that is read stays on the disk; none: all of it is on `device`. With `device: cpu` no GPU is used."""
    max_memory: Annotated[Annotated[str, matching(MEMORY, MEMORY_WORDS)] | None, Added(None)] = None
    """How much of each device `device_map` may fill, such as `0=20GB,1=20GB,cpu=60GB` (GPUs by number; kB, MB, GB, TB: powers of ten); none: what is free."""
    batch_size: Count = 64
    """Sequences per forward pass."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text, and how it is cut into contexts."""

    source: Annotated[str, Place(names=("embedded", "synthetic", "store"))] = "embedded"
    """Hub dataset id, a local file or folder (jsonl, json, csv, tsv, parquet, arrow, txt, md; all but parquet and arrow also as .gz, .zst; what `datasets` wrote with `save_to_disk`), `embedded` (English documentation found on this machine), `synthetic` (no text and no language model: the world of the section `synthetic`), or `store` (nor here: the activations that lie at `store.path`, such as those that `tsae store import` wrote)."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset, or of a local folder whose files are named after splits."""
    text_field: str = "text"
    """Column that holds the text."""
    label_field: str | None = None
    """Column that holds a label of the document, kept beside the activations."""
    max_documents: Count | None = None
    """Stop after this many documents."""
    max_tokens: Count | None = None
    """Stop after this many tokens (whole contexts, after shuffling); local files are read wholly before, a hub dataset and the embedded corpus only as far as needed."""
    context_length: Count = 128
    """Tokens per context (L)."""
    min_length: Count = 16
    """Contexts with fewer tokens are dropped."""
    packing: Literal["split", "truncate", "concat"] = "split"
    """`split`: a document becomes as many contexts as it fills; `truncate`: its first context only; `concat`: documents follow each other without padding, so contexts cross documents (pairs never do)."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Begin each context with the tokenizer's BOS token; `auto` does what the tokenizer itself does."""
    skip_positions: Natural = 1
    """Leading positions of each context kept out of training and evaluation: BOS or, without one, the attention sink."""
    max_norm_multiple: Annotated[Literal["auto"] | Annotated[float, above(1)] | None, Added(None)] = "auto"
    """Tokens whose norm is more than so many times the median of the training tokens are kept out of training and evaluation: a few of them, wherever they stand in a context, can hold most of the squared norm. `auto`: 6, above all ordinary tokens of the models that were measured (4.3 times the median) and below their massive ones (9 times and more), but none for the presets `reference` and `paper`; none: no limit. Without effect on a synthetic world."""
    exclude_tokens: Annotated[tuple[Natural, ...], Added(())] = ()
    """Token ids that are kept out of training and evaluation wherever they stand."""
    holdout: Annotated[float, Bound(lambda share: 0 < share < 1, "a share between 0 and 1 is allowed")] = 0.1
    """Share of the documents that is kept for evaluation and never trained on."""
    seed: Seed = 0
    """Seed of the order of contexts and of the held-out choice; of everything in a synthetic world."""


WINDOW = rf"all|{SIZE}"
WINDOW_WORDS = "a size such as 200GB (kB, MB, GB, TB), a number of tokens, or all is expected"


def _is_window(value: str | int) -> bool:
    return value > 0 if isinstance(value, int) else re.fullmatch(WINDOW, value) is not None


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """The zarr store that holds the activations."""

    path: Annotated[str, Place(always=True)] | None = None
    """Folder of the store; by default under TSAE_HOME/stores, named after model, layer and content hash."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision on disk."""
    shard_mb: Count = 256
    """Largest size of one shard file in MB (10^6 bytes): the unit of writing, of resuming and of sharing a harvest. A small store is cut finer, into about 16 shards."""
    window: Annotated[int | str | None, Bound(_is_window, WINDOW_WORDS), Added(None)] = None
    """How much of the training part is on disk at a time: `200GB` (kB, MB, GB, TB: powers of ten) or a number of tokens. Activations are then harvested while training reads them and removed again for others; the held-out part is kept, beside the window. Batches are those of a full store, whatever the size. `all`: nothing is removed; none: the whole store is harvested before training."""

    def window_bytes(self, token_bytes: int) -> float:
        """The window in bytes, where a token takes so many; infinite where nothing is removed."""
        if self.window in (None, "all"):
            return math.inf
        if isinstance(self.window, int):
            return self.window * token_bytes
        number, unit = re.fullmatch(WINDOW, str(self.window)).groups()  # type: ignore[union-attr]
        return float(number) * 1000 ** UNITS.index(unit)


@dataclass(frozen=True, kw_only=True)
class KindSettings:
    """What other settings must know of a kind of SAE."""

    grouped: bool = False
    """Its latents lie in nested groups, the high-level split first."""
    temporal: bool = False
    """It is trained on pairs of tokens, with a temporal term."""
    penalised: bool = False
    """Its codes are sparse because of a term of the loss; else because the largest activations are selected."""
    needs_threshold: bool = False
    """It encodes by the threshold that training tracks."""


KIND_SETTINGS = {
    "temporal": KindSettings(grouped=True, temporal=True, needs_threshold=True),
    "matryoshka": KindSettings(grouped=True, needs_threshold=True),
    "batch_topk": KindSettings(needs_threshold=True),
    "topk": KindSettings(),
    "jump_relu": KindSettings(penalised=True),
    "gated": KindSettings(penalised=True),
    "standard": KindSettings(penalised=True),
    "standard_april": KindSettings(penalised=True),
}
"""The kinds of SAE; `tsae.sae.kinds.KINDS` has the class of each, and how it is trained."""


@dataclass(frozen=True, kw_only=True)
class SaeConfig:
    """The dictionary."""

    kind: Annotated[str, OneOf(KIND_SETTINGS)] = "temporal"
    """`temporal`: T-SAE; `matryoshka`: the same nested groups without the temporal term; `batch_topk`: one group; `topk`: k for every token; `jump_relu`, `gated`; `standard`: ReLU and L1; `standard_april`: the same as of Anthropic's April 2024 update."""
    dict_size: Count = 16384
    """Number of latents (F)."""
    k: Count = 20
    """Active latents per token, on average over a batch; where a penalty makes codes sparse, what it aims at."""
    split_fraction: Fraction = 0.2
    """Share of the latents in the high-level split (group 0); the rest is the low-level split."""
    group_fractions: tuple[float, ...] | None = None
    """Shares of more than two nested groups; replaces split_fraction."""

    @property
    def fractions(self) -> tuple[float, ...]:
        """Share of the latents of each group; they sum to 1."""
        if not KIND_SETTINGS[self.kind].grouped:
            return (1.0,)
        return self.group_fractions or (self.split_fraction, 1.0 - self.split_fraction)

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Latents of each group; rounding goes to the last group."""
        sizes = [int(fraction * self.dict_size) for fraction in self.fractions[:-1]]
        return (*sizes, self.dict_size - sum(sizes))


@dataclass(frozen=True, kw_only=True)
class TermSettings:
    """What other settings must know of a temporal term."""

    contrastive: bool = False
    """It tells a token's partner from each of the others, so that some of them can be left out."""
    predicts: bool = False
    """It takes the place of the high-level split's own reconstruction, of which its weight is the share."""


TERM_SETTINGS = {
    "prediction": TermSettings(predicts=True),
    "contrastive": TermSettings(contrastive=True),
    "linear": TermSettings(),
    "l2": TermSettings(),
    "l1": TermSettings(),
}
"""The temporal terms; `tsae.training.temporal.TERMS` has the formulas of each."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The training objective; `objective: NAME` alone takes a preset."""

    preset: Literal["predictive", "scale_free", "reference", "paper"] = "predictive"
    """`predictive`: ours, in which the high-level split reconstructs a token's neighbours; `scale_free`: the paper's contrast in a form that means the same for activations of any scale; `reference`: what the authors' released code computes; `paper`: what the paper's equations say. Other keys override it."""
    temporal: Annotated[str, OneOf(TERM_SETTINGS)] = "prediction"
    """Temporal term of a T-SAE. `prediction`: the high-level split reconstructs the token's partner in place of the token itself; `contrastive`: InfoNCE over the batch; `linear`: the mean similarity of all pairs of the batch minus that of the true pairs, without a logarithm; `l2`: the squared distance of the two codes (the paper's ablation without contrast); `l1`: their L1 distance weighted by the inputs' cosine (the released code's other branch). Another term than the preset's keeps the preset's weight, so name a preset that has it (`objective=scale_free`), or give temporal_alpha and temporal_anneal with it."""
    temporal_alpha: NonNegative = 1.5
    """Weight of the temporal term (α). That of `prediction`: 1 gives the prediction the weight that the high-level split's own reconstruction has without it; that one keeps max(0, 1 - α)."""
    temporal_anneal: Annotated[Positive, Added(1.0)] = 4.0
    """What temporal_alpha is multiplied with at the first step; the factor falls to 1, linearly, over the first half of the steps. Which features the high-level split takes is decided early, what they cost later; 1: a constant weight."""
    high_share: Annotated[Fraction | None, Added(None)] = 0.3
    """Share of sae.k that is selected in the high-level split of a T-SAE, the rest outside it, so that neither can take over; it does not follow sae.split_fraction. None: the largest activations of both together."""
    coarse_fraction: Annotated[Fraction | None, Added(None)] = 0.1
    """The first latents of the low-level split, as many as this share of all. Together with the high-level split they must also reconstruct the token, at a tenth of the weight of the full reconstruction: latents of general use, which `prediction` takes from the high-level split, then stand there. None: no such part."""
    similarity: Literal["dot", "cosine"] = "cosine"
    """Similarity of two high-level codes in the contrastive term."""
    temperature: Positive = 0.15
    """Divides the similarities before the softmax."""
    same_document: bool = True
    """Whether partners of the token's own document are negatives too, although they share what persists; false: those of other documents alone, in the contrastive form."""
    directions: Literal["mean", "sum"] = "mean"
    """How the two directions of the contrastive term (current to partner and back) are combined."""
    reconstruction: Literal["squared_error", "variance"] = "variance"
    """`variance`: divide reconstruction errors by the batch's variance, so that the weights of other terms mean the same for activations of any scale; without effect where a penalty makes codes sparse."""
    group_weights: Literal["fractions", "uniform", "ones"] | tuple[float, ...] = "fractions"
    """Weight of each nested reconstruction: the group's share, 1/G, 1, or a list."""
    group_reduction: Literal["mean", "sum"] = "mean"
    """How the weighted nested reconstruction losses are combined."""
    auxk_alpha: NonNegative = 1 / 32
    """Weight of the auxiliary loss that revives dead latents."""
    sparsity_penalty: NonNegative | None = None
    """Weight of the penalty of `standard`, `standard_april`, `gated` (L1) and `jump_relu` (squared relative distance of L0 from its target); none: 1 for `jump_relu`, and an L1 weight that is adjusted in training until target_l0 is reached."""
    target_l0: Positive | None = None
    """Active latents per token that the penalty aims at; by default sae.k."""
    sparsity_warmup_steps: Natural | None = None
    """Steps over which the penalty grows from 0; by default training.warmup_steps."""
    bandwidth: Positive = 0.001
    """Width of the kernel through which the thresholds of `jump_relu` get their gradient, in units of the (normalised) activations."""


_CONTRAST = {
    "temporal": "contrastive",
    "temporal_alpha": 0.1,
    "temporal_anneal": 1.0,
    "high_share": None,
    "coarse_fraction": None,
}
OBJECTIVE_PRESETS: dict[str, dict[str, Any]] = {
    "predictive": {},
    "scale_free": _CONTRAST,
    "reference": {**_CONTRAST, "similarity": "dot", "temperature": 1.0, "reconstruction": "squared_error"},
    "paper": {
        **_CONTRAST,
        "temporal_alpha": 1.0,
        "temperature": 1.0,
        "directions": "sum",
        "reconstruction": "squared_error",
        "group_weights": "ones",
        "group_reduction": "sum",
    },
}


@dataclass(frozen=True, kw_only=True)
class PairRuleSettings:
    """What other settings must know of a rule that pairs tokens."""

    numbered: bool = False
    """It is written with a number, at least 1: NAME:N."""
    paired: bool = True
    """It gives a token a partner, which a temporal SAE needs."""


PAIR_RULE_SETTINGS = {
    "previous": PairRuleSettings(),
    "random": PairRuleSettings(),
    "within": PairRuleSettings(numbered=True),
    "none": PairRuleSettings(paired=False),
}
"""The pair rules; `tsae.store.pairs.PAIR_RULES` has what each does."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Optimisation and bookkeeping."""

    steps: Count = 1000
    """Optimizer steps."""
    init_from: Annotated[str | None, Place(holds=("ae.pt", "trainer_0/ae.pt")), Added(None)] = None
    """Run whose weights training begins with, in place of random ones: its folder, or its name under TSAE_HOME/checkpoints. `sae.kind` must be of its class; with more latents than it has, its own come first in each group and the others begin afresh. Moments, threshold and schedules are new."""
    init_sha256: Annotated[str | None, Added(None)] = None
    """Content of those weights, which decides the run; filled in by itself, and checked where it is given."""
    batch_size: Count = 2048
    """Pairs (or single tokens) per step, over all processes."""
    lr: Positive | None = None
    """Learning rate; by default 2e-4 / sqrt(dict_size / 16384)."""
    bias_lr: NonNegative | None = None
    """Learning rate of b_enc and b_dec relative to that of the weight matrices; by default 1, or 0.3 where `objective.reconstruction` is `variance`: biases that adapt fast make frequent features crowd out others."""
    warmup_steps: Natural | None = None
    """Steps of linear warm-up; by default 1000, or a tenth of the steps where they are fewer than 10,000."""
    decay_start: Count | None = None
    """First step of the linear decay to zero; none: no decay."""
    pair_rule: str = "auto"
    """Partner of a token; `auto`: `within:16` where `objective.temporal` is `prediction`, else `previous`. `previous`, `random` (any earlier token of the document), `within:N` (at most N back) or `none` (single tokens)."""
    normalize: Literal["auto", "none", "mean_squared_norm", "unit_rms", "centred"] = "auto"
    """`auto`: `centred` with `objective: predictive`, `unit_rms` with any other whose `objective.reconstruction` is `variance`, else `none`; `mean_squared_norm`: train on activations divided by the root of their mean squared norm; `unit_rms`: scaled to a root mean square of 1 in each dimension, so that a mean squared norm of D remains; `centred`: the same about their mean, which is subtracted first: where it is far larger than what varies, latents die. Saved weights apply to raw activations either way."""
    threshold_beta: Annotated[float, Bound(lambda beta: 0 <= beta < 1, "a decay in [0, 1) is allowed")] = 0.999
    """Decay of the moving average of the inference threshold."""
    threshold_start_step: Natural | None = None
    """Step after which the threshold is tracked; by default 1000, or half of the steps where they are fewer than 2000."""
    dead_after: Count = 10_000_000
    """A latent is dead when it has not fired for this many tokens."""
    clip_norm: Positive | None = None
    """Bound on the gradient's norm; by default 1, or 0.005 where `objective.reconstruction` is `variance`: every step then reaches it, so that the first ones, whose gradients are far larger, do not shorten the next thousand by Adam's second moment."""
    seed: Seed = 0
    """Seed of the initial weights and of the order of pairs."""
    device: Literal["auto", "cpu"] = "auto"
    """`auto` (this process's GPU, else the CPU) or `cpu`."""
    precision: Literal["no", "bf16"] = "no"
    """`no`: float32; `bf16`: matrix products in bfloat16, parameters and sums stay float32. In the sparse engine it is the encoder product, as with `encoder_precision: bf16`."""
    engine: Literal["sparse", "dense"] = "sparse"
    """`sparse`: gradients at the selected entries only; `dense`: the readable definition, same numbers, several times slower."""
    encoder_precision: Literal["exact", "float32", "bf16"] = "exact"
    """Encoder product of the sparse engine. `exact`: float32 numbers, on CUDA and on processors with matrix units (AMX) from a bfloat16 product whose few candidates are computed again; `float32`: one float32 product; `bf16`: a bfloat16 product as it is, which selects a few per cent of other entries."""
    cuda_graphs: bool = True
    """On a GPU, record a step's launches and give them to it as a whole (the sparse engine in one process): the same numbers, without the host's time; false: one by one."""
    deterministic: bool = True
    """Sum the sparse engine's gradients in a fixed order on CUDA, so that the same run gives the same bits; false: atomic additions."""
    processes: Count | None = None
    """Processes that must train together, one GPU each (torchrun, accelerate, Slurm tasks); none: as many as were started. Results do not depend on it."""
    shard: Literal["none", "optimizer"] = "none"
    """What several processes divide among themselves, latent by latent. `optimizer`: Adam's moments and the update, so that a process of N keeps 1/N of half the training state; results do not change."""
    selection: Literal["global", "local"] = "global"
    """`global`: batch-top-k over the whole batch; `local`: over each process's share by itself, which saves a few small exchanges and lets results depend on the number of processes."""
    negatives: Literal["global", "local"] = "global"
    """`global`: a token's contrastive negatives are the partners of the whole batch; `local`: those of its process's share, which saves an exchange and lets results depend on the number of processes."""
    pool_sequences: Count = 16384
    """Sequences mixed at a time, over all processes; at least half the batch size mixes well. Twice as many are held in memory, on a GPU where half of what is free there holds them."""
    log_every: Count = 10
    """Steps between lines of metrics.jsonl."""
    save_steps: tuple[Natural, ...] = ()
    """Steps before which an intermediate checkpoint is written."""
    resume_every: Natural = 200
    """Steps between resumable states, of which one is left out while the one before it is still being written; 0: none but the one that a preempted run leaves."""
    resume_minutes: Positive | None = None
    """Minutes after which a resumable state is written, however few steps were done."""
    resume_keep: Count = 2
    """Resumable states that are kept: should the newest be damaged, the one before it serves."""
    keep_state: bool = False
    """Keep the state after the last step, three times the size of the weights: a finished run whose `steps` are raised then goes on from there. Its weights until then become a checkpoint of their step."""
    pack: Count = 1
    """Up to so many points of a sweep that read the same batches are trained in one process; results do not change."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Experiment trackers that are told the measures; their files lie in the run's folder."""
    wandb_project: Annotated[str | None, Added(None)] = None
    """Project in W&B; none: `WANDB_PROJECT`, else `tsae`. A run has its own name there, and its sweep as its group."""
    wandb_entity: Annotated[str | None, Added(None)] = None
    """User or team in W&B; none: `WANDB_ENTITY`, else the one of the key."""

    @property
    def warmup(self) -> int:
        """Steps of linear warm-up."""
        return min(1000, self.steps // 10) if self.warmup_steps is None else self.warmup_steps

    @property
    def threshold_start(self) -> int:
        """Step after which the threshold is tracked."""
        chosen = self.threshold_start_step
        return min(1000, self.steps // 2) if chosen is None else chosen


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Measures on the held-out part of the store."""

    sequences: Count = 512
    """Held-out contexts that are scored, at most."""
    batch_size: Count = 16
    """Contexts encoded at a time."""
    loss_recovered: bool = True
    """Splice reconstructions into the language model and measure its cross-entropy; without effect on a synthetic world, which has none."""
    loss_sequences: Count = 64
    """Contexts used for that."""
    ablation: Literal["zero", "mean"] = "zero"
    """What stands for 'no information' in the loss-recovered ratio."""


def parse_pair_rule(rule: str, where: str = "pair_rule") -> tuple[str, int]:
    """`"within:8"` → `("within", 8)`; a rule without a number has 0. Raises TsaeError."""
    name, colon, number = rule.replace(" ", "").partition(":")
    settings = PAIR_RULE_SETTINGS.get(name)
    if settings is not None and settings.numbered and re.fullmatch(r"0*[1-9][0-9]*", number):
        return name, int(number)
    if settings is not None and not settings.numbered and not colon:
        return name, 0
    rules = PAIR_RULE_SETTINGS.items()
    examples = [f"{known}:8" if kind.numbered else known for known, kind in rules]
    allowed = [f"{known}:N (N at least 1)" if kind.numbered else known for known, kind in rules]
    raise TsaeError(f"{where}: {rule!r} is not allowed; {suggestion(rule, examples)}allowed: {', '.join(allowed)}")
