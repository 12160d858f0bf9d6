"""docs/reliability.md is made from the tests, and misses none."""

import re

from tests.reliability import MODULES, PAGE, ROOT, page


def test_the_page_is_made_from_the_tests():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.reliability"


def test_every_file_with_a_fault_is_on_the_page():
    listed = {name for names in MODULES.values() for name in names}
    found = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"^ *@fault\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert found == listed
