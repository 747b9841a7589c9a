"""One file over HTTP: resumed after a break, tried again, checked, and put into place only when it is whole.

    PATH.part    what has come so far
    PATH.etag    the server's strong entity tag of it, without which nobody could say that the rest still fits
    .lock        beside them, held while somebody fetches into the folder

References
[1] Ranges, entity tags, Retry-After: RFC 9110, https://www.rfc-editor.org/rfc/rfc9110, sec. 8.8.3, 10.2.3, 13.1.5
    and 14. torch.hub.download_url_to_file would be shorter, but begins anew after each break.
[2] X-Linked-Size and X-Linked-ETag: size and SHA-256 of a large file, which the Hugging Face hub sends with the
    redirect to it (huggingface_hub's file_download.py). The ETag of the host behind the redirect looks like a
    SHA-256, too, and is none; so an ETag alone is never taken for one.
"""

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException, InvalidURL
from pathlib import Path
from time import monotonic, sleep
from typing import BinaryIO
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from cli import clock
from weights import InputError, sha256_of

TIMEOUT = 30  # seconds without a byte
PAUSES = (1, 2, 4, 8, 16)  # seconds before each new try; begun again when a try has got further than all before
LONGEST_PAUSE = 120  # seconds, when a server asks for more
SHA256 = re.compile("[0-9a-f]{64}")


class FetchError(InputError):
    """The server refused with `status`; None: it could not be reached, or broke off again and again."""

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class _Mismatch(InputError):
    """What came is not what was expected: nothing of it is kept."""


class _Broken(Exception):
    """What another try may mend, not before `wait` seconds have passed."""

    def __init__(self, message: str, wait: int = 0):
        super().__init__(message)
        self.wait = wait


def amount(count: int) -> str:
    """Bytes for a person: 1234567 -> "1.2 MB"."""
    power = min((len(str(count)) - 1) // 3, 4)
    return f"{count / 1000**power:.{min(power, 1)}f} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


@contextmanager
def _progress(name: str, first: int, total: int | None, report) -> Iterator[Callable[[int], None]]:
    """A function to call with the bytes so far: a line that is rewritten on a terminal, else one now and then."""
    terminal = sys.stderr.isatty()
    begun = last = monotonic()
    pause = 0.2 if terminal else 5.0
    shown = False

    def tell(have: int) -> None:
        nonlocal last, pause, shown
        now = monotonic()
        if now - last < pause and not (shown and have == total):
            return
        speed = max(1.0, (have - first) / (now - begun))
        line = f"{name}: {amount(have)}, {amount(int(speed))}/s"
        if total:
            line = f"{name}: {have / total:4.0%} of {amount(total)}, {amount(int(speed))}/s, "
            line += f"{clock((total - have) / speed)} left"
        if terminal:
            print(f"\r{line:<79}", end="", file=sys.stderr, flush=True)
        else:
            report(line)
            pause *= 1.5  # 15 lines in the first hour
        last, shown = now, True

    try:
        yield tell
    finally:
        if terminal and shown:
            print(file=sys.stderr)


class _Redirect(HTTPRedirectHandler):
    """Takes the token along to the same server only, and keeps what the hub says of a file in the redirect [2]."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        token = req.get_header("Authorization")
        if token and urlsplit(newurl)[:2] == urlsplit(req.full_url)[:2]:  # scheme, host and port
            new.add_unredirected_header("Authorization", token)
        new.linked = req.linked
        for name in ("X-Linked-Size", "X-Linked-ETag"):
            if name in headers:
                req.linked.setdefault(name, headers[name])
        return new


def _ask(url: str, have: int, etag: str, token: str | None):
    """The server's answer, whatever its status, to a request for all but the first `have` bytes of the file."""
    headers = {"User-Agent": "qadapter", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if etag:
            headers["If-Range"] = etag
    try:
        request = Request(url, headers=headers)
        request.linked = {}
        if token:  # unredirected: urllib itself would take it along to any server
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        answer = build_opener(_Redirect).open(request, timeout=TIMEOUT)
    except HTTPError as error:
        answer = error
    except (InvalidURL, ValueError):  # whose text may quote the token
        raise InputError(f"{url}: expected an address like https://host/path, and a token of ASCII") from None
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise _Broken(f"cannot be reached: {reason or type(reason).__name__}") from error
    for name, value in request.linked.items():
        del answer.headers[name]
        answer.headers[name] = value
    return answer


def _check_status(answer, url: str) -> None:
    if answer.status == 429 or answer.status >= 500:
        wait = answer.headers.get("Retry-After", "")
        raise _Broken(f"the server answers {answer.status}", int(wait[:9]) if wait.isdecimal() else 0)
    if answer.status not in (200, 206, 416):
        raise FetchError(f"{url}: the server answers {answer.status}", answer.status)


def _span(answer) -> tuple[int | None, int | None]:
    """-> the first byte that the answer brings, the size of the whole file; None where it does not say."""
    if answer.status == 200:
        return 0, _number(answer.headers.get("Content-Length"))
    found = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", answer.headers.get("Content-Range", ""))
    return (_number(found[1]), _number(found[2])) if found else (None, None)


def _number(text: str | None) -> int | None:
    return int(text) if text and re.fullmatch("[0-9]{1,18}", text) else None


def _agreed_size(answer, size: int | None, url: str) -> int | None:
    stated = [size, _number(answer.headers.get("X-Linked-Size")), _span(answer)[1]]
    sizes = [n for n in stated if n is not None]
    for n in sizes[1:]:
        if n != sizes[0]:
            raise _Mismatch(f"{url}: expected {sizes[0]} bytes, the server states {n}")
    return sizes[0] if sizes else None


def _strong(etag: str | None) -> str:
    """The entity tag, "" unless it is strong: W/"..." says equal in meaning, perhaps not in bytes."""
    return etag if etag and re.fullmatch(r'"[!#-~]*"', etag) else ""


def check_room(folder: Path, needed: int, what: str) -> None:
    """Raises InputError, which `what` begins, where the disk of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(f"{what}: needs {amount(needed)}, the disk of {folder} has {amount(free)} free")


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def held(path: Path) -> int:
    """How many bytes of the file are here, whole or in part."""
    for there in (path, _part(path)):
        with suppress(FileNotFoundError):
            return there.stat().st_size
    return 0


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    part.with_suffix(".etag").unlink(missing_ok=True)


def _copy(answer, file: BinaryIO, have: int, total: int | None, tell: Callable[[int], None]) -> int:
    """Appends what comes to a file of `have` bytes; -> its bytes then, a little more than `total` at most."""
    while total is None or have <= total:
        try:
            chunk = answer.read1(1 << 20)  # what is there: a break then loses nothing
        except (OSError, HTTPException) as error:
            raise _Broken(f"broke off at {amount(have)}: {error or type(error).__name__}") from error
        if not chunk:
            break
        file.write(chunk)
        have += len(chunk)
        tell(have)
    return have


def _try(url: str, part: Path, size: int | None, sha256: str | None, token: str | None, report) -> str | None:
    """One request, for what `part` lacks or for all; -> the SHA-256 to expect, None where nobody states one.

    Gone on with is only what must be of the same file: its strong entity tag [1] is kept beside it, or the
    SHA-256 of the whole is known.
    """
    tag = part.with_suffix(".etag")
    etag = _strong(tag.read_text("latin-1")) if tag.is_file() else ""
    have = part.stat().st_size if part.is_file() and (etag or sha256) else 0
    with _ask(url, have, etag, token) as answer:
        _check_status(answer, url)
        total = _agreed_size(answer, size, url)
        linked = answer.headers.get("X-Linked-ETag", "").strip('"')
        expected = sha256 or (linked if SHA256.fullmatch(linked) else None)
        if answer.status == 416 and have and have == total:  # the last try was stopped just before the end
            return expected
        found = _strong(answer.headers.get("ETag"))
        if answer.status == 200:
            have = 0
        elif _span(answer)[0] != have or (etag and found != etag):
            _discard(part)
            raise _Broken("the file is not the one that was begun")
        check_room(part.parent, (total or 0) - have, url)
        with open(part, "ab" if have else "wb") as file, _progress(part.stem, have, total, report) as tell:
            if not have:  # when the old part is gone, before the new one begins
                tag.write_text(found, "latin-1")
            have = _copy(answer, file, have, total, tell)
        if total is not None and have < total:
            raise _Broken(f"broke off at {amount(have)} of {amount(total)}")
        if total is not None and have > total:
            raise _Mismatch(f"{url}: expected {total} bytes, the server sends more")
        return expected


def _persist(url: str, part: Path, size: int | None, sha256: str | None, token: str | None, report) -> str | None:
    furthest = tries = 0
    while True:
        try:
            return _try(url, part, size, sha256, token, report)
        except _Broken as error:
            have = part.stat().st_size if part.is_file() else 0
            if have > furthest:
                furthest, tries = have, 0
            if tries == len(PAUSES):
                raise FetchError(f"{url}: {error}") from error
            pause = min(max(PAUSES[tries], error.wait), LONGEST_PAUSE)
            report(f"{url}: {error}; trying again in {pause} s")
            sleep(pause)
            tries += 1


def _is(path: Path, size: int | None, sha256: str | None) -> bool:
    return (
        path.is_file()
        and (size is None or path.stat().st_size == size)
        and (sha256 is None or sha256_of(path) == sha256)
    )


@contextmanager
def _alone(folder: Path, report) -> Iterator[None]:
    """Keeps other processes from fetching into the folder; the system lets go of the lock whatever ends us."""
    import fcntl  # which Windows lacks; what is there already can be used without it

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"{folder}: waiting for another process that fetches into it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _put(part: Path, path: Path) -> None:
    """Renames, after the bytes are on the disk, and has the disk note the new name."""
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    with suppress(OSError):  # some systems cannot sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def fetch(
    url: str, path: Path, *, size: int | None, sha256: str | None, token: str | None = None, report=print
) -> None:
    """Downloads one file to `path`, which is there only when it is whole; what is there already stays.

    size in bytes, sha256 in lower-case hex: checked where given, else what the server states. The download grows
    in `path`.part, goes on from there after a break or Ctrl-C, and is tried again when the connection breaks or
    the server answers 429 or 5xx. `token` is sent to the server of `url` alone. Several processes may fetch the
    same file: one does, the others wait. Raises FetchError when the server refuses or cannot be reached,
    InputError when the file is not what was expected (its part is deleted) or the disk has no room for it.
    """
    if not url.startswith(("http://", "https://")):
        raise InputError(f"{url}: expected an address like https://host/path")
    part = _part(path)
    try:
        with _alone(path.parent, report):
            if _is(path, size, sha256):
                return
            try:
                expected = _persist(url, part, size, sha256, token, report)
                if expected and (found := sha256_of(part)) != expected:
                    raise _Mismatch(f"{url}: expected SHA-256 {expected}, found {found}")
            except _Mismatch:
                _discard(part)
                raise
            _put(part, path)
            _discard(part)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
