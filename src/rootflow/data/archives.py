"""Archives: downloads that check themselves and can go on; members taken by their exact names."""

import contextlib
import hashlib
import http.client
import os
import shutil
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rootflow.errors import DataError

__all__ = ["Published", "cache_folder", "extract", "obtain", "open_tar"]

CHUNK = 2**20  # bytes
TIMEOUT = 60.0  # seconds without an answer
Say = Callable[[str], None]


@dataclass(frozen=True)
class Published:
    """A file as it was published: its name, and its MD5 or SHA-256 in hexadecimal if known."""

    name: str
    checksum: str | None = None


def cache_folder() -> Path:
    """Where prepared data lie unless told otherwise: ``rootflow`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rootflow"


def obtain(source: str, file: Published, folder: Path, *, verify: bool, say: Say) -> Path:
    """The path of a published file, its checksum compared if ``verify``.

    ``source``: a URL or a folder, to which the name is added, or the file itself. What is
    downloaded is written into ``folder``: first under the name with ``.part``, where a repeated
    call goes on after an interruption.
    Raises DataError for a missing file, a failed download or a wrong checksum.
    """
    if not source.startswith(("http://", "https://")):
        path = Path(source)
        path = path / file.name if path.is_dir() else path
        if not path.is_file():
            raise DataError(f"{path}: no such file; it must be {file.name} as it was published")
        if verify:
            _verify(path, file, str(path))
        return path
    path, url = folder / file.name, f"{source.rstrip('/')}/{file.name}"
    if not path.exists():
        part = path.with_name(f"{path.name}.part")
        folder.mkdir(parents=True, exist_ok=True)
        _download(url, part, say)
        try:
            _verify(part, file if verify else Published(file.name), url)
        except DataError:
            part.unlink()
            raise
        part.replace(path)
    elif verify:
        _verify(path, file, str(path))
    return path


def _verify(path: Path, file: Published, name: str) -> None:
    if file.checksum is None:
        return
    kind = "md5" if len(file.checksum) == 32 else "sha256"
    with path.open("rb") as content:
        found = hashlib.file_digest(content, kind).hexdigest()
    if found != file.checksum:
        raise DataError(f"{name}: its {kind.upper()} is {found}, not {file.checksum} as published; "
                        f"it is damaged or another version")


def _download(url: str, part: Path, say: Say) -> None:
    """Append to ``part`` what it lacks; from the start if the server cannot leave out a part."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "rootflow"} | ({"Range": f"bytes={have}-"} if have else {})
    broken: object = "the connection ended"
    total = None
    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            if not (answer.headers.get("Content-Range") or "").startswith(f"bytes {have}-"):
                have = 0
            length = answer.headers.get("Content-Length")
            total = have + int(length) if length else None
            size = f"{total / 1e6:,.0f} MB" if total else "of unknown size"
            say(f"downloading {url}, {size}" + (f", from byte {have:,} on" if have else ""))
            with part.open("ab" if have else "wb") as file:
                while chunk := answer.read(CHUNK):
                    file.write(chunk)
                    before, have = have, have + len(chunk)
                    if total and 10 * have // total > 10 * before // total:
                        say(f"{have / total:4.0%}")
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and have:  # nothing is lacking
            return
        raise DataError(f"{url}: the server answers {error.code} {error.reason}") from None
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError,
            ConnectionError) as error:
        broken = getattr(error, "reason", None) or str(error) or type(error).__name__
    else:
        if total is None or have >= total:
            return
    size = "" if total is None else f" of {total:,}"
    raise DataError(f"{url}: {broken} after {have:,}{size} bytes; repeat the command to go on "
                    f"from there")


@contextlib.contextmanager
def open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """A tar file, compressed or not; whatever is wrong with it becomes a DataError."""
    try:
        with tarfile.open(path, "r:*") as tar:
            yield tar
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk, not the content
            raise
        raise DataError(f"{path}: cannot be read, damaged or cut short: {error}") from None


def extract(archive: Path, members: Sequence[str], folder: Path) -> list[Path]:
    """Write these members of a tar file, found by their exact names, into ``folder``, in order.

    Only plain files are taken, and the names inside the archive never decide where one is written.
    Raises DataError for a damaged archive, a missing member, a link, or a name that leads out.
    """
    found: dict[str, Path] = {}
    with open_tar(archive) as tar:
        for member in tar:
            name = PurePosixPath(member.name)
            if name.is_absolute() or ".." in name.parts:
                raise DataError(f"{archive}: its member {member.name!r} leads out of the folder; "
                                f"this is not the published archive")
            if str(name) not in members or str(name) in found:
                continue
            content = tar.extractfile(member) if member.isreg() else None
            if content is None:
                raise DataError(f"{archive}: its member {member.name!r} is a link or another "
                                f"special file; this is not the published archive")
            target = folder / f"{members.index(str(name))}-{name.name}"
            with content, target.open("wb") as file:
                shutil.copyfileobj(content, file, CHUNK)
            found[str(name)] = target
            if len(found) == len(members):
                break
    missing = [name for name in members if name not in found]
    if missing:
        raise DataError(f"{archive}: holds no member {', '.join(missing)}")
    return [found[name] for name in members]
