"""The README says what the files say: the example of an extension, and the table of results."""

from pathlib import Path

from benchmarks.demos import BEGIN, END, results_block

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_extension_is_the_package_that_the_tests_install():
    code = (ROOT / "tests" / "downstream" / "qsam_ternary.py").read_text(encoding="utf-8")
    assert f"```python\n{code}```" in README
    entry_points = (ROOT / "tests" / "downstream" / "pyproject.toml").read_text(encoding="utf-8")
    for line in ('[project.entry-points."qsam.quantizers"]', 'ternary = "qsam_ternary:Ternary"'):
        assert line in entry_points
        assert line in README


def test_the_table_of_results_is_made_from_the_kept_runs():
    shown = README.split(BEGIN)[1].split(END)[0].strip()
    assert shown == "\n".join(results_block()).strip()
    assert shown
