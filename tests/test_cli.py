"""The command line itself: words that it does not know."""

from __future__ import annotations

import pytest

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
