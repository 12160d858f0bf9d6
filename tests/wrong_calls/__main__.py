"""Write docs/errors.md."""

from tests.wrong_calls.book import PAGE, page

PAGE.write_text(page(), encoding="utf-8")
