"""The page of latents: what is packed into it, and what a real browser makes of it."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import random
import re
import shutil
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from tests.experiments.chromium import Browser, find_chromium
from tsae.checkpoint import RunFolder, save_dictionary
from tsae.cli import main
from tsae.config import run as configuration
from tsae.config.experiments import FeaturesConfig
from tsae.config.run import Counted, RunConfig
from tsae.evaluation import measures
from tsae.evaluation.measures import REGISTRY
from tsae.experiments import driver
from tsae.experiments.features.data import spread_over_labels, unpack
from tsae.experiments.shared.firings import Firings, collect
from tsae.experiments.shared.subject import Subject
from tsae.interop.explanations import write_explanations
from tsae.runtime import files
from tsae.runtime.errors import TsaeError
from tsae.sae.init import new_dictionary
from tsae.sae.reference import reference_config
from tsae.stages import experiment_stage, harvest_stage
from tsae.store.reader import Store

BIG = 16_384


@pytest.fixture(scope="module")
def run(run_config: RunConfig, checkpoints: Path) -> RunFolder:
    """The T-SAE with a few explanations, one of which would break a careless page."""
    run = RunFolder.of(checkpoints, "temporal")
    own = RunFolder.of(checkpoints, "explained")
    for file in (run.config_json, run.weights, run.resolved):
        files.write_atomically(own.path / file.name, lambda stream, file=file: stream.write(file.read_bytes()))
    fired = _most_active(run_config, own)
    texts = {
        fired[0]: "words of the North",
        fired[1]: "</script><b>bold</b> & 'quotes' — ü",
        fired[2]: "words of the east",
    }
    write_explanations(own.result("explanations", "json"), texts)
    experiment_stage(run_config, checkpoints, "explained", "features")
    return own


def _firings(config: RunConfig, run: RunFolder, sequences: int | None = None) -> Firings:
    store = Store.open(harvest_stage(config), config)
    return collect(Subject(config, run), store, range(sequences or store.n_sequences), "test")


def _most_active(config: RunConfig, run: RunFolder) -> list[int]:
    return np.argsort(-_firings(config, run, 50).counts).tolist()


def test_the_page_holds_the_activations_of_the_store(run: RunFolder, run_config: RunConfig, tiny_model: Path) -> None:
    about, columns = unpack(run.result("features", "html"))
    store = Store.open(harvest_stage(run_config), run_config)
    dictionary = torch.load(run.weights, weights_only=True)
    pre = torch.relu(
        (store.read(range(store.n_sequences)).float() - dictionary["b_dec"]) @ dictionary["W_enc"] + dictionary["b_enc"]
    )
    f = (pre * (pre > dictionary["threshold"]) * dictionary["W_dec"].norm(dim=1)).numpy()
    f *= store.valid(Counted(1))[:, :, None]
    flat = f.reshape(-1, f.shape[2])
    np.testing.assert_allclose(columns["rate"], (flat > 0).sum(0) / store.valid(Counted(1)).sum(), rtol=1e-5)
    np.testing.assert_allclose(np.nan_to_num(columns["largest"]), flat.max(0), rtol=1e-4, atol=1e-6)
    assert about["tokens"] == store.valid(Counted(1)).sum()
    words = [about["strings"][token].strip() for token in columns["text"]]
    assert set(words) <= {"<unk>", "<eos>", *json.loads((tiny_model / "tokenizer.json").read_text())["model"]["vocab"]}

    document = store.document[:].reshape(-1)
    latent = int(np.argmax(columns["rate"]))
    examples = range(columns["example_offsets"][latent], columns["example_offsets"][latent + 1])
    assert len(examples) == 9
    tops, documents = [], set()
    for example in examples:
        start, length = int(columns["example_start"][example]), int(columns["example_length"][example])
        shown = np.zeros(length)
        part = slice(columns["example_fired"][example], columns["example_fired"][example + 1])
        shown[columns["example_position"][part]] = columns["example_value"][part]
        truth = flat[start : start + length, latent] / columns["largest"][latent] * 255
        assert (np.abs(shown - truth) <= 1.01).all()
        assert len(set(document[start : start + length])) == 1
        tops.append(shown.max())
        documents.add(document[start])
    assert tops == sorted(tops, reverse=True)
    assert tops[0] == 255
    assert len(documents) == 9


def test_the_page_holds_how_activations_spread_over_the_labels(run: RunFolder, run_config: RunConfig) -> None:
    about, columns = unpack(run.result("features", "html"))
    store = Store.open(harvest_stage(run_config), run_config)
    document = np.where(store.valid(Counted(1)), store.document, -1)
    own = np.where(document >= 0, store.label[document], -1)
    assert sorted(about["labels"]) == ["east", "north", "south"]
    order = [store.label_names.index(name) for name in about["labels"]]
    base = [(own == label).sum() / (own >= 0).sum() for label in order]
    np.testing.assert_allclose(about["label_base"], base)
    firings = _firings(run_config, run)
    shares = columns["label_share"].reshape(64, 3) / 255
    for latent in _most_active(run_config, run)[:20]:
        places, _ = firings.of(latent)
        truth = [(own.reshape(-1)[places] == label).mean() for label in order]
        np.testing.assert_allclose(shares[latent], truth, atol=0.002)
    assert shares.max() > 0.6  # the texts' topics are in their words, so some latents are about one


def test_labels_beyond_the_most_frequent_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    document = np.repeat(np.arange(5), [8, 4, 2, 1, 3])[None].astype(np.int32)
    document[0, -3:] = -1
    places = np.array([0, 8, 12, 14, 0, 15], np.int32)
    still = np.zeros(document.shape, np.float32)
    firings = Firings(np.array([0, 4, 5, 6]), places, np.ones(6, np.float32), document, document, still)
    monkeypatch.setattr("tsae.experiments.features.data.MOST_LABELS", 2)
    names, base, share = spread_over_labels(firings, np.array([1, 0, 3, 2, 0]), ["a", "b", "c", "d", "unused"])
    assert names == ["b", "a", "other labels"]
    assert base == [8 / 15, 4 / 15, 3 / 15]
    np.testing.assert_allclose(share / 255, [[0.25, 0.25, 0.5], [1, 0, 0], [0, 0, 0]], atol=0.002)
    assert spread_over_labels(firings, np.full(5, -1), []) is None


@pytest.fixture(scope="module")
def turned(run: RunFolder, checkpoints: Path) -> RunFolder:
    """A run with the latents of `run` in another order, a third of them others, explained and with a page of its own."""
    own = RunFolder.of(checkpoints, "turned")
    files.write_atomically(own.config_json, lambda stream: stream.write(run.config_json.read_bytes()))
    config = json.loads(own.config_json.read_text())
    del config["weights"], config["digest"]
    own.config_json.write_text(json.dumps(config))
    state = torch.load(run.weights, weights_only=True)
    state["W_dec"] = state["W_dec"].flip(0)
    state["W_dec"][:20] = torch.nn.functional.normalize(torch.randn(20, state["W_dec"].shape[1]), dim=1)
    torch.save(state, own.weights)
    write_explanations(own.result("explanations", "json"), {60: "what latent 3 is over there"})
    own.result("features", "html").write_text("a page")
    return own


@pytest.fixture(scope="module")
def matched(run_config: RunConfig, run: RunFolder, turned: RunFolder, checkpoints: Path) -> tuple[RunConfig, RunFolder]:
    """A copy of `run` with a page that matches its latents with those of `turned`."""
    beside = dataclasses.replace(run_config.experiments.features, beside=turned.path.parent.name)
    config = configuration.replace(run_config, experiments={"features": beside})
    own = RunFolder.of(checkpoints, "matched")
    shutil.copytree(run.path, own.path, ignore=shutil.ignore_patterns("features*"))
    experiment_stage(config, checkpoints, "matched", "features")
    return config, own


def test_latents_are_matched_with_those_of_another_run(matched: tuple[RunConfig, RunFolder], turned: RunFolder) -> None:
    config, run = matched
    about, columns = unpack(run.result("features", "html"))
    ours, theirs = (torch.load(each.weights, weights_only=True)["W_dec"] for each in (run, turned))
    cosines = torch.nn.functional.cosine_similarity(ours[:, None], theirs[None], dim=2)
    assert np.array_equal(columns["near_beside"].reshape(64, 5), cosines.topk(5).indices)
    assert columns["near_beside"].reshape(64, 5)[:44, 0].tolist() == list(range(63, 19, -1))
    assert (columns["near_beside_cosine"].reshape(64, 5)[:44, 0] == 255).all()
    page = run.measured / urllib.parse.unquote(about["beside"]["page"])
    assert page.read_text() == "a page"
    assert about["beside"]["name"] == "turned"
    assert about["beside"]["explanations"] == {"60": "what latent 3 is over there"}
    assert driver.is_done(config, run, "features")
    gone = configuration.replace(config, experiments={"features": FeaturesConfig(beside="none")})
    assert not driver.is_done(gone, run, "features")
    with pytest.raises(TsaeError, match="none: neither a folder nor a run"):
        driver.run("features", gone, run)


def test_a_match_is_made_again_when_the_other_run_has_other_weights(
    matched: tuple[RunConfig, RunFolder], turned: RunFolder
) -> None:
    config, run = matched
    before = turned.weights.read_bytes()
    files.write_atomically(turned.weights, lambda stream: stream.write(run.weights.read_bytes()))
    assert not driver.is_done(config, run, "features")
    files.write_atomically(turned.weights, lambda stream: stream.write(before))
    assert driver.is_done(config, run, "features")


def test_the_page_holds_what_latents_write_and_which_are_alike(run: RunFolder, tiny_model: Path) -> None:
    about, columns = unpack(run.result("features", "html"))
    lm = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    words = transformers.AutoTokenizer.from_pretrained(tiny_model)
    weights = torch.load(run.weights, weights_only=True)
    gain = lm.gpt_neox.final_layer_norm.weight.detach()
    rows = weights["W_dec"] - weights["W_dec"].mean(1, keepdim=True)
    scores = (rows * gain) @ lm.get_output_embeddings().weight.detach().T
    spoken = columns["spoken"].reshape(64, 16)
    strings = np.array(about["strings"])
    for latent in range(64):
        for part, largest in ((spoken[latent, :8], True), (spoken[latent, 8:], False)):
            told = [words.decode([int(token)]).strip() for token in scores[latent].topk(8, largest=largest).indices]
            assert [text.strip() for text in strings[part]] == told
    for side, vectors in (("writing", weights["W_dec"]), ("reading", weights["W_enc"].T)):
        cosines = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=2).fill_diagonal_(-1)
        assert np.array_equal(columns[f"near_{side}"].reshape(64, 5), cosines.topk(5).indices)
        told = columns[f"near_{side}_cosine"].reshape(64, 5) / 255
        np.testing.assert_allclose(told, cosines.topk(5).values.clamp(0), atol=0.002)


def test_without_logits_no_language_model_is_loaded(
    run_config: RunConfig, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsae.lm.model.load_language_model", lambda *_: pytest.fail("was loaded"))
    config = configuration.replace(run_config, experiments={"features": FeaturesConfig(logits=False, examples=2)})
    driver.run("features", config, RunFolder.of(checkpoints, "temporal"))
    _, columns = unpack(RunFolder.of(checkpoints, "temporal").result("features", "html"))
    assert "spoken" not in columns


def test_results_name_the_page_and_split_the_latents(run: RunFolder, run_config: RunConfig) -> None:
    results = json.loads(run.result("features", "json").read_text())
    assert results["page"] == "features.html"
    assert set(results["splits"]) == {"high-level", "low-level"}
    high = results["splits"]["high-level"]
    assert high["latents"] == sum(high["count"]) + high["silent"] == run_config.sae.group_sizes[0]
    assert {"persistence_high", "persistence_low", "smoothness"} <= set(results["headline"])
    assert run.result("features", "png").read_bytes().startswith(b"\x89PNG")
    shown = driver.headlines(run, run_config)
    assert "features/persistence_high" in shown
    assert set(shown) <= set(REGISTRY)
    # They were there before they were declared, so that no older page is made again.
    assert measures.versions("features") == {}


def test_one_group_of_latents_and_no_explanations(run_config: RunConfig, checkpoints: Path) -> None:
    config = configuration.replace(run_config, sae={"kind": "batch_topk"})
    experiment_stage(config, checkpoints, "batch_topk", "features")
    run = RunFolder.of(checkpoints, "batch_topk")
    about, columns = unpack(run.result("features", "html"))
    assert about["groups"] == [64]
    assert set(about["explanations"]) == {None}
    assert np.isnan(columns["detection"]).all()
    assert run.result("features", "png").exists()


def test_the_page_is_made_again_for_other_explanations(
    run: RunFolder, run_config: RunConfig, checkpoints: Path, tmp_path: Path
) -> None:
    page = run.result("features", "html")
    made = page.stat().st_mtime_ns
    experiment_stage(run_config, checkpoints, "explained", "features")
    assert page.stat().st_mtime_ns == made
    before = page.read_text()
    write_explanations(tmp_path / "explanations.json", {1: "another reading"})
    experiment_stage(run_config, checkpoints, "explained", "features", explanations=tmp_path / "explanations.json")
    assert unpack(page)[0]["explanations"][1] == "another reading"
    experiment_stage(run_config, checkpoints, "explained", "features")
    assert page.read_text() == before


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("experiments.features.examples=0", "features.examples: 0 is impossible"),
        ("experiments.features.before=250", "before and after: 250 and 12 are impossible"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    run: RunFolder, checkpoints: Path, setting: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["features", "--run-name", "explained", "--checkpoints-path", str(checkpoints), setting]
    assert main(arguments) == 2
    assert complaint in capsys.readouterr().err
    assert run.result("features", "html").exists()


def test_explanations_of_another_dictionary_are_refused(run: RunFolder, run_config: RunConfig, tmp_path: Path) -> None:
    write_explanations(tmp_path / "explanations.json", {64: "too many"})
    config = configuration.replace(run_config, experiments={"features": FeaturesConfig(examples=2)})
    with pytest.raises(TsaeError, match=r"explains latent 64.*has 64; it is about another dictionary"):
        driver.run("features", config, run, explanations=tmp_path / "explanations.json")


# --- in a real browser


Require = Callable[[str, bool, str], None]


@pytest.fixture(scope="module")
def browser(require: Require, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_chromium()
    require("chromium", program is not None, "apt-get install chromium")
    with Browser(str(program), tmp_path_factory.mktemp("profile")) as running:
        yield running


def rows(browser: Browser) -> list[int]:
    return browser.run("[...document.querySelectorAll('#rows tr')].map((row) => Number(row.dataset.latent))")


def test_typing_into_the_search_finds_explanations_tokens_and_numbers(browser: Browser, run: RunFolder) -> None:
    about, columns = unpack(run.result("features", "html"))
    texts = {latent: text for latent, text in enumerate(about["explanations"]) if text}
    north = next(latent for latent, text in texts.items() if "North" in text)
    broken = next(latent for latent, text in texts.items() if "</script>" in text)
    browser.open(run.result("features", "html"))
    assert len(rows(browser)) == (columns["rate"] > 0).sum()
    browser.click("#query")
    browser.type("WORDS north")
    assert rows(browser) == [north]
    assert "1 of 64 latents" in browser.run("document.getElementById('count').textContent")

    browser.run("document.getElementById('query').select()")
    browser.type("</script>")
    assert rows(browser) == [broken]
    shown = browser.run("document.querySelector('#rows td.words').textContent")
    assert shown == texts[broken]
    assert browser.run("document.querySelectorAll('#rows b').length") == 0

    browser.run("document.getElementById('query').select()")
    browser.type(str(broken))
    assert rows(browser)[0] == broken
    browser.run("document.getElementById('query').select()")
    browser.type("no latent says this")
    assert rows(browser) == []
    assert browser.run("getComputedStyle(document.getElementById('none')).display") != "none"


def test_a_latent_shows_the_labels_of_its_texts_against_all_tokens(browser: Browser, run: RunFolder) -> None:
    about, columns = unpack(run.result("features", "html"))
    shares = columns["label_share"].reshape(64, 3) / 255
    latent = int(shares.max(1).argmax())
    browser.open(run.result("features", "html"), f"#latent={latent}")
    order = np.argsort(-shares[latent], kind="stable")
    told = [
        f"{about['labels'][label]}{100 * shares[latent, label]:.0f} %, of all tokens {100 * about['label_base'][label]:.0f} %"
        for label in order
    ]
    assert browser.run("[...document.querySelectorAll('.labels li')].map((row) => row.textContent)") == told
    bars = "[...document.querySelectorAll('.labels .track')].map((track) => track.firstChild.offsetWidth / track.offsetWidth)"
    np.testing.assert_allclose(browser.run(bars), shares[latent][order], atol=0.02)


def test_sorting_filtering_and_choosing(browser: Browser, run: RunFolder) -> None:
    _, columns = unpack(run.result("features", "html"))
    browser.open(run.result("features", "html"))
    by_rate = sorted(columns["rate"][columns["rate"] > 0].tolist(), reverse=True)
    assert columns["rate"][rows(browser)].tolist() == by_rate
    browser.click("th[data-key=rate] button")
    assert columns["rate"][rows(browser)].tolist() == by_rate[::-1]
    browser.click("th[data-key=smoothness] button")
    smoothness = columns["smoothness"][rows(browser)]
    assert (np.diff(smoothness[~np.isnan(smoothness)]) >= 0).all()
    browser.run(
        "(document.getElementById('group').value = '0', document.getElementById('group').dispatchEvent(new Event('change')))"
    )
    assert set(columns["group"][rows(browser)]) == {0}
    browser.click("#alive")
    assert len(rows(browser)) == (columns["group"] == 0).sum()

    browser.click("th[data-key=latent] button")
    first = rows(browser)[0]
    browser.click("#rows tr:first-child td.number")
    assert browser.run("document.querySelector('#detail h2').textContent") == f"Latent {first}"
    browser.run("document.querySelector('#rows tr').focus()")
    browser.press("ArrowDown")
    assert browser.run("document.querySelector('#detail h2').textContent") == f"Latent {rows(browser)[1]}"
    assert browser.run("location.hash") == f"#latent={rows(browser)[1]}"


def test_matched_latents_are_ordered_by_their_match_and_lead_to_the_other_page(
    browser: Browser, matched: tuple[RunConfig, RunFolder]
) -> None:
    page = matched[1].result("features", "html")
    _, columns = unpack(page)
    browser.open(page, "#latent=3")
    links = "document.querySelectorAll('#detail .tokens')[4].querySelectorAll('a')"
    found = browser.run(f"[...{links}].map((link) => [link.getAttribute('href'), link.title])")
    assert found[0] == ["../../turned/trainer_0/features.html#latent=60", "what latent 3 is over there"]
    assert [int(link.rpartition("=")[2]) for link, _ in found] == columns["near_beside"].reshape(64, 5)[3].tolist()
    assert "In turned 60 1.00" in browser.run("document.getElementById('detail').textContent")
    browser.click("th[data-key=match] button")
    largest = columns["near_beside_cosine"].reshape(64, 5)[:, 0][rows(browser)].astype(int)
    assert (np.diff(largest) >= 0).all()
    assert largest[0] < largest[-1] == 255


def test_tokens_that_a_latent_speaks_for_and_its_neighbours_are_shown(browser: Browser, run: RunFolder) -> None:
    about, columns = unpack(run.result("features", "html"))
    latent = int(np.argmax(columns["rate"]))
    browser.open(run.result("features", "html"), f"#latent={latent}")
    shown = browser.run("[...document.querySelectorAll('#detail .tokens span')].map((token) => token.textContent)")
    assert shown == [about["strings"][token] for token in columns["spoken"].reshape(64, 16)[latent]]
    nearest = int(columns["near_writing"].reshape(64, 5)[latent, 0])
    links = browser.run("[...document.querySelectorAll('#detail .tokens a')].map((link) => Number(link.textContent))")
    near = [columns[f"near_{side}"].reshape(64, 5)[latent].tolist() for side in ("writing", "reading")]
    assert links == near[0] + near[1]
    browser.click("#detail .tokens a")
    assert browser.run("document.querySelector('#detail h2').textContent") == f"Latent {nearest}"
    assert browser.run("location.hash") == f"#latent={nearest}"


def test_examples_are_coloured_where_the_latent_fires(browser: Browser, run: RunFolder) -> None:
    about, columns = unpack(run.result("features", "html"))
    latent = int(np.argmax(columns["rate"]))
    browser.open(run.result("features", "html"), f"#latent={latent}")
    example = int(columns["example_offsets"][latent])
    start, length = int(columns["example_start"][example]), int(columns["example_length"][example])
    fired = columns["example_position"][columns["example_fired"][example] : columns["example_fired"][example + 1]]
    tokens = browser.run(
        "[...document.querySelector('#detail .example').querySelectorAll('span')].map((token) => "
        "[token.textContent, token.style.background !== ''])"
    )
    assert [text for text, _ in tokens] == [about["strings"][t] for t in columns["text"][start : start + length]]
    assert [place for place, (_, coloured) in enumerate(tokens) if coloured] == fired.tolist()
    assert browser.run("document.querySelectorAll('#detail .example').length") == 9


def test_the_page_asks_for_nothing_but_itself(browser: Browser, run: RunFolder) -> None:
    browser.requests.clear()
    browser.open(run.result("features", "html"))
    assert set(browser.requests) == {run.result("features", "html").as_uri()}
    text = run.result("features", "html").read_text()
    assert not re.findall(r"""(?:src|href)\s*=|@import|url\(""", text.replace("http://www.w3.org/2000/svg", ""))


# --- 16,384 latents


@pytest.fixture(scope="module")
def big(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """A dictionary of 16,384 latents, about 20 active per token, on a store of more than 100,000 tokens."""
    folder, generator = tmp_path_factory.mktemp("big"), random.Random(0)
    words = list(json.loads((tiny_model / "tokenizer.json").read_text())["model"]["vocab"])[2:]
    rows = [{"text": " ".join(generator.choices(words, k=64))} for _ in range(1750)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = configuration.from_mapping(
        {
            "model": {"name": str(tiny_model), "layer": 1, "device": "cpu"},
            "data": {"source": str(folder / "text.jsonl"), "context_length": 64},
            "store": {"path": str(folder / "store")},
            "sae": {"dict_size": BIG, "k": 20},
            "training": {"device": "cpu"},
        },
        "here",
    )
    store = Store.open(harvest_stage(config), config)
    dictionary = new_dictionary(config.sae, store.activation_dim, seed=0)
    dictionary.b_dec.data = store.mean.clone()
    x = store.read(range(8)).float().flatten(0, 1)
    pre = torch.relu(dictionary.pre_activations(x)).detach().flatten()
    dictionary.threshold.fill_(float(pre.topk(20 * len(x)).values[-1]))
    run = RunFolder.of(folder, "big")
    run.claim(config)
    files.write_json(run.config_json, reference_config(config, store.activation_dim))
    save_dictionary(run.weights, dictionary)
    write_explanations(
        run.result("explanations", "json"), {n: f"explanation number {n} of a latent" for n in range(BIG)}
    )
    return config, folder


def _make_page(config: RunConfig, checkpoints: Path) -> None:
    """Make the page, and leave the peak memory of this process in bytes."""
    experiment_stage(config, checkpoints, "big", "features")
    # Not getrusage's ru_maxrss: a new process begins that with its parent's size, here all of pytest's.
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    (checkpoints / "peak").write_text(str(int(peak.split()[1]) * 1024))


@pytest.fixture(scope="module")
def big_page(big: tuple[RunConfig, Path]) -> Path:
    """The page of that dictionary, made by a process of its own."""
    process = multiprocessing.get_context("spawn").Process(target=_make_page, args=big)
    process.start()
    process.join()
    return RunFolder.of(big[1], "big").result("features", "html")


def test_sixteen_thousand_latents_never_become_dense(
    big: tuple[RunConfig, Path], big_page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = json.loads(big_page.with_suffix(".json").read_text())["tokens"]
    assert tokens > 100_000
    dense, peak = tokens * BIG * 4, int((big[1] / "peak").read_text())
    with capsys.disabled():
        print(f"\n{BIG} latents on {tokens} tokens: peak memory {peak / 1e9:.2f} GB (dense: {dense / 1e9:.1f} GB)")
    assert peak < dense / 4


def test_sixteen_thousand_latents_open_and_are_searched(
    big_page: Path, browser: Browser, capsys: pytest.CaptureFixture[str]
) -> None:
    browser.open(big_page)
    ready = int(browser.run("document.documentElement.dataset.ready"))
    began = browser.run("performance.now()")
    browser.click("#query")
    browser.type("number 16383")
    searched = browser.run("performance.now()") - began
    assert rows(browser) == [16_383]
    with capsys.disabled():
        print(
            f"\n{BIG} latents: page of {big_page.stat().st_size / 1e6:.1f} MB opens in {ready / 1000:.2f} s, "
            f"a search of 12 letters takes {searched / 1000:.2f} s"
        )


def test_rows_are_drawn_as_far_as_someone_scrolls(big_page: Path, browser: Browser) -> None:
    browser.open(big_page)
    drawn = len(rows(browser))
    assert drawn <= 300
    browser.run("document.getElementById('list').scrollTo(0, 1e9)")
    for _ in range(50):  # the browser tells of it in its own time
        browser.run("new Promise((done) => setTimeout(done, 200))")
        if len(rows(browser)) > drawn:
            break
    assert len(rows(browser)) > drawn
