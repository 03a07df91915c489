"""The examples on the pages, which tests run as they stand there."""

import re
import textwrap

from harness import ROOT

FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)


def section(heading: str, page: str = "README.md") -> str:
    """What stands below a heading of the page, up to the next."""
    text = (ROOT / page).read_text()
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert found, f"{page} has no heading {heading!r}"
    return found[1]


def examples(heading: str = "", page: str = "README.md", language: str = "sh") -> list[str]:
    """The page's fenced blocks in `language`; with a heading, those below it up to the next."""
    text = section(heading, page) if heading else (ROOT / page).read_text()
    found = [textwrap.dedent(block) for kind, block in FENCED.findall(text) if kind == language]
    assert found, f"{page} has no {language} below the heading {heading!r}"
    return found


def rows(heading: str, page: str = "README.md") -> list[list[str]]:
    """The cells of the rows of the table below a heading, without its head."""
    lines = [line for line in section(heading, page).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def replaced(text: str, changes: dict[str, str]) -> str:
    """`text` with each of `changes` made exactly once; an example that has moved on is an error."""
    for old, new in changes.items():
        assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in the example"
        text = text.replace(old, new)
    return text
