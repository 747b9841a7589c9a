"""Public models by name: a local folder, or `owner/name[@revision]` of the Hugging Face hub, fetched once and kept.

    CACHE/owner--name/refs/REVISION    the commit that the revision (percent-encoded) was when it was fetched
    CACHE/owner--name/COMMIT/...       its files, and `.whole`, written last: {"files": {name: bytes}}

What is whole is never asked for again, so it works without a network, and `main` stays the commit that it was.
For a newer one name a revision, or delete CACHE/owner--name. The environment may set QADAPTER_CACHE (instead of
~/.cache/qadapter/hub), HF_ENDPOINT (a mirror instead of https://huggingface.co) and HF_TOKEN (for gated models).

References
[1] The listing of a model's files: https://huggingface.co/docs/hub/api
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from tempfile import TemporaryDirectory
from urllib.parse import quote

from checkpoint import IN_FOLDER
from download import SHA256, FetchError, amount, check_room, fetch, held
from weights import InputError, field, read_json, replace_atomically

CACHE = Path(os.path.expanduser(os.environ.get("QADAPTER_CACHE") or "~/.cache/qadapter/hub"))

PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
NAME = re.compile(rf"({PART}/{PART})(?:@({PART}(?:/{PART})*))?")
COMMIT = re.compile("[0-9a-f]{40}")
SHARD = re.compile(rf"{PART}\.(safetensors|bin)")


# ------------------------------------------------------------------------------------------ a listing


@dataclass(frozen=True)
class Listing:
    """The files of one commit: name -> what the hub says of it. Everything in here is the server's word."""

    url: str
    commit: str
    files: dict[str, dict]

    def stated(self, name: str) -> tuple[int, str | None]:
        """-> bytes, SHA-256 in hex; only large files, those outside git, have the latter."""
        where = f"{self.url}: {name}"
        lfs = field(self.files[name], "lfs", dict, where, {})
        size = field(lfs or self.files[name], "size", int, where)
        sha256 = field(lfs, "sha256", str, where) if lfs else None
        if size < 0 or (sha256 is not None and not SHA256.fullmatch(sha256)):
            raise InputError(f"{where}: expected a size of at least 0 and a SHA-256 in hex, found {size}, {sha256}")
        return size, sha256

    def wanted(self) -> list[str]:
        """Names of the config, the tokenizer and the weights (or their index), of those that there are."""
        weights = [name for name in IN_FOLDER if name in self.files]
        if "config.json" not in self.files or not weights:
            raise InputError(f"{self.url}: expected config.json and one of {', '.join(IN_FOLDER)} among its files")
        names = ["config.json", "preprocessor_config.json", "tokenizer.model"]
        if "tokenizer.model" not in self.files:  # not read, but then the reader can say what it is
            names += ["tokenizer.json", "tokenizer_config.json"]
        return [name for name in names if name in self.files] + weights[:1]

    def shards(self, index: Path) -> list[str]:
        """The files that an index of weights names."""
        names = list(field(read_json(index), "weight_map", dict, index).values())
        for name in names:
            if not isinstance(name, str) or not SHARD.fullmatch(name) or name not in self.files:
                raise InputError(f"{index}: weight_map names {short(name)}, expected a file of weights in the listing")
        return sorted(set(names))


def _list(endpoint: str, repo: str, revision: str, token: str | None, report) -> Listing:
    url = f"{endpoint}/api/models/{repo}/revision/{quote(revision, safe='')}?blobs=true"
    with TemporaryDirectory() as folder:
        path = Path(folder) / "listing"
        fetch(url, path, size=None, sha256=None, token=token, report=report)
        text = path.read_bytes()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{url}: expected JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{url}: expected a JSON object, found {short(content)}")
    commit, files = field(content, "sha", str, url), field(content, "siblings", list, url)
    if not COMMIT.fullmatch(commit) or (COMMIT.fullmatch(revision) and commit != revision):
        raise InputError(f"{url}: sha: expected the commit, 40 hex digits, found {commit!r}")
    if not all(isinstance(file, dict) and isinstance(file.get("rfilename"), str) for file in files):
        raise InputError(f"{url}: siblings: expected objects with an rfilename")
    return Listing(url, commit, {file["rfilename"]: file for file in files})


# ------------------------------------------------------------------------------------------ a model


def _is_whole(folder: Path) -> bool:
    note = folder / ".whole"
    if not note.is_file():
        return False
    files = field(read_json(note), "files", dict, note)
    return all((folder / name).is_file() and (folder / name).stat().st_size == n for name, n in files.items())


@contextmanager
def _explained(name: str, page: str) -> Iterator[None]:
    """Says of a refusal what it means for the model, whose page is at `page`."""
    try:
        yield
    except FetchError as error:
        if error.status in (401, 403):
            text = (f"{page} is gated or private, or there is none (status {error.status}): accept its terms there "
                    "and set HF_TOKEN to a token that may read it")  # fmt: skip
        elif error.status == 404:
            text = f"no such model or revision at {page} (status 404)"
        else:
            text = f"not whole in {CACHE}, and cannot be fetched: {error}"
        raise InputError(f"{name}: no such folder or file here; {text}") from error


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}") from error


def _fetch_all(listing: Listing, folder: Path, base: str, token: str | None, check, report) -> dict[str, int]:
    """Fetches the wanted files that are not there yet, the weights after the rest; -> their names and bytes."""

    def get(name: str) -> None:
        size, sha256 = listing.stated(name)
        fetch(f"{base}/{name}", folder / name, size=size, sha256=sha256, token=token, report=report)

    *first, weights = listing.wanted()
    last = [weights]
    if weights.endswith(".index.json"):
        get(weights)
        last += listing.shards(folder / weights)
    sizes = {name: listing.stated(name)[0] for name in first + last}
    report(f"fetching {len(sizes)} files, {amount(sum(sizes.values()))}, from {base} into {folder}")
    check_room(folder, sum(size - held(folder / name) for name, size in sizes.items()), base)
    for name in first:
        get(name)
    check(folder)
    for name in last:
        get(name)
    return sizes


def local(name: str | Path, check=lambda folder: None, report=print) -> Path:
    """The folder or file itself if it is there; of `owner/name[@revision]` the folder of its files, fetched once.

    `check` is given the folder before its weights are fetched, and raises InputError if they would be of no use. So
    does this function, in one line, for any other name and for all that may go wrong on the way.
    """
    if os.path.exists(name):
        return Path(name)
    if str(name).startswith("backbones/"):  # the project's own, from whichever folder it is called
        if not (own := Path(__file__).resolve().parent / name).is_dir():
            raise InputError(f"{own}: expected the folder of a model, found none")
        return own
    match = NAME.fullmatch(str(name))
    if not match or len(str(name)) > 200 or ".." in str(name) or "--" in match[1]:
        raise InputError(f"{name}: expected a folder, a file or a hub id like owner/name[@revision]")
    repo, revision = match[1], match[2] or "main"
    home = CACHE / repo.replace("/", "--")
    ref = home / "refs" / quote(revision, safe="")
    wanted = ref.read_text("latin-1") if ref.is_file() else revision  # what was main goes on to be it
    if COMMIT.fullmatch(wanted) and _is_whole(home / wanted):
        return home / wanted

    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    token = os.environ.get("HF_TOKEN", "").strip() or None
    with _explained(str(name), f"{endpoint}/{repo}"):
        listing = _list(endpoint, repo, wanted, token, report)
        folder = home / listing.commit
        _make(folder)
        _make(ref.parent)
        sizes = _fetch_all(listing, folder, f"{endpoint}/{repo}/resolve/{listing.commit}", token, check, report)
    with replace_atomically(folder / ".whole") as file:
        file.write(json.dumps({"files": sizes}).encode())
    with replace_atomically(ref) as file:
        file.write(listing.commit.encode())
    return folder


def pinned(name: str | Path, folder: Path) -> str:
    """The name under which `local` will always find what it now found in `folder`: a hub id's has the commit in it."""
    if os.path.exists(name) or folder.parent.parent != CACHE:
        return str(name)
    return f"{str(name).split('@')[0]}@{folder.name}"
