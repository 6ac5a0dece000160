"""The command line itself: words that it does not know, and how it ends when it is interrupted."""

from __future__ import annotations

import signal
import time
import weakref

import pytest

from tsae import cli
from tsae.cli import main


@pytest.mark.parametrize(
    ("arguments", "near"),
    [(["trian"], "'train'"), (["store", "verfy"], "'verify'"), (["bench", "--preset", "pythai"], "'pythia'")],
)
def test_a_mistyped_word_is_told_the_nearest_one(
    arguments: list[str], near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert f"did you mean {near}?" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("words", [["train", "a.yaml", "--run-nam", "k"], ["sweep", "seeds", "--dry"]])
def test_an_option_is_not_taken_by_half_its_name(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"tsae {words[0]}: error: unrecognized arguments: --")
    assert f"did you mean '{'--run-name' if words[0] == 'train' else '--dry-run'}'?" in said


def way_out_that_fails(interrupt: BaseException) -> None:
    """As matplotlib's PDF does it when it is left half begun."""
    try:
        raise interrupt
    finally:
        raise AttributeError("'Stream' object has no attribute 'pos'")


def test_what_fails_on_the_way_out_of_an_interrupt_does_not_hide_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "load_dotenv", lambda: way_out_that_fails(KeyboardInterrupt()))
    assert main(["status"]) == 130
    assert capsys.readouterr().err == "tsae: interrupted; the same command continues\n"
    monkeypatch.setattr(cli, "load_dotenv", lambda: way_out_that_fails(ValueError()))
    with pytest.raises(AttributeError):
        main(["status"])


class Whatever:
    """Can be referred to weakly."""


def test_an_interrupt_is_not_lost_where_python_passes_over_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wait() -> None:
        thing = Whatever()
        _watched = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
        del thing  # what its end raises is ignored
        time.sleep(60)
        pytest.fail("nobody heard it")

    monkeypatch.setattr(cli, "load_dotenv", wait)
    assert main(["status"]) == 130
    assert capsys.readouterr().err == "tsae: interrupted; the same command continues\n"
