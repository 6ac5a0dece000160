"""A local transformers model that answers prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tsae.config.sections import ModelConfig
from tsae.experiments.answers.prompts import Answer, Keep, Prompt
from tsae.runtime import preemption

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from tsae.config.experiments import AnswersConfig
    from tsae.lm.model import LanguageModel


class LocalModel:
    """A causal language model of this machine, loaded when the first prompt has no kept answer."""

    counts_by = "its tokenizer"

    def __init__(self, settings: AnswersConfig) -> None:
        self._settings = settings
        self._loaded: LanguageModel | None = None

    def tokens(self, prompts: Sequence[Prompt]) -> int:
        """Tokens of these prompts together, by the model's tokenizer alone."""
        from tsae.lm.model import load_tokenizer

        tokenizer = load_tokenizer(ModelConfig(name=str(self._settings.model)))
        return sum(len(_tokens(tokenizer, prompt)) for prompt in preemption.polled(prompts))

    def ask(self, prompts: Sequence[Prompt], keep: Keep) -> Iterator[tuple[int, Answer]]:
        """Index and answer of each prompt, a batch at a time; prompts longer than the model's context fail."""
        model = self._model()
        tokens = [_tokens(model.tokenizer, prompt) for prompt in prompts]
        fitting = []
        for index, (prompt, ids) in enumerate(zip(prompts, tokens, strict=True)):
            if model.max_length is not None and len(ids) + prompt.max_tokens > model.max_length:
                failure = f"{len(ids)} tokens and {prompt.max_tokens} to come; {self._settings.model} has {model.max_length} positions"
                yield index, Answer(None, failure)
            else:
                fitting.append(index)
        fitting.sort(key=lambda index: len(tokens[index]))  # little padding within a batch
        size = self._settings.batch_size
        for start in preemption.polled(range(0, len(fitting), size)):
            batch = fitting[start : start + size]
            texts = _generate(model, [tokens[i] for i in batch], max(prompts[i].max_tokens for i in batch))
            answered = list(zip(batch, map(Answer, texts), strict=True))
            for index, answer in answered:
                keep(index, answer)
            yield from answered

    def _model(self) -> LanguageModel:
        if self._loaded is None:
            import torch

            from tsae.lm.model import load_language_model

            model = ModelConfig(
                name=str(self._settings.model), layer=0, dtype="bfloat16" if torch.cuda.is_available() else "float32"
            )
            self._loaded = load_language_model(model)
        return self._loaded


def _tokens(tokenizer: PreTrainedTokenizerFast, prompt: Prompt) -> list[int]:
    """A prompt in the model's own chat format; a model without one gets the two texts as they are."""
    if tokenizer.chat_template is None:
        return list(tokenizer(f"{prompt.system}\n\n{prompt.user}\n\n")["input_ids"])
    messages = [{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _generate(model: LanguageModel, tokens: Sequence[Sequence[int]], most: int) -> list[str]:
    """Greedy continuations of prompts, left-padded so that all end at the same position."""
    import torch

    longest = max(map(len, tokens))
    ids = torch.zeros(len(tokens), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(tokens):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    with torch.no_grad():
        written = model.module.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=most,
            do_sample=False,
            pad_token_id=model.tokenizer.eos_token_id or 0,
        )
    return [str(model.tokenizer.decode(row[longest:], skip_special_tokens=True)).strip() for row in written]
