"""The token-coloured page, in a real browser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.experiments.chromium import Browser, find_chromium
from tsae.experiments.sequences.experiment import write_page

RESULTS = {
    "subject": {"run": "<run>"},
    "split": "high-level",
    "contexts": [
        {
            "passages": ["north", "east"],
            "starts": [1, 4],
            "tokens": ["<s>", "One", " <b>", "</script>", " four", " five"],
            "top": [7, 12],
            "explanations": {"12": "Numbers above <three>"},
            "activations": {"7": "1:0.5 2:2", "12": "4:1 5:3"},
        },
        {
            "passages": ["south"],
            "starts": [0],
            "tokens": ["six"],
            "top": [7],
            "explanations": {},
            "activations": {"7": "0:1"},
        },
    ],
}
COLOURED = "[...document.querySelectorAll('#shown span')].filter((s) => s.style.background).map((s) => s.textContent)"


def test_a_latent_found_by_number_or_word_colours_its_tokens(
    require: Callable[[str, bool, str], None], tmp_path: Path
) -> None:
    program = find_chromium()
    require("chromium", program is not None, "apt-get install chromium")
    page = tmp_path / "page.html"
    write_page(RESULTS, page)
    with Browser(str(program), tmp_path / "profile") as browser:
        browser.open(page)
        assert browser.run("document.querySelector('h1').textContent").startswith("<run>: high-level")
        assert browser.run("document.querySelector('#shown').textContent") == "north<s>One <b></script>east four five"
        assert browser.run(COLOURED) == ["One", " <b>"]
        browser.click("#latent")
        browser.type("three")
        assert browser.run(COLOURED) == [" four", " five"]
        assert "Numbers above <three>" in browser.run("document.querySelector('#about').textContent")
        browser.run("document.querySelector('#latent').select()")
        browser.type("99")
        assert browser.run(COLOURED) == []
        assert "silent" in browser.run("document.querySelector('#about').textContent")
        browser.run(
            "document.querySelector('#context').value = 1; document.querySelector('#context').onchange({target: {value: 1}})"
        )
        assert browser.run(COLOURED) == ["six"]
        assert {request.partition(":")[0] for request in browser.requests} <= {"file", "about"}
