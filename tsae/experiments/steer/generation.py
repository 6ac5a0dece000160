"""Steering at the hook, and the texts generated under it: which conditions there are, from which prompts, and their tokens.

Shapes: N conditions, P prompts, T generated tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tsae.config.experiments import SteerConfig
from tsae.experiments.shared.subject import Subject
from tsae.experiments.steer.concepts import REAL, Direction, Uses
from tsae.runtime.errors import TsaeError
from tsae.runtime.preemption import polled
from tsae.runtime.progress import Progress
from tsae.sae.inference import encode_sparse, in_units_written
from tsae.sae.selection.top_k import Encoder

if TYPE_CHECKING:
    from tsae.experiments.shared.texts import TextActivations
    from tsae.lm.model import LanguageModel

NO_LATENT = -1


class Rows(NamedTuple):
    """What happens to each of R rows of a batch; a strength of 0 leaves the row as it is."""

    latents: Tensor
    """[R] the latent that is set; NO_LATENT where the strength is added along the vector, whatever the code is."""
    vectors: Tensor
    """[R, D]"""
    strengths: Tensor
    """[R]"""


class Steering:
    """Exchanges the activations [R, T, D] of a generation's successive steps, the prompt first."""

    def __init__(self, subject: Subject, rows: Rows, *, first_position: bool = False) -> None:
        self._subject, self._rows, self._first_position = subject, rows, first_position
        self._encoder = Encoder()
        self._begun = False

    def __call__(self, hidden: Tensor) -> Tensor:
        """The steered activations."""
        steered = hidden.float() + self._change(hidden)
        if not (self._begun or self._first_position):
            steered[:, 0] = hidden[:, 0].float()
        self._begun = True
        unsteered = (self._rows.strengths == 0).to(hidden.device)
        return torch.where(unsteered[:, None, None], hidden, steered.to(hidden))

    def _change(self, hidden: Tensor) -> Tensor:
        """[R, T, D] what is added."""
        rows = self._rows
        strength = rows.strengths[:, None].to(hidden.device, torch.float32)  # [R, 1]
        if bool((rows.latents != NO_LATENT).any()):
            strength = strength - self._activations(hidden)
        return strength[..., None] * rows.vectors[:, None].to(hidden.device, torch.float32)

    def _activations(self, hidden: Tensor) -> Tensor:
        """[R, T] what each row's latent writes; 0 for a row without one."""
        count, length, width = hidden.shape
        subject, device = self._subject, self._subject.device
        x = hidden.reshape(-1, width).to(device, torch.float32)
        code = in_units_written(encode_sparse(subject.dictionary, x, self._encoder), subject.row_norms)
        wanted = self._rows.latents.to(device).repeat_interleave(length)
        hits = code.latents == wanted[code.rows]
        found = torch.zeros(len(x), device=device)
        found[code.rows[hits]] = code.values[hits].float()
        return found.reshape(count, length).to(hidden.device)


class Condition(NamedTuple):
    """One way to steer at one strength; without a direction: the unsteered control."""

    direction: Direction | None
    strength: float
    multiple: float | None
    """The strength in units of the latent's, None if it was given as it is."""


class Prompts(NamedTuple):
    """What is continued."""

    texts: list[str]
    tokens: list[list[int]]
    """With BOS where the tokenizer puts one."""


class Generated(NamedTuple):
    """What came out."""

    tokens: np.ndarray
    """[N, P, T]"""
    loss: np.ndarray
    """[N, P] mean next-token loss under the unsteered model, in nats."""
    distinct_2: np.ndarray
    """[N, P]"""


def conditions(directions: Sequence[Direction], settings: SteerConfig) -> list[Condition]:
    """The control, and every direction at every strength."""
    found = [Condition(None, 0.0, None)]
    for direction in directions:
        found += [Condition(direction, multiple * direction.unit, multiple) for multiple in settings.multiples]
        found += [Condition(direction, strength, None) for strength in settings.strengths]
    return found


def find_prompts(subject: Subject, texts: TextActivations, uses: Uses, settings: SteerConfig) -> Prompts:
    """The prompts that were given, then the openings of texts of no other use. Raises TsaeError if these are too few."""
    tokenizer = subject.language_model.tokenizer
    bos = texts.tokens[0, :1].tolist() if texts.offsets[0, 0, 1] == 0 else []
    given = [
        [*bos, *tokenizer(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"]]
        for prompt in settings.prompts
    ]
    for prompt, tokens in zip(settings.prompts, given, strict=True):
        if not tokens:
            raise TsaeError(f"experiments.steer.prompts: '{prompt}' has no tokens")
    size = len(bos) + settings.prompt_tokens
    rows = _real_rows(texts, uses, size)
    if len(rows) < settings.text_prompts:
        raise TsaeError(
            f"experiments.steer.text_prompts: {len(rows)} texts are left for prompts, {settings.text_prompts} are asked "
            "for; raise experiments.texts.count"
        )
    chosen = np.random.default_rng(settings.seed).permutation(rows)[: settings.text_prompts]
    openings = [texts.tokens[row, :size].tolist() for row in chosen]
    names = [*settings.prompts, *(str(tokenizer.decode(tokens[len(bos) :])) for tokens in openings)]
    return Prompts(names, given + openings)


def real_text(subject: Subject, texts: TextActivations, uses: Uses, settings: SteerConfig) -> tuple[float, float]:
    """Loss and distinct-2 of real continuations of text openings, as long as those that are generated.

    Raises TsaeError if no text is as long.
    """
    first = settings.prompt_tokens
    rows = _real_rows(texts, uses, first + settings.tokens)
    if not len(rows):
        raise TsaeError(
            f"experiments.steer.tokens: no text has the {first + settings.tokens} tokens of a prompt and its continuation; "
            "generate fewer tokens, or raise experiments.texts.context_length"
        )
    tokens = torch.from_numpy(texts.tokens[rows, : first + settings.tokens]).long()
    loss = losses(subject.language_model, tokens, first, subject.config.model.batch_size)
    return float(loss.mean()), float(distinct(tokens[:, first:].numpy()).mean())


def _real_rows(texts: TextActivations, uses: Uses, tokens: int) -> np.ndarray:
    rows = uses.of(REAL, concepts_only=False)
    return rows[texts.lengths[rows] >= tokens]


def generate(subject: Subject, conditions: Sequence[Condition], prompts: Prompts, settings: SteerConfig) -> Generated:
    """Every prompt continued under every condition."""
    lm, total = subject.language_model, len(conditions) * len(prompts.tokens)
    progress, done = Progress("steer", total, "texts"), 0
    tokens = np.zeros((len(conditions), len(prompts.tokens), settings.tokens), np.int64)
    loss, distinct_2 = np.zeros(tokens.shape[:2]), np.zeros(tokens.shape[:2])
    tokens_at_once = subject.config.model.batch_size * subject.config.data.context_length
    for batch in polled(_batches(len(conditions), prompts, settings.tokens, tokens_at_once)):
        places = tuple(np.array(batch).T)
        start = torch.tensor([prompts.tokens[prompt] for _, prompt in batch])
        rows = _rows([conditions[condition] for condition, _ in batch], settings, lm.activation_dim)
        steering = Steering(subject, rows, first_position=settings.steer_first)
        with torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []):
            torch.manual_seed(settings.seed + done)
            text = lm.generate(start, settings.tokens, steering, **_sampling(settings)).cpu()
        tokens[places] = text[:, start.shape[1] :].numpy()
        loss[places] = losses(lm, text, start.shape[1], len(text))
        distinct_2[places] = distinct(tokens[places])
        done += len(batch)
        progress.update(done)
    return Generated(tokens, loss, distinct_2)


def _batches(count: int, prompts: Prompts, new: int, tokens_at_once: int) -> Iterator[list[tuple[int, int]]]:
    """(condition, prompt) in batches whose prompts have one length, so that no row is padded."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, tokens in enumerate(prompts.tokens):
        by_length[len(tokens)].append(index)
    for length, group in by_length.items():
        size = max(tokens_at_once // (length + new), 1)
        every = [(condition, prompt) for condition in range(count) for prompt in group]
        yield from (every[start : start + size] for start in range(0, len(every), size))


def _rows(conditions: Sequence[Condition], settings: SteerConfig, width: int) -> Rows:
    latents, vectors = [], []
    for direction in (condition.direction for condition in conditions):
        is_set = settings.mode == "set" and direction is not None and direction.latent is not None
        latents.append(direction.latent if is_set and direction is not None else NO_LATENT)
        vectors.append(torch.zeros(width) if direction is None else direction.vector)
    strengths = torch.tensor([condition.strength for condition in conditions])
    return Rows(
        torch.tensor([NO_LATENT if latent is None else latent for latent in latents]), torch.stack(vectors), strengths
    )


def _sampling(settings: SteerConfig) -> dict[str, Any]:
    """Options of generation: greedy, or drawn from the whole distribution."""
    if settings.temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": 1.0}


LARGEST_LOSS = 50.0  # nats; text so improbable that its probability underflows


def losses(lm: LanguageModel, tokens: Tensor, first: int, batch_size: int) -> np.ndarray:
    """[N] mean next-token loss in nats, under the model as it is, of the tokens [N, T] from position `first` on."""
    found = []
    for part in tokens.split(batch_size):
        logits = lm.logits(part, torch.full((len(part),), part.shape[1]))[:, first - 1 : -1].float()
        goal = part[:, first:].to(logits.device).long()
        found.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), goal, reduction="none").mean(1).cpu())
    return torch.cat(found).clamp(max=LARGEST_LOSS).double().numpy()


def distinct(tokens: np.ndarray, n: int = 2) -> np.ndarray:
    """[N] share of the n-grams of each row of tokens [N, T] that are different ones."""
    grams = np.lib.stride_tricks.sliding_window_view(tokens, n, axis=1)
    return np.array([len(np.unique(row, axis=0)) / len(row) for row in grams])
