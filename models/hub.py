"""Public models by name: a local folder or file, or `owner/name[@revision]` of the Hugging Face hub, downloaded once.

    CACHE/owner--name/refs/REVISION       the commit of the revision (percent-encoded) when it was downloaded
    CACHE/owner--name/COMMIT/NAME         a file of the model
    CACHE/owner--name/COMMIT/NAME.part    the same, not complete yet
    CACHE/owner--name/COMMIT/.complete    {"files": {NAME: bytes}}, written last
    CACHE/owner--name/COMMIT/.lock        held by the process that downloads

A complete model needs no network, and `main` stays at the commit it had when it was downloaded. For a newer commit,
name a revision or delete CACHE/owner--name. Environment variables: QADAPTER_CACHE replaces ~/.cache/qadapter/hub,
HF_ENDPOINT names a mirror of https://huggingface.co, HF_TOKEN is needed for gated models.

References
[1] The listing of a model's files: https://huggingface.co/docs/hub/api
[2] Range requests: RFC 9110, https://www.rfc-editor.org/rfc/rfc9110, section 14
"""

import json
import os
import re
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse, InvalidURL
from pathlib import Path
from reprlib import repr as short
from tempfile import TemporaryDirectory
from time import monotonic, sleep
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from common.cli import format_seconds
from common.errors import InputError
from common.files import (
    acquire_lock,
    check_disk_space,
    field,
    format_bytes,
    parse_object,
    read_json,
    replace_atomically,
    sha256_of,
    sync_folder,
)
from common.preprocessing import VIDEO_PREPROCESSORS
from models.weights import WEIGHT_FILE_NAMES, read_index

CACHE = Path(os.path.expanduser(os.environ.get("QADAPTER_CACHE") or "~/.cache/qadapter/hub"))
ROOT = Path(__file__).resolve().parent.parent  # the project's folder

TIMEOUT = 30  # seconds without a byte
PAUSES = (1, 2, 4, 8, 16)  # seconds before each retry; they start again after progress
REPORT_INTERVAL = 10  # seconds between lines of progress

PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"  # of a path: neither hidden nor a parent folder
HUB_ID = re.compile(rf"({PART}/{PART})(?:@({PART}(?:/{PART})*))?")
COMMIT, SHA256 = re.compile("[0-9a-f]{40}"), re.compile("[0-9a-f]{64}")

GATED = ": the model is gated, private or missing: accept its terms on its page and set HF_TOKEN to a token with access"
REFUSALS = {401: GATED, 403: GATED, 404: ": no such local folder or file, and no such model or revision"}


# -------------------------------------------------------------------------------------- files


class _Interrupted(Exception):
    """A broken connection or a busy server: a retry may help."""


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


class _RedirectHandler(HTTPRedirectHandler):
    """Sends the token along only if the redirect stays on the same scheme, host and port."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        token = req.get_header("Authorization")
        if token and urlsplit(newurl)[:2] == urlsplit(req.full_url)[:2]:
            new.add_unredirected_header("Authorization", token)
        return new


def _open(url: str, start: int) -> HTTPResponse:
    """Requests a file from byte `start` on. Raises InputError if it is refused, _Interrupted if a retry may help."""
    try:
        request = Request(url, headers={"User-Agent": "qadapter", "Accept-Encoding": "identity"})
        if start:
            request.add_header("Range", f"bytes={start}-")
        if token := os.environ.get("HF_TOKEN", "").strip():  # unredirected: urllib would send it to any server
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        if request.type not in ("http", "https"):
            raise ValueError
        response = build_opener(_RedirectHandler).open(request, timeout=TIMEOUT)
    except HTTPError as error:
        response = error
    except (InvalidURL, ValueError):  # their messages may contain the token
        raise InputError(f"{url}: expected an address like https://host/path, and a token of ASCII") from None
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise _Interrupted(f"cannot be reached: {reason or type(reason).__name__}") from error
    if response.status in (200, 206):
        return response
    if response.status == 429 or response.status >= 500:
        raise _Interrupted(f"the server answers {response.status}")
    raise InputError(f"{url}: the server answers {response.status}{REFUSALS.get(response.status, '')}")


def _copy(response: HTTPResponse, file, start: int, total: int | None, name: str, report) -> int:
    """Appends the response to a file of `start` bytes; returns its size then, at most a chunk more than `total`."""
    received, started = start, monotonic()
    next_report = started + REPORT_INTERVAL
    while total is None or received <= total:
        try:
            chunk = response.read1(1 << 20)  # what has arrived already: a break loses none of it
        except (OSError, HTTPException) as error:
            raise _Interrupted(f"the connection broke: {error or type(error).__name__}") from error
        if not chunk:
            break
        file.write(chunk)
        received += len(chunk)
        if total and monotonic() >= next_report:
            next_report += REPORT_INTERVAL
            seconds_left = (total - received) * (monotonic() - started) / (received - start)
            report(f"{name}: {received / total:.0%} of {format_bytes(total)}, {format_seconds(seconds_left)} left")
    return received


def _receive(url: str, part: Path, size: int | None, resume: bool, report) -> None:
    """One request for the bytes that `part` does not have yet."""
    start = _size(part) if resume and _size(part) <= size else 0
    if start and start == size:
        return
    with _open(url, start) as response:
        if response.status == 200:
            start = 0
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            part.unlink(missing_ok=True)
            raise _Interrupted("the server sends another range than requested")
        total = size if response.length is None else start + response.length
        if size is not None and total != size:
            part.unlink(missing_ok=True)
            raise InputError(f"{url}: expected {size} bytes, the server states {total}")
        with open(part, "ab" if start else "wb") as file:
            received = _copy(response, file, start, total, part.stem, report)
    if total is not None and received < total:
        raise _Interrupted(f"the connection broke at {format_bytes(received)} of {format_bytes(total)}")
    if total is not None and received > total:
        part.unlink()
        raise InputError(f"{url}: expected {total} bytes, the server sends more")


def _download(url: str, path: Path, size: int | None, sha256: str | None, report) -> None:
    """Downloads a file to `path`, which exists only when it is complete; a correct file there is kept.

    A partial file is continued, also by later calls, if its SHA-256 is known and can prove that the parts fit together.
    Raises InputError for a file of another size or SHA-256, and after the last retry.
    """
    if path.is_file() and size in (None, _size(path)) and sha256 in (None, sha256_of(path)):
        return
    part, tries, furthest = path.with_name(path.name + ".part"), 0, 0
    while True:
        try:
            _receive(url, part, size, sha256 is not None, report)
            break
        except _Interrupted as error:
            if _size(part) > furthest:
                tries, furthest = 0, _size(part)
            if tries == len(PAUSES):
                raise InputError(f"{url}: {error}; what is complete stays in {CACHE}") from error
            report(f"{url}: {error}; trying again in {PAUSES[tries]} s")
            sleep(PAUSES[tries])
            tries += 1
    if sha256 is not None and (found := sha256_of(part)) != sha256:
        part.unlink()
        raise InputError(f"{url}: expected SHA-256 {sha256}, found {found}")
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    sync_folder(path.parent)


# ------------------------------------------------------------------------------------- models


def _is_complete(folder: Path) -> bool:
    if not (path := folder / ".complete").is_file():
        return False
    files = field(read_json(path), "files", dict, path)
    return all((folder / name).is_file() and _size(folder / name) == size for name, size in files.items())


def _fetch_listing(url: str, revision: str, report) -> tuple[str, dict[str, tuple[int, str | None]]]:
    """-> the commit, and {name: (bytes, SHA-256)} of its files; small files, those in git, have no SHA-256."""
    with TemporaryDirectory() as folder:
        _download(url, Path(folder) / "listing", None, None, report)
        listing = parse_object((Path(folder) / "listing").read_bytes(), url)
    commit, files = field(listing, "sha", str, url), {}
    if not COMMIT.fullmatch(commit) or (COMMIT.fullmatch(revision) and commit != revision):
        raise InputError(f"{url}: sha: expected the commit, 40 hex digits, found {commit!r}")
    for file in field(listing, "siblings", list, url):
        if not isinstance(file, dict):
            raise InputError(f"{url}: siblings: expected objects with an rfilename, found {short(file)}")
        name = field(file, "rfilename", str, f"{url}: siblings")
        where, lfs = f"{url}: {name}", field(file, "lfs", dict, f"{url}: {name}", {})
        size, sha256 = field(lfs or file, "size", int, where), field(lfs, "sha256", str, where) if lfs else None
        if size < 0 or (sha256 is not None and not SHA256.fullmatch(sha256)):
            raise InputError(f"{where}: expected a size of at least 0 and a SHA-256 in hex, found {size}, {sha256}")
        files[name] = size, sha256
    return commit, files


def _download_files(files: dict, weights: list[str], folder: Path, base_url: str, check, report) -> None:
    """Downloads the configs and the tokenizer, runs `check`, then downloads the weights."""

    def download(name: str) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        _download(f"{base_url}/{quote(name)}", folder / name, *files[name], report)

    tokenizer = ("tokenizer.model",) if "tokenizer.model" in files else ("tokenizer.json", "tokenizer_config.json")
    names = ("config.json", "generation_config.json", "preprocessor_config.json", *VIDEO_PREPROCESSORS, *tokenizer)
    configs = [name for name in names if name in files]
    if weights[0].endswith(".index.json"):
        download(weights[0])
        shards = list(read_index(folder / weights[0]))
        if missing := [name for name in shards if name not in files]:
            raise InputError(f"{folder / weights[0]}: names {missing[0]!r:.200}, which {base_url} does not have")
        weights = weights + shards
    sizes = {name: files[name][0] for name in configs + weights}
    report(f"downloading {len(sizes)} files, {format_bytes(sum(sizes.values()))}, from {base_url} into {folder}")
    present = sum(max(_size(folder / name), _size(folder / f"{name}.part")) for name in sizes)
    check_disk_space(folder, sum(sizes.values()) - present, base_url)
    for name in configs:
        download(name)
    check(folder)
    for name in weights:
        download(name)
    with replace_atomically(folder / ".complete") as file:
        file.write(json.dumps({"files": sizes}).encode())


def _download_model(repo: str, revision: str, home: Path, check, report) -> Path:
    """Downloads a model's missing files, one process at a time; returns their folder."""
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    url = f"{endpoint}/api/models/{repo}/revision/{quote(revision, safe='')}?blobs=true"
    commit, files = _fetch_listing(url, revision, report)
    weights = [name for name in WEIGHT_FILE_NAMES if name in files][:1]
    if "config.json" not in files or not weights:
        raise InputError(f"{url}: expected config.json and one of {', '.join(WEIGHT_FILE_NAMES)}, found {short(files)}")
    folder = home / commit
    folder.mkdir(parents=True, exist_ok=True)
    if (lock := acquire_lock(folder / ".lock", wait=False)) is None:
        report(f"{folder}: waiting for another process that downloads into it")
        lock = acquire_lock(folder / ".lock", wait=True)
    try:
        if not _is_complete(folder):
            _download_files(files, weights, folder, f"{endpoint}/{repo}/resolve/{commit}", check, report)
    finally:
        os.close(lock)
    return folder


def resolve(name: str | Path, check: Callable[[Path], object] = lambda folder: None,
            report: Callable[[str], None] = print) -> Path:  # fmt: skip
    """A local folder or file -> itself; `backbones/...` -> the project's own; a hub id -> its folder in CACHE.

    A hub model is downloaded unless it is complete. `check` gets its folder before the weights are downloaded, and
    raises InputError if the model cannot be used. Every failure is an InputError of one line.
    """
    if os.path.exists(name):
        return Path(name)
    if str(name).startswith("backbones/"):
        if not (folder := ROOT / name).is_dir():
            raise InputError(f"{folder}: expected the folder of a model, found none")
        return folder
    match = HUB_ID.fullmatch(str(name))
    if not match or len(str(name)) > 200 or ".." in str(name) or "--" in match[1]:
        raise InputError(f"{name}: expected a folder, a file or a hub id like owner/name[@revision]")
    repo, revision = match[1], match[2] or "main"
    home = CACHE / repo.replace("/", "--")
    ref = home / "refs" / quote(revision, safe="")
    revision = ref.read_text("latin-1") if ref.is_file() else revision
    if COMMIT.fullmatch(revision) and _is_complete(home / revision):
        return home / revision
    try:
        folder = _download_model(repo, revision, home, check, report)
        ref.parent.mkdir(exist_ok=True)
        with replace_atomically(ref) as file:
            file.write(folder.name.encode())
    except OSError as error:
        raise InputError(f"cannot write {error.filename or home}: {error.strerror or error}") from error
    return folder


def pin_revision(name: str | Path, folder: Path) -> str:
    """A name that will always resolve to the files in `folder`: a hub id is pinned to its commit."""
    if os.path.exists(name) or folder.parent.parent != CACHE:
        return str(name)
    return f"{str(name).split('@')[0]}@{folder.name}"
