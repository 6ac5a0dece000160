"""English paragraphs out of source files: string literals are lexed, never executed or imported.

A full parse of every installed module would take minutes; docstrings and long string constants need only the
lexical grammar, which is one regular expression.
"""

from __future__ import annotations

import ast
import inspect
import re
import warnings
from collections.abc import Iterator

MIN_CONSTANT = 100  # characters; shorter string constants are names, formats and messages
MIN_WORDS = 8
PLAIN_SHARE = 0.72

# It begins with one set of characters and repeats sets alone, so that the engine skips from one to the next.
_TOKEN = re.compile(
    r"""[\#"'](?:(?<=\#)[^\n]*
      | (?<=")(?:""[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*"{3} | [^"\\\n]*(?:\\.[^"\\\n]*)*")
      | (?<=')(?:''[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*'{3} | [^'\\\n]*(?:\\.[^'\\\n]*)*'))""",
    re.VERBOSE | re.DOTALL,
)
_PREFIX = re.compile(r"\b[rRbBuUfFtT]{1,2}$")
_PREFIX_ENDS = frozenset("rRbBuUfFtT\n")
_ROLE = re.compile(r":[a-z:]+:`([^`<]*?)\s*(?:<[^`>]*>)?`")
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)|`([^`<]+?)\s*<[^`>]*>`_+|<https?:[^>]*>|\s?\[#?[\w-]+\]_")
_MARKUP = re.compile(r"\*\*|`+_{0,2}|(?<![\w)])\*(?=\w)|(?<=\w)\*(?![\w(])|\|(?=\w)|(?<=\w)\|")
_ITEM = re.compile(r"(?:[-*+•]|\d+[.)]|:\w+[^:\n]*:)\s+")
_PARAMETER = re.compile(
    r"\*{0,2}`{0,2}[A-Za-z_][\w.]*`{0,2}(?:, \*{0,2}`{0,2}[A-Za-z_][\w.]*`{0,2})*"
    r"\s*(?:\([^()\n]*(?:\([^()]*\)[^()\n]*)*\))?\s*:\s+(?=\S)"
)
_DIRECTIVE = re.compile(r"#+\s*(?:type:|noqa|pragma|pyright|pylint|mypy|doctest|fmt:)")
_TYPED = re.compile(r"[\w*, ]+ : \S|\S+(?: \S+){0,3}(?<![.:])$")
_HEADING = re.compile(r"[\w /-]{1,40}::?$")
_UNDERLINE = re.compile(r"([=~^\"'#*+.:`-])\1{2,}$")
_PLAIN = re.compile(r"[(\"'“]?[A-Za-z]+(?:[-'’/][A-Za-z]+)*[)\"'”]?[,.;:!?)\"'”]*$")
_CODE = re.compile(r">>>|\\[a-zA-Z]|[{}|<>]{2}|::|==|->|\$|^\.\. |#|^\s*(?:import|from|def|class|return)\s\S+\s*[=(]")
_LICENCE = re.compile(
    r"copyright|licen[sc]ed? |warrant|redistribut|all rights reserved|permission is hereby|liabilit", re.IGNORECASE
)


def texts(source: str) -> Iterator[str]:
    """Docstrings, long string constants and runs of comment lines of Python `source`, in the order of the file.

    Adjacent literals are joined as Python joins them; f-strings and bytes are left out.
    """
    kind, end = "", 0
    pieces: list[str] = []
    for match in _TOKEN.finditer(source):
        start = match.start()
        found = "comment" if source[start] == "#" else "string"
        # Sought here and not by the pattern, which can so skip to the next quote at once.
        if found == "string" and source[start - 1 : start] in _PREFIX_ENDS:
            prefix = _PREFIX.search(source, max(start - 3, 0), start)
            start = prefix.start() if prefix else start
        if found != kind or source[end:start].strip(" \t\r\n\\"):
            if text := _text(kind, pieces):
                yield text
            kind, pieces = found, []
        end = match.end()
        pieces.append(source[start:end])
    if text := _text(kind, pieces):
        yield text


def _text(kind: str, pieces: list[str]) -> str:
    """What pieces that follow each other say; nothing where that is too little to be a text."""
    if kind == "comment":
        if len(pieces) == 1:
            return ""
        return "\n".join(piece.lstrip("#:") for piece in pieces if not _DIRECTIVE.match(piece))
    triple = bool(pieces) and pieces[0].endswith(('"""', "'''"))
    if not triple and sum(map(len, pieces)) < MIN_CONSTANT:
        return ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = [ast.literal_eval(piece) for piece in pieces]
    except (SyntaxError, ValueError):  # an f-string, or an escape that this Python rejects
        return ""
    return "".join(value for value in values if isinstance(value, str))


def paragraphs(text: str) -> Iterator[str]:
    """The blocks of `text` that read as English prose, markup removed, each on one line."""
    for chunk in re.split(r"\n\s*\n", inspect.cleandoc(text.replace("\r\n", "\n"))):
        if chunk.count(" ") + chunk.count("\n") < MIN_WORDS - 1:  # as most are that are names or numbers
            continue
        for block in _blocks(chunk.split("\n")):
            if block.count(" ") < MIN_WORDS - 1 or ">>>" in block:  # the cheap look first: most blocks end here
                continue
            plain = _unmarked(block)
            if is_prose(plain):
                yield plain


def _blocks(lines: list[str]) -> Iterator[str]:
    """Join the lines of one chunk; list items and descriptions of parameters become blocks of their own."""
    while lines and _HEADING.match(lines[0].strip()):
        lines = lines[1:]
    base = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    block: list[str] = []
    deeper = [line[base : base + 1] == " " for line in lines]
    for index, line in enumerate(lines):
        content = line.strip()
        if _UNDERLINE.match(content):
            block = []  # what stood above was a heading
            continue
        described = not deeper[index] and any(deeper[index + 1 : index + 2])
        head = described or (not deeper[index] and any(deeper[max(index - 1, 0) : index]))
        if block and (head or _ITEM.match(content) or _PARAMETER.match(content)):
            yield " ".join(block)
            block = []
        if not (described and _TYPED.match(content)):
            block.append(content)
    yield " ".join(block)


def _unmarked(block: str) -> str:
    if ":`" in block:
        block = _ROLE.sub(_spelled_out, block)
    if "]" in block or "`_" in block or "<h" in block:
        block = _LINK.sub(lambda link: link[1] or link[2] or "", block)
    block = _ITEM.sub("", block, count=1) if _ITEM.match(block) else block
    block = _PARAMETER.sub("", block, count=1) if _PARAMETER.match(block) else block
    if "`" in block or "*" in block or "|" in block:
        block = _MARKUP.sub("", block)
    block = " ".join(block.split())
    # A lower-case word at the start is one that followed markup; a name such as csr_array is left as it is spelt.
    return block[:1].upper() + block[1:] if re.match(r"[a-z]+ ", block) else block


def _spelled_out(role: re.Match[str]) -> str:
    """What a Sphinx role shows: of `~torch.nn.Linear` the last part."""
    return role[1].lstrip("~!").rpartition(".")[2] if role[1][:1] in "~!" else role[1]


def is_prose(block: str) -> bool:
    """Whether a one-line block is a few sentences of English rather than code, a table or a licence."""
    if not block.endswith((".", "!", "?", ":", '."', ".)")) or _CODE.search(block) or _LICENCE.search(block):
        return False
    words = block.split()
    return len(words) >= MIN_WORDS and sum(map(bool, map(_PLAIN.match, words))) >= PLAIN_SHARE * len(words)
