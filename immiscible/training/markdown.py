"""What users name (folders, classes, captions, paths) as Markdown that shows it and does nothing else."""

from __future__ import annotations

import re

# Backslash, code, emphasis, links, strikethrough and formulas; "<" and "&" where a tag or an entity would begin, so that "< 0.95" stays.
_MARKS = re.compile(r"[\\`*\[\]~$]|<(?=[A-Za-z/!?])|&(?=#|\w+;)|(?<![^\W_])_|_(?![^\W_])")
_FIRST = re.compile(r"[#>]|[-+=](?![\w.])|(?<=\d)[.)](?=\s|$)")  # what begins a heading, a quotation, a list or a line


def inline(text: object) -> str:
    """``text`` inside a line: one line, its marks shown as they are."""
    return _MARKS.sub(r"\\\g<0>", " ".join(str(text).split()))


def line(text: object) -> str:
    """``text`` at the start of a line, where some marks begin a block."""
    shown = inline(text)
    start = re.match(r"\d*", shown)
    first = _FIRST.match(shown, start.end() if start else 0)
    return f"{shown[: first.start()]}\\{shown[first.start() :]}" if first else shown


def table_cell(text: object) -> str:
    """``text`` in a cell of a table, whose bars part the columns."""
    return inline(text).replace("|", "\\|")


def fenced(text: str) -> str:
    """A block of code that ends where ``text`` ends, whatever that holds."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"
