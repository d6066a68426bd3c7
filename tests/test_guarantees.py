"""docs/guarantees.md names the tests that hold its promises: they are there."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs/guarantees.md"


def test_every_test_that_is_named_is_there() -> None:
    file, n_names = "", 0
    for found in re.finditer(r"`(test_\w+\.py)?(?:::(test_\w+)(…?))?`", PAGE.read_text("utf-8")):
        named, test, begins = found.groups()
        file = named or file
        text = (TESTS / file).read_text("utf-8")
        if test:
            assert re.search(rf"^def {test}{'' if begins else '[(]'}", text, re.MULTILINE), found[0]
            n_names += 1
    assert n_names > 40


def test_every_promise_names_one() -> None:
    text = PAGE.read_text("utf-8").partition("## The price of a checkpoint")[0]
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    promises = [row for row in rows if not row.startswith("| promise")]
    assert len(promises) > 30
    assert [row for row in promises if "`test_" not in row and "`::test_" not in row] == []
