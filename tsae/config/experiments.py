"""The settings of the experiments: the section `experiments` of a run's configuration, one part for each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tsae.config.bounds import (
    Added,
    Bound,
    Count,
    Fraction,
    Natural,
    NonNegative,
    Positive,
    SmallSeed,
    at_least,
    some,
)
from tsae.config.paths import MODEL_FILES, Place
from tsae.runtime.errors import TsaeError
from tsae.runtime.secrets import holds_key

Dataset = Annotated[str, Place(names=("embedded", "finefineweb", "wikipedia", "mmlu", "pile", "pile-10k", "hh-rlhf"))]
Draws = Annotated[int, at_least(100)]
"""Of an interval; fewer give none."""
Strengths = Annotated[
    tuple[float, ...], Bound(lambda given: min(given, default=0) >= 0, "strengths of at least 0 are expected")
]
PositiveShare = Annotated[float, Bound(lambda share: 0 < share <= 1, "a share above 0 and up to 1 is allowed")]
Address = Annotated[
    str,
    Bound(
        lambda address: not holds_key(address),
        "an address without name, password or query is expected; key_variable names the variable that holds a key",
    ),
]


@dataclass(frozen=True, kw_only=True)
class AnswersConfig:
    """A language model that is asked for explanations and judgements."""

    backend: Literal["none", "local", "endpoint", "replay"] = "none"
    """Who answers: nobody, a local transformers model, an OpenAI-compatible endpoint, or recorded answers."""
    model: Annotated[str, Place(holds=MODEL_FILES)] | None = None
    """Hub id, folder or GGUF file of a local model; the endpoint's name of one; of recorded answers, the name they are kept under."""
    base_url: Address | None = None
    """Address of the endpoint up to /v1, such as http://localhost:8000/v1."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key; where it is not set, no key is sent."""
    concurrency: Count = 8
    """Requests to the endpoint at a time."""
    timeout: Positive = 120.0
    """Seconds after which a request to the endpoint has failed."""
    tries: Count = 6
    """Attempts at a request that the endpoint answers with 429 or 5xx, not in time or not with JSON; waits double."""
    max_tokens: Annotated[Count | None, Added(None)] = None
    """Longest answer in tokens, thinking included; by default 400 for an explanation, 200 for verdicts, 16 for grades."""
    batch_size: Count = 8
    """Prompts that a local model answers at a time."""
    prompt_price: Annotated[NonNegative, Added(0.0)] = 0.0
    """Price of a million tokens of prompts, in any currency: `tsae explain` then says first what it costs."""
    answer_price: Annotated[NonNegative, Added(0.0)] = 0.0
    """Price of a million tokens of answers."""
    recorded: Annotated[str, Place(always=True)] | None = None
    """File or folder of recorded answers (JSON lines, as the cache under TSAE_HOME/answers keeps them)."""

    def require_whole(self, where: str) -> None:
        """Raise TsaeError if the backend needs what is not given; `where` is the key path of these settings."""
        needed = {"none": (), "local": ("model",), "endpoint": ("model", "base_url"), "replay": ("model", "recorded")}
        for name in needed[self.backend]:
            if not getattr(self, name):
                raise TsaeError(f"{where}.{name}: is needed for the backend {self.backend}")


@dataclass(frozen=True, kw_only=True)
class TextsConfig:
    """The labelled texts that experiments share: their activations are harvested once for all runs."""

    count: Count = 700
    """Texts that are read, at most; equal shares of the classes."""
    classes: tuple[str, ...] | None = None
    """Labels to read; by default those that the paper takes of the dataset, or all."""
    context_length: Annotated[int, at_least(2)] = 128
    """Tokens of each text that the language model reads, at most."""
    min_characters: Count = 200
    """Shorter texts are passed over."""
    categories: Annotated[str, Place(always=True)] | None = None
    """CSV table (columns Article, Category) that labels the articles of `wikipedia`."""
    subset: str | None = None
    """Configuration of a hub dataset, in place of the paper's."""
    split: str | None = None
    """Split of a hub dataset, in place of the paper's."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Linear probes for semantics, context and syntax on feature activations (paper section 4.2)."""

    dataset: Dataset = "embedded"
    """Labelled texts: `embedded`, `finefineweb`, `wikipedia`, `mmlu`, `pile`, or a local file or hub id in one of their schemas."""
    protocol: Literal["disjoint", "reference"] = "disjoint"
    """`disjoint`: training and test tokens come from different texts (context: lie apart), probes are standardised; `reference`: what the authors' released code does, down to the texts, for which `experiments.texts` then names only the classes and where they are."""
    reference_texts: Annotated[Count, Added(4000)] = 4000
    """Texts of the protocol `reference`, whatever their class and length; all where there are fewer."""
    reference_length: Annotated[int, at_least(2), Added(2048)] = 2048
    """Tokens of each of them that the language model reads, at most, without BOS; no more than its positions."""
    tasks: Annotated[tuple[Literal["semantics", "context", "syntax"], ...], some("name at least one task")] = (
        "semantics",
        "context",
        "syntax",
    )
    """What is probed for: the label of the text, which text a token is from, the syntactic class of the token."""
    tagger: str = "auto"
    """Who gives syntactic classes: `spacy` or `spacy:PIPELINE` (parts of speech), `surface` (word classes by surface form), `module:function`; `auto`: spaCy, or without a pipeline `surface` for the embedded corpus alone."""
    features: Annotated[tuple[Count, ...], some("name at least one number of features")] = (1, 5, 10, 20)
    """Features of each sparse probe (k)."""
    tokens: Count = 4000
    """Tokens of each task, at most."""
    context_texts: Annotated[int, at_least(2)] = 32
    """Texts told apart by the task `context`."""
    gap: Count = 5
    """Distance, in tokens, of a text's training tokens from its test tokens in the task `context`, at least."""
    test_share: Fraction = 0.25
    """Share of texts, or in `context` of tokens, that probes are scored on."""
    seeds: Count = 3
    """Random splits; intervals are over them."""


@dataclass(frozen=True, kw_only=True)
class TsneConfig:
    """A map of feature activations, coloured by semantics, context and syntax (paper figures 2 and 9)."""

    dataset: Dataset = "embedded"
    """Labelled texts, as for probing."""
    tagger: str = "auto"
    """Who gives syntactic classes, as for probing."""
    texts: Annotated[int, at_least(2)] = 100
    """Texts on the map, in equal shares of the classes."""
    tokens: Count = 20
    """Last tokens of each text."""
    dimensions: Annotated[int, at_least(2)] = 50
    """Dimensions left by the singular value decomposition before t-SNE."""
    perplexity: Annotated[float, at_least(1)] = 30.0
    """Perplexity of t-SNE."""
    neighbours: Count = 15
    """Nearest neighbours of a token, in the original space, whose labels are compared with its own."""
    seeds: Count = 3
    """Random choices of texts that the numbers are averaged over; the map shows the first."""


@dataclass(frozen=True, kw_only=True)
class SequencesConfig:
    """Latents over the tokens of passages spliced into one context (paper figures 1 and 4)."""

    dataset: Dataset = "embedded"
    """Labelled texts that passages are drawn from, as for probing."""
    texts: Annotated[
        tuple[Annotated[str, Place()], ...], Bound(lambda texts: len(texts) != 1, "one text has no border")
    ] = ()
    """What the figure shows: files, or texts themselves (anything with a space in it), one passage each; by default passages drawn from the dataset."""
    labels: tuple[str, ...] = ()
    """Labels of the dataset that passages are drawn from; by default all."""
    passages: Annotated[int, at_least(2)] = 3
    """Passages in a context drawn from the dataset, each of another label."""
    passage_tokens: Count | None = None
    """Tokens of a passage, of drawn ones on average; none: an equal share of the model's positions, at most 200."""
    splices: Annotated[int, at_least(10)] = 100
    """Contexts drawn for the scores."""
    top: Count = 8
    """Latents of a context that stand for its figure."""
    rank: Literal["total", "variance", "mean_active"] = "total"
    """What makes a latent one of them: its total activation (the paper's), its variance, or its mean where it is active."""
    latents: tuple[Natural, ...] = ()
    """Latents to draw, whatever their rank."""
    window: Count = 16
    """Tokens on either side of a place that a change of the code is measured over."""
    tolerance: Natural = 10
    """Tokens between a border and a change point that found it, at most."""
    smoothest: PositiveShare = 0.2
    """Share of all latents, the smoothest ones, that the control takes in place of a split made in training."""
    bootstrap: Draws = 1000
    """Draws of contexts behind each interval."""
    seed: SmallSeed = 0
    """Seed of every draw."""

    def require_possible(self, where: str, dict_size: int) -> None:
        """Raise TsaeError for latents that a dictionary of this size does not have."""
        _require_latents(f"{where}: experiments.sequences.latents", self.latents, dict_size)


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """Latents that tell rejected from chosen responses (paper section 4.5)."""

    dataset: Dataset = "embedded"
    """Pairs of dialogues: `hh-rlhf`, a local file or hub id with columns chosen and rejected, or `embedded` (passages on two topics, which have nothing to do with preferences)."""
    pairs: Annotated[int, Bound(lambda n: n >= 20, "at least 20 pairs are needed for a test")] = 1000
    """Pairs that are read, at most."""
    max_tokens: Annotated[int, at_least(16)] = 512
    """Tokens of a dialogue, or the model's positions where these are fewer; what is too much is cut from the prompt's beginning, then from the response's end."""
    matched_tokens: Natural = 2
    """Largest difference in length of a pair in the subset matched for length."""
    min_pairs: Annotated[int, at_least(2)] = 10
    """Pairs that a latent has to be active in to be tested."""
    level: Annotated[float, Bound(lambda rate: 0 < rate < 1, "a rate between 0 and 1 is expected")] = 0.05
    """False discovery rate (Benjamini and Hochberg)."""
    table: Count = 30
    """Latents in the table."""
    examples: Natural = 3
    """Pairs shown of each of them: those that differ most."""
    bootstrap: Draws = 1000
    """Draws of pairs behind each interval."""
    seed: SmallSeed = 0
    """Seed of every draw."""


@dataclass(frozen=True, kw_only=True)
class SteerConfig:
    """Text generated while one latent is held up (paper section 4.4 and appendix B.2)."""

    dataset: Dataset = "embedded"
    """Labelled texts, as for probing; a concept is a label."""
    concepts: tuple[str, ...] = ()
    """Labels to steer towards; by default the first of the dataset's."""
    max_concepts: Annotated[int, at_least(2)] = 8
    """Concepts where none are named."""
    latents: tuple[Natural, ...] = ()
    """Latents to steer with, one for each of `concepts`; by default they are chosen."""
    choose: Literal["lift", "auc"] = "lift"
    """How a concept's latent is chosen: mean activation on the concept's texts minus that on all, or ROC AUC of a text's mean activation."""
    mode: Literal["set", "add"] = "set"
    """`set`: the latent's activation becomes the strength; `add`: the strength comes on top of it."""
    multiples: Strengths = (0.5, 1.0, 2.0, 4.0, 8.0)
    """Strengths in units of the latent's 99.9th percentile over the tokens on which it is active; 0 is the unsteered text."""
    strengths: Strengths = ()
    """Further, absolute strengths; the paper's are 10, 100, 150, 500, 1000, 1500, 5000, 10000, 15000."""
    steer_first: bool = False
    """Whether the first position, BOS or the attention sink, is steered too."""
    prompts: tuple[str, ...] = ("We find",)
    """Prompts; the paper's is `We find`."""
    text_prompts: Natural = 20
    """Further prompts: openings of texts on any label that nothing else uses."""
    prompt_tokens: Count = 8
    """Tokens of those."""
    tokens: Annotated[int, at_least(4)] = 32
    """Tokens that are generated."""
    temperature: NonNegative = 0.0
    """0: greedy; above: sampled."""
    classifier_texts: Count = 150
    """Texts of each concept, beyond those whose activations are read, that the classifier learns from, at most."""
    success: PositiveShare = 0.5
    """Probability of the concept from which steering counts as successful."""
    coherence: PositiveShare = 0.5
    """Coherence, relative to unsteered and real text, from which steered text counts as coherent."""
    judge: AnswersConfig = field(default_factory=AnswersConfig)
    """A language model that grades the samples for concept and coherence, 0 to 3 each as in the paper; none by default."""
    bootstrap: Draws = 1000
    """Draws of concepts behind each interval."""
    seed: SmallSeed = 0
    """Seed of every draw."""

    def require_possible(self, where: str, dict_size: int) -> None:
        """Raise TsaeError for latents that a dictionary of this size does not have, or without a concept each, and no strength."""
        if not (self.multiples or self.strengths):
            raise TsaeError(
                f"{where}: experiments.steer.multiples: [] is impossible; at least one strength is expected"
            )
        if self.latents and len(self.latents) != len(self.concepts):
            raise TsaeError(
                f"{where}: experiments.steer.latents: {list(self.latents)} is impossible; one for each of "
                f"experiments.steer.concepts is expected; there are {len(self.concepts)}"
            )
        _require_latents(f"{where}: experiments.steer.latents", self.latents, dict_size)


@dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """Explanations of latents and their scores on held-out text (autointerp)."""

    answers: AnswersConfig = field(default_factory=AnswersConfig)
    """Who explains and judges; without a language model an explanation is a rule over tokens."""
    latents: Count | None = None
    """Latents that are explained, drawn evenly over firing rates and groups; none: 200 with a language model, 2048 without."""
    sequences: Count = 2048
    """Stored sequences that are read, at most: so many to explain from, and so many held-out ones to score on."""
    window: Annotated[int, at_least(2)] = 32
    """Tokens of a text that is shown; longer ones show what a slow latent follows."""
    examples: Count = 15
    """Texts that an explanation is written from: two thirds with the strongest activations, the rest spread over all."""
    tests: Count = 10
    """Held-out texts in which the latent is active, and as many in which it is not, that an explanation is scored on."""
    seed: SmallSeed = 0
    """Seed of every draw."""


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """One page with all latents of a run."""

    sequences: Count = 2048
    """Stored sequences that rates and examples are taken from, at most."""
    examples: Count = 6
    """Texts with the strongest activations that are shown of each latent; half as many weaker ones follow."""
    before: Natural = 24
    """Tokens shown before the strongest one."""
    after: Natural = 12
    """Tokens shown after it."""
    logits: Annotated[bool, Added(True)] = True
    """Show the tokens whose scores each latent's direction raises and lowers most; the language model is loaded for it."""
    beside: Annotated[str | None, Place(holds=("ae.pt", "trainer_0/ae.pt")), Added(None)] = None
    """Another run, by its folder or its name, whose latents are matched with those of the page by the cosine of their decoder rows."""


@dataclass(frozen=True, kw_only=True)
class ExperimentsConfig:
    """Each experiment's own settings, and the texts they share."""

    texts: TextsConfig = field(default_factory=TextsConfig)
    """Labelled texts."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """Linear probes."""
    tsne: TsneConfig = field(default_factory=TsneConfig)
    """Map of the feature space."""
    sequences: SequencesConfig = field(default_factory=SequencesConfig)
    """Latents over spliced passages."""
    align: AlignConfig = field(default_factory=AlignConfig)
    """Chosen against rejected responses."""
    steer: SteerConfig = field(default_factory=SteerConfig)
    """Steered generation."""
    explain: ExplainConfig = field(default_factory=ExplainConfig)
    """Explanations and their scores."""
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    """The page of latents."""


def _require_latents(where: str, latents: tuple[int, ...], dict_size: int) -> None:
    if any(latent >= dict_size for latent in latents):
        raise TsaeError(f"{where}: {list(latents)} is impossible; latents are counted from 0 to {dict_size - 1}")
