"""Public models by name: a local folder or file, or `owner/name[@revision]` of the Hugging Face hub, downloaded once.

    CACHE/owner--name/COMMIT/NAME         a file of the model
    CACHE/owner--name/COMMIT/NAME.part    the same, not complete yet
    CACHE/owner--name/refs/REVISION       the commit of a revision (percent-encoded), once its files are complete
    CACHE/owner--name/.lock               held by the process that downloads

A complete model needs no network, and `main` stays at the commit it had when it was downloaded. For a newer commit,
name a revision or delete CACHE/owner--name. Environment variables: QADAPTER_CACHE replaces ~/.cache/qadapter/hub,
HF_ENDPOINT replaces https://huggingface.co, HF_TOKEN is needed for gated models.

References
[1] The listing of a model's files: https://huggingface.co/docs/hub/api
[2] Range requests: RFC 9110, https://www.rfc-editor.org/rfc/rfc9110, section 14
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

from common.errors import InputError, reading
from common.files import acquire_lock, check_disk_space, format_bytes, parse_object, replace_atomically, sha256_of
from common.preprocessing import IMAGE_PREPROCESSORS, VIDEO_PREPROCESSORS
from models.weights import WEIGHT_FILE_NAMES, read_index

CACHE = Path(os.path.expanduser(os.environ.get("QADAPTER_CACHE") or "~/.cache/qadapter/hub"))
ROOT = Path(__file__).resolve().parent.parent  # the project's folder

TIMEOUT = 30  # seconds without a byte

PART = r"\w(?:[\w.-]*\w)?"  # of a path: neither hidden nor a parent folder
HUB_ID = re.compile(rf"({PART}/{PART})(?:@({PART}(?:/{PART})*))?", re.ASCII)
COMMIT = re.compile("[0-9a-f]{40}")

# All that is read of a model besides its weights.
CONFIG_FILES = ("config.json", "generation_config.json", *IMAGE_PREPROCESSORS, *VIDEO_PREPROCESSORS,
                "tokenizer.model", "tokenizer.json")
GATED = ": the model is gated, private or missing: accept its terms on its page and set HF_TOKEN to a token with access"
AGAIN = "the same command goes on where it stopped"
REFUSALS = {401: GATED, 403: GATED, 404: ": no such local folder or file, and no such model or revision"}


# -------------------------------------------------------------------------------------- files


@contextmanager
def _request(url: str, start: int = 0) -> Iterator[HTTPResponse]:
    """A file from byte `start` on [2], to be read in the block. Raises InputError if it is refused or cut off."""
    request = Request(url, headers={"User-Agent": "qadapter"} | ({"Range": f"bytes={start}-"} if start else {}))
    if token := os.environ.get("HF_TOKEN", "").strip():
        request.add_unredirected_header("Authorization", f"Bearer {token}")  # not for the servers of the files
    try:
        with urlopen(request, timeout=TIMEOUT) as response:
            yield response
    except HTTPError as error:
        raise InputError(f"{url}: the server answers {error.code}{REFUSALS.get(error.code, '')}") from error
    except (OSError, HTTPException) as error:
        raise InputError(f"{url}: {error or type(error).__name__}; {AGAIN}") from error
    except ValueError:  # its message may contain the token
        raise InputError(f"{url}: expected an address like https://host/path, and a token of ASCII") from None


def _download(url: str, path: Path, size: int, sha256: str | None) -> None:
    """Downloads a file to `path`, which exists only when it is complete.

    The partial file of an earlier call is continued if its SHA-256 is known and can prove that the parts fit together.
    Raises InputError if the connection breaks, and for a file of another size or SHA-256.
    """
    if path.is_file() and path.stat().st_size == size:
        return
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    start = part.stat().st_size if sha256 else 0
    if start < size:
        with _request(url, start) as response, open(part, "ab" if response.status == 206 else "wb") as file:
            shutil.copyfileobj(response, file)
    if (arrived := part.stat().st_size) < size:
        raise InputError(f"{url}: the connection broke at {format_bytes(arrived)} of {format_bytes(size)}; {AGAIN}")
    if arrived != size or sha256 not in (None, sha256_of(part)):
        part.unlink()
        raise InputError(f"{url}: expected {size} bytes of SHA-256 {sha256}, found other ones, which are deleted")
    os.replace(part, path)


# ------------------------------------------------------------------------------------- models


def _fetch_listing(url: str, revision: str) -> tuple[str, dict[str, tuple[int, str | None]]]:
    """The commit, and {name: (bytes, SHA-256)} of its files [1]; small files, those in git, have no SHA-256."""
    with _request(url) as response:
        text = response.read()
    with reading(url):
        listing, files = parse_object(text, url), {}
        commit = listing["sha"]
        if not COMMIT.fullmatch(commit) or (COMMIT.fullmatch(revision) and commit != revision):
            raise InputError(f"sha: expected the commit, 40 hex digits, found {commit!r}")
        for file in listing["siblings"]:
            lfs = file.get("lfs")
            files[file["rfilename"]] = int((lfs or file)["size"]), lfs["sha256"] if lfs else None
    return commit, files


def _download_model(repo: str, revision: str, home: Path, check: Callable[[Path], object]) -> str:
    """Downloads the configs and the tokenizer, runs `check`, then downloads the weights; returns the commit."""
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    url = f"{endpoint}/api/models/{repo}/revision/{quote(revision, safe='')}?blobs=true"
    commit, files = _fetch_listing(url, revision)
    folder, base_url = home / commit, f"{endpoint}/{repo}/resolve/{commit}"

    def download(names: list[str]) -> None:
        for name in names:
            _download(f"{base_url}/{quote(name)}", folder / name, *files[name])

    configs = [name for name in CONFIG_FILES if name in files]
    weights = [name for name in WEIGHT_FILE_NAMES if name in files][:1]
    if "config.json" not in configs or not weights:
        raise InputError(f"{url}: expected config.json and one of {', '.join(WEIGHT_FILE_NAMES)}, found one at most")
    if weights[0].endswith(".index.json"):
        download(weights)
        weights += read_index(folder / weights[0])
        if missing := [name for name in weights if name not in files]:
            raise InputError(f"{folder / weights[0]}: names {missing[0]}, which {base_url} does not have")
    total = sum(files[name][0] for name in configs + weights)
    print(f"downloading {repo}: {len(configs + weights)} files, {format_bytes(total)}, from {endpoint} into {folder}")
    check_disk_space(home, total - sum(path.stat().st_size for path in folder.rglob("*.*")), str(folder))
    download(configs)
    check(folder)
    download(weights)
    return commit


def resolve(name: str | Path, check: Callable[[Path], object] = lambda folder: None) -> Path:
    """The folder or file of a model: a local one itself, `backbones/...` of the project, or a hub id's in CACHE.

    A hub model is downloaded unless it is complete. `check` gets its folder before the weights are downloaded, and
    raises InputError if the model cannot be used.
    """
    if os.path.exists(name):
        return Path(name)
    if str(name).startswith("backbones/"):
        return ROOT / name
    if not (match := HUB_ID.fullmatch(str(name))):
        raise InputError(f"{name}: expected a folder, a file or a hub id like owner/name[@revision]")
    if str(CACHE).startswith("~"):
        raise InputError("QADAPTER_CACHE: expected a folder for models; there is no such home folder")
    repo, revision = match[1], match[2] or "main"
    home = CACHE / repo.replace("/", "--")
    refs = home / "refs"
    ref = refs / quote(revision, safe="")
    if not ref.exists():
        refs.mkdir(parents=True, exist_ok=True)
        if (lock := acquire_lock(home / ".lock", wait=False)) is None:
            print(f"{home}: waiting for another process that downloads into it")
            lock = acquire_lock(home / ".lock", wait=True)
        with open(lock, "wb"):  # closing it releases the lock
            if not ref.exists():
                commit = _download_model(repo, revision, home, check)
                os.sync()  # the files are on the disk before the ref that says so
                for path in (refs / commit, ref):
                    with replace_atomically(path) as file:
                        file.write(commit.encode())
    with reading(ref):
        if not COMMIT.fullmatch(commit := ref.read_text()):
            raise InputError(f"expected a commit, 40 hex digits, found {commit!r:.50}")
    return home / commit


def pin_revision(name: str | Path, folder: Path) -> str:
    """A name that means the files in `folder` in any working folder: an absolute path, or a hub id and its commit."""
    if folder.parent.parent == CACHE and not os.path.exists(name):
        return f"{str(name).split('@')[0]}@{folder.name}"
    folder = folder.resolve()
    return str(folder.relative_to(ROOT) if folder.parent == ROOT / "backbones" else folder)
