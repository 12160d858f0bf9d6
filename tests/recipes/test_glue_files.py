import re
from pathlib import Path

import pytest

from recipes.glue_files import read_rows
from recipes.glue_tasks import TASKS, FileLayout, Row

MNLI_TRAIN = "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse"
PARSES = "0\t1p\t1n\tfiction\t( a b )\t( c d )\t(ROOT a)\t(ROOT b)"

# What the official files look like: header (None for CoLA), two data lines, the rows they are.
FORMATS: dict[str, tuple[str | None, list[str], list[Row]]] = {
    "cola": (
        None,
        ["gj04\t1\t\tOur friends won't buy this.", "ks08\t0\t*\tThey drank the pub."],
        [Row("Our friends won't buy this.", None, 1), Row("They drank the pub.", None, 0)],
    ),
    "sst2": (
        "sentence\tlabel",
        ["contains no wit , only labored gags \t0", 'a " charming " journey\t1'],
        [Row("contains no wit , only labored gags ", None, 0), Row('a " charming " journey', None, 1)],
    ),
    "mrpc": (
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        ['1\t702876\t702977\t" The witness lied .\tHe lied .', "0\t2108705\t2108831\tOne .\tTwo ."],
        [Row('" The witness lied .', "He lied .", 1), Row("One .", "Two .", 0)],
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        [
            "0\tmain-captions\tMSRvid\t2012test\t0001\tnone\tnone\tA plane.\tA jet.\t5.000",
            "1\tmain-news\theadlines\t2013\t0002\tnone\tnone\tOne.\tTwo.\t0.25",
        ],
        [Row("A plane.", "A jet.", 5.0), Row("One.", "Two.", 0.25)],
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        ["133273\t213221\t213222\tHow is it?\tHow's it?\t1", "402555\t536040\t536041\tWhy?\tWhere?\t0"],
        [Row("How is it?", "How's it?", 1), Row("Why?", "Where?", 0)],
    ),
    "mnli": (
        "\t".join([*MNLI_TRAIN.split(), "sentence1", "sentence2", "label1", "gold_label"]),
        [f"{PARSES}\tA cat.\tAn animal.\tneutral\tentailment", f"{PARSES}\tA cat.\tA dog.\tneutral\tcontradiction"],
        [Row("A cat.", "An animal.", 0), Row("A cat.", "A dog.", 2)],
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel",
        ["0\tWhen?\tIn 1836.\tentailment", "1\tWho?\tA long war.\tnot_entailment"],
        [Row("When?", "In 1836.", 0), Row("Who?", "A long war.", 1)],
    ),
    "rte": (
        "index\tsentence1\tsentence2\tlabel",
        ["0\tNone found.\tSome found.\tnot_entailment", "1\tA man died.\tA death.\tentailment"],
        [Row("None found.", "Some found.", 1), Row("A man died.", "A death.", 0)],
    ),
}
in_every_format = pytest.mark.parametrize("name", FORMATS)


def layout_of(name: str) -> FileLayout:
    layout = TASKS[name].files
    assert layout is not None
    return layout


def write(path: Path, name: str, lines: list[str], end: str = "\n", prefix: bytes = b"") -> Path:
    header = FORMATS[name][0]
    text = end.join([*([] if header is None else [header]), *lines, ""])
    path.write_bytes(prefix + text.encode("utf-8"))
    return path


def test_every_glue_task_has_a_format_here() -> None:
    assert set(FORMATS) == {name for name, task in TASKS.items() if task.files is not None}


@in_every_format
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf"])
def test_the_official_format_is_read_exactly(tmp_path: Path, name: str, end: str, prefix: bytes) -> None:
    _, lines, rows = FORMATS[name]
    read, short = read_rows(layout_of(name), write(tmp_path / "train.tsv", name, lines, end, prefix))
    assert (read, short) == (rows, 0)
    assert [type(row.label) for row in read] == [float if name == "stsb" else int] * 2


@in_every_format
def test_the_last_line_end_and_blank_lines_do_not_count(tmp_path: Path, name: str) -> None:
    _, lines, rows = FORMATS[name]
    path = write(tmp_path / "dev.tsv", name, [lines[0], "", lines[1], ""])
    assert read_rows(layout_of(name), path) == (rows, 0)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert read_rows(layout_of(name), path) == (rows, 0)


def test_only_a_line_feed_ends_a_row_and_quotes_mean_nothing(tmp_path: Path) -> None:
    text = 'one"\u2028two\x85three\x0bfour\rfive'
    path = write(tmp_path / "train.tsv", "sst2", [f"{text}\t1", '"\t0'])
    assert read_rows(layout_of("sst2"), path)[0] == [Row(text, None, 1), Row('"', None, 0)]


def test_columns_are_found_by_name(tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    path.write_text("label\tsentence2\textra\tsentence1\nentailment\tb\tx\ta\n", encoding="utf-8")
    assert read_rows(layout_of("rte"), path)[0] == [Row("a", "b", 0)]


def test_short_rows_of_qqp_are_counted(tmp_path: Path) -> None:
    _, lines, rows = FORMATS["qqp"]
    path = write(tmp_path / "train.tsv", "qqp", [lines[0], "1\t2\t3\tHow is", "it?\tWhy?\t0", lines[1]])
    assert read_rows(layout_of("qqp"), path) == (rows, 2)


def test_more_short_rows_than_the_official_files_have_are_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "train.tsv", "qqp", [FORMATS["qqp"][1][0]] + ["1\t2\t3"] * 11)
    with pytest.raises(ValueError, match=r"train\.tsv, line 13: 3 columns where 6 are expected"):
        read_rows(layout_of("qqp"), path)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "qqp"])
def test_a_short_row_of_any_other_task_names_its_line(tmp_path: Path, name: str) -> None:
    header, lines, _ = FORMATS[name]
    path = write(tmp_path / "dev.tsv", name, [lines[0], lines[1].rpartition("\t")[0]])
    with pytest.raises(ValueError, match=rf"dev\.tsv, line {2 if header is None else 3}: \d+ columns where"):
        read_rows(layout_of(name), path)


@in_every_format
def test_a_long_row_names_its_line(tmp_path: Path, name: str) -> None:
    header, lines, _ = FORMATS[name]
    path = write(tmp_path / "dev.tsv", name, [lines[0], lines[1] + "\tmore"])
    with pytest.raises(ValueError, match=rf"dev\.tsv, line {2 if header is None else 3}: \d+ columns where"):
        read_rows(layout_of(name), path)


BAD_LABELS = [
    ("cola", "gj04\tx\t\tA.", "the label must be one of 0, 1, got 'x'"),
    ("sst2", "A.\t2", "the label must be one of 0, 1, got '2'"),
    ("mrpc", "\t1\t2\tA.\tB.", "the label must be one of 0, 1, got ''"),
    ("qqp", "1\t2\t3\tA?\tB?\t1.0", "the label must be one of 0, 1, got '1.0'"),
    ("mnli", f"{PARSES}\tA.\tB.\tneutral\t-", "the label must be one of entailment, neutral, contradiction, got '-'"),
    ("qnli", "0\tA?\tB.\tneutral", "the label must be one of entailment, not_entailment, got 'neutral'"),
    ("rte", "0\tA.\tB.\t1", "the label must be one of entailment, not_entailment, got '1'"),
    *(
        ("stsb", f"0\tg\tf\ty\to\tn\tn\tA.\tB.\t{score}", rf"the score must be a number in \[0, 5\], got '{score}'")
        for score in ("5.1", "-0.1", "nan", "inf", "high", "")
    ),
]


@pytest.mark.parametrize(("name", "line", "message"), BAD_LABELS)
def test_a_bad_label_names_its_file_and_line(tmp_path: Path, name: str, line: str, message: str) -> None:
    header, lines, _ = FORMATS[name]
    path = write(tmp_path / "train.tsv", name, [lines[0], line])
    where = f"{path}, line {2 if header is None else 3}: "
    with pytest.raises(ValueError, match=re.escape(where) + message):
        read_rows(layout_of(name), path)


@pytest.mark.parametrize("name", [name for name, (header, _, _) in FORMATS.items() if header is not None])
def test_a_missing_column_is_named(tmp_path: Path, name: str) -> None:
    layout, path = layout_of(name), tmp_path / "train.tsv"
    columns = str(FORMATS[name][0]).split("\t")
    for column in (*layout.texts, layout.label):
        header = "\t".join("other" if other == column else other for other in columns)
        path.write_text(header + "\n", encoding="utf-8")
        with pytest.raises(ValueError, match=rf"train\.tsv has no column '{column}'; its header is "):
            read_rows(layout, path)


@in_every_format
@pytest.mark.parametrize("content", [b"", b"\n", b"\xef\xbb\xbf", b"\r\n\r\n"])
def test_an_empty_file_is_an_error(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / "train.tsv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train\.tsv has no rows"):
        read_rows(layout_of(name), path)


def test_a_file_with_only_a_header_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.tsv has no rows"):
        read_rows(layout_of("rte"), write(tmp_path / "train.tsv", "rte", []))


def test_a_missing_file_names_the_layout(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--glue-dir must name.*which holds RTE/train\.tsv"):
        read_rows(layout_of("rte"), tmp_path / "RTE" / "train.tsv")


def test_a_file_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    path.write_bytes(b"sentence\tlabel\nclich\xe9\t0\n")
    with pytest.raises(ValueError, match=r"train\.tsv is not UTF-8 text \(invalid continuation byte\)"):
        read_rows(layout_of("sst2"), path)
