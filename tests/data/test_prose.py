from __future__ import annotations

import textwrap

import pytest

from tsae.data import prose

SENTENCE = "The reader keeps each row of the table in the order in which it was written."


def found(source: str) -> list[str]:
    return [paragraph for text in prose.texts(textwrap.dedent(source)) for paragraph in prose.paragraphs(text)]


@pytest.mark.parametrize(
    "source",
    [
        f'"""{SENTENCE}"""',
        f"r'''{SENTENCE}'''",
        f'def read(x="it\'s", y=\'"\'):\n    """{SENTENCE}"""',
        f'x = f"{{a}}"\n# it\'s a lone quote\ny = """{SENTENCE}"""',
        "add_docstr(f,\n    \"The reader keeps each row of the table \"\n    'in the order in which it was written.'\n"
        '    " Then it goes on to the next one of the tables, until there are no more of them."\n)',
    ],
)
def test_string_literals_are_found_in_every_spelling(source):
    assert found(source)[0].startswith(SENTENCE[:60])


def test_nothing_is_executed_or_imported():
    assert found(f'raise SystemExit\nimport no_such_module\ndef broken(:\n    """{SENTENCE}"""') == [SENTENCE]


def test_f_strings_bytes_and_short_constants_are_left_out():
    assert found(f'f"""{SENTENCE}"""\nb"""{SENTENCE}"""\nprint("{SENTENCE}")') == []


def test_runs_of_comment_lines_are_read_without_directives():
    assert found(
        """
        # type: ignore[no-any]
        # The reader keeps each row of the table
        # in the order in which it was written.
        x = 1  # A single line beside code is not a paragraph of the documentation here.
        """
    ) == [SENTENCE]


def test_descriptions_of_parameters_come_without_their_heads():
    source = '''
    """
    Parameters
    ----------
    rows : int, optional
        The number of rows that are read at once from the table.
    name : str
        The name under which the table was written to the disk.

    Args:
        dim (`int`, defaults to 3): The dimension along which the values
            of the table are summed.
        keep: Whether the dimension is kept with size one in the result.

    :param where: The place in the table where the reader starts to read.
    """
    '''
    assert found(source) == [
        "The number of rows that are read at once from the table.",
        "The name under which the table was written to the disk.",
        "The dimension along which the values of the table are summed.",
        "Whether the dimension is kept with size one in the result.",
        "The place in the table where the reader starts to read.",
    ]


def test_markup_is_removed():
    assert found(
        '"""See :class:`~torch.nn.Linear` and ``x`` or `the guide <https://a.b/c>`_ for **all** of the details."""'
    ) == ["See Linear and x or the guide for all of the details."]


@pytest.mark.parametrize(
    "text",
    [
        ">>> x = reader.read(rows=10) and then the rest of the line is here.",
        "for row in table: if row.name == name: rows.append(row) and so on it goes.",
        "a  1  2.0  3.5e-3  nan 4 5 6 7 8 9 10 11 12 the end of a table.",
        "Licensed under the terms of some licence that nobody here wants to read.",
        "The first part of a sentence that does not come to its end within the block",
        "Too short a line.",
    ],
)
def test_code_tables_licences_and_fragments_are_not_prose(text):
    assert list(prose.paragraphs(text)) == []
