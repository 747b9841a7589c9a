"""Public models over HTTP, against a server in a thread that breaks off, lies and redirects as told.

The references are RFC 9110 (ranges and If-Range, sec. 13.1.5 and 14), as far as the server here speaks it, and the
listing that huggingface.co documents. No tolerance: bytes are equal or they are not. The bytes are random, seed 0.
"""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import download
import hub
from weights import InputError

RANDOM = random.Random(0)
CONTENT = RANDOM.randbytes(300_000)
OTHER = RANDOM.randbytes(300_000)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = {"config.json": b'{"a": 1}', "model.safetensors": CONTENT}
REPO = "owner/name"


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tag(data: bytes) -> str:
    return f'"{sha(data)[:12]}"'


class Handler(BaseHTTPRequestHandler):
    """Answers with the first thing planned for the path, or else with the file as a good server does."""

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, dict(self.headers)))
        path = self.path.split("?")[0]
        planned = server.plans.get(path, [])
        if planned:
            planned.pop(0)(self)
        elif path in server.files:
            send(self, server.files[path])
        else:
            send(self, b"none", status=404)

    def log_message(self, *args):
        pass


def send(handler, data, *, status=200, etag=None, cut=None, ranges=True, trust=False, **headers):
    """A file, of it the range that was asked for. cut: close after as many bytes; trust: pass If-Range over."""
    etag, asked = tag(data) if etag is None else etag, handler.headers.get("Range")
    same = trust or handler.headers.get("If-Range") in (None, etag)
    body, headers = data, {name.replace("_", "-"): value for name, value in headers.items()}
    if asked and ranges and same and status == 200:
        first = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
        status, body = (206, data[first:]) if first < len(data) else (416, b"")
        headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}" if body else f"bytes */{len(data)}"
    handler.send_response(status)
    for name, value in ({"Content-Length": str(len(body)), "ETag": etag} | headers).items():
        if value:
            handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body[:cut])


def chunked(handler, data, last=True):
    """A body whose length nobody states; without `last` it breaks off."""
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) + b"0\r\n\r\n" * last)


def planned(**options):
    return lambda handler: send(handler, handler.server.files[handler.path.split("?")[0]], **options)


def redirect(to, **headers):
    return lambda handler: send(handler, b"elsewhere", status=302, Location=to, **headers)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.plans, self.requests = {}, {}, []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # the other side has hung up, as some tests mean it to

    def close(self):
        self.shutdown()
        self.server_close()

    def publish(self, files, revision="main", commit=COMMIT, repo=REPO, **changes):
        """A model as the hub lists it; `changes` are made to the listing."""
        siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
        for sibling in siblings:
            data = files[sibling["rfilename"]]
            if sibling["rfilename"].endswith((".safetensors", ".bin")):
                sibling["lfs"] = {"sha256": sha(data), "size": len(data), "pointerSize": 134}
            self.files[f"/{repo}/resolve/{commit}/{sibling['rfilename']}"] = data
        listing = {"id": repo, "sha": commit, "siblings": siblings} | changes
        self.files[f"/api/models/{repo}/revision/{revision}"] = json.dumps(listing).encode()

    def ranges(self, path):
        return [headers.get("Range") for asked, headers in self.requests if asked == path]

    def paths(self):
        return [path for path, _ in self.requests]


FILE = f"/{REPO}/resolve/{COMMIT}/model.safetensors"
LISTING = f"/api/models/{REPO}/revision/main"


@pytest.fixture
def pauses(monkeypatch):
    """The pauses that were asked for; none is made."""
    made = []
    monkeypatch.setattr(download, "sleep", made.append)
    return made


@pytest.fixture
def server(monkeypatch, tmp_path, pauses):
    server = Server()
    for name in ("HF_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(hub, "CACHE", tmp_path / "cache")
    yield server
    server.close()


@pytest.fixture
def get(server, tmp_path):
    """Fetches /file of the server: its bytes."""
    server.files["/file"] = CONTENT

    def get(size=None, sha256=None, **options):
        path = tmp_path / "files" / "file"
        download.fetch(server.url + "/file", path, size=size, sha256=sha256, report=quiet, **options)
        assert left(path.parent) == ["file"]
        return path.read_bytes()

    get.part = tmp_path / "files" / "file.part"
    return get


def quiet(line):
    assert line.isprintable()


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def one_line(error, *words):
    text = str(error.value)
    assert text.isprintable(), text
    for word in words:
        assert word in text, text


# ------------------------------------------------------------------------------------------- a model


def test_a_model_is_fetched_byte_for_byte_and_nothing_else(server):
    files = MODEL | {"tokenizer.model": b"t", "preprocessor_config.json": b"{}"}
    server.publish(files | {"README.md": b"#", "pytorch_model.bin": b"x", "tokenizer.json": b"y", "onnx/a.bin": b"z"})
    told = []
    folder = hub.local(REPO, report=told.append)
    assert folder == hub.CACHE / "owner--name" / COMMIT
    assert {name: (folder / name).read_bytes() for name in left(folder)} == files
    asked = [LISTING + "?blobs=true"] + [f"/{REPO}/resolve/{COMMIT}/{name}" for name in files]
    assert sorted(server.paths()) == sorted(asked)
    assert len(told) == 1 and all(word in told[0] for word in (REPO, COMMIT, "4 files", "300.0 kB"))
    assert (folder.parent / "refs" / "main").read_text() == COMMIT


def test_a_warm_cache_asks_nothing(server):
    server.publish(MODEL)
    folder = hub.local(REPO)
    server.requests.clear()
    assert hub.local(REPO) == hub.local(f"{REPO}@main") == hub.local(f"{REPO}@{COMMIT}") == folder
    assert server.requests == []
    server.close()
    assert hub.local(REPO) == folder


def test_main_stays_what_it_was_even_when_a_file_is_lost(server):
    server.publish(MODEL)
    folder = hub.local(REPO)
    server.publish(MODEL | {"model.safetensors": OTHER}, commit="f" * 40)
    server.publish(MODEL, revision=COMMIT)
    (folder / "model.safetensors").write_bytes(CONTENT[:-1])
    assert hub.local(REPO) == folder and (folder / "model.safetensors").read_bytes() == CONTENT
    (folder.parent / "refs" / "main").unlink()
    assert hub.local(REPO).name == "f" * 40


def test_what_was_fetched_before_an_error_is_not_fetched_again(server):
    server.publish(MODEL)
    server.plans[FILE] = [planned(status=403)]
    with pytest.raises(InputError):
        hub.local(REPO)
    assert not (hub.CACHE / "owner--name" / "refs" / "main").exists()
    hub.local(REPO)
    assert server.paths().count(f"/{REPO}/resolve/{COMMIT}/config.json") == 1


def test_a_damaged_file_of_an_unfinished_model_is_found_by_its_hash(server):
    server.publish(MODEL)
    folder = hub.local(REPO)
    server.publish(MODEL, revision=COMMIT)
    (folder / ".whole").unlink()
    (folder / "model.safetensors").write_bytes(OTHER)  # of the same size
    hub.local(REPO)
    assert (folder / "model.safetensors").read_bytes() == CONTENT


def test_a_revision_is_percent_encoded(server):
    server.publish(MODEL, "refs%2Fpr%2F3", "a" * 40)
    assert hub.local(f"{REPO}@refs/pr/3").name == "a" * 40
    assert left(hub.CACHE / "owner--name" / "refs") == ["refs%2Fpr%2F3"]


def test_what_is_there_is_returned_as_it_is(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    Path("weights.bin").write_bytes(b"")
    assert hub.local("owner/name") == Path("owner/name")
    assert hub.local(tmp_path / "weights.bin") == tmp_path / "weights.bin"
    assert server.requests == []


def test_a_model_of_no_use_is_refused_before_its_weights_are_fetched(server):
    """The check sees config and tokenizer; a warm cache is not checked, what is loaded from it will be."""
    server.publish(MODEL | {"tokenizer.model": b"t"})

    def check(folder: Path) -> None:
        assert left(folder) == ["config.json", "tokenizer.model"]
        raise InputError("of no use")

    with pytest.raises(InputError, match="of no use"):
        hub.local(REPO, check=check)
    assert FILE not in server.paths()
    hub.local(REPO)
    hub.local(REPO, check=check)


def test_a_pinned_name_means_the_same_when_the_branch_has_moved(server, tmp_path):
    server.publish(MODEL)
    folder = hub.local(REPO)
    name = hub.pinned(REPO, folder)
    assert name == hub.pinned(f"{REPO}@main", folder) == hub.pinned(name, folder) == f"{REPO}@{COMMIT}"
    server.publish(MODEL | {"model.safetensors": OTHER}, commit="f" * 40)
    (folder.parent / "refs" / "main").unlink()
    assert hub.local(REPO) != folder == hub.local(name)
    for path in (tmp_path, folder, folder / "config.json"):
        assert hub.pinned(path, path) == hub.pinned(str(path), path) == str(path)
    assert hub.pinned("backbones/tiny-lm", hub.local("backbones/tiny-lm")) == "backbones/tiny-lm"


BAD = [
    "", "name", "./owner/name", "/owner/name", "a/b/c", "owner/", "/name", "../name", "owner/..", "owner/.name", "-o/n",
    "o/-n", "o/n.", "o/n-", "o..o/n", "o--o/n", "o/n@", "o/n@..", "o/n@a..b", "o/n@-x", "o/n@.x", "o/n@/a", "o/n@a//b",
    "o/n@a/", "o/n@a@b", "o/n@a b", "o/n?x", "o/n#x", "o/n\n", "o/n\0", "ö/n", "o/n%2f", "https://huggingface.co/o/n",
    "o/" + "n" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("name", BAD, ids=range(len(BAD)))
def test_a_bad_name_is_one_line_and_no_request(server, name):
    with pytest.raises(InputError) as error:
        hub.local(name)
    if name != "o/" + "n" * 5000:
        one_line(error, "expected a folder, a file or a hub id like owner/name[@revision]")
    assert server.requests == [] and not hub.CACHE.exists()


SHARDS = ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]
INDEX = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}}
SHARDED = {
    "config.json": b"{}",
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    SHARDS[0]: CONTENT,
    SHARDS[1]: OTHER,
}
BIN = {"config.json": b"{}", "tokenizer.json": b"{}", "tokenizer_config.json": b"{}", "pytorch_model.bin": CONTENT}
BIN_INDEX = {"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}
SHARDED_BIN = {
    "config.json": b"{}",
    "pytorch_model.bin.index.json": json.dumps(BIN_INDEX).encode(),
    "pytorch_model-00001-of-00001.bin": OTHER,
}


@pytest.mark.parametrize("files", [SHARDED, BIN, SHARDED_BIN], ids=["sharded", "bin", "sharded bin"])
def test_the_other_forms_of_weights(server, files):
    server.publish(files | {"model-3-of-2.safetensors": b"not in the index", "generation_config.json": b"{}"})
    told = []
    folder = hub.local(REPO, report=told.append)
    assert {name: (folder / name).read_bytes() for name in left(folder)} == files
    assert f" {len(files)} files, {download.amount(sum(map(len, files.values())))}, " in told[0]


def test_the_first_form_of_weights_is_taken(server):
    everything = SHARDED | SHARDED_BIN | BIN | MODEL
    for i, expected in enumerate([
        ["model.safetensors"],
        ["model.safetensors.index.json", *SHARDS],
        ["pytorch_model.bin"],
        ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"],
    ]):  # fmt: skip
        server.publish(everything, f"r{i}", f"{i}" * 40)
        folder = hub.local(f"{REPO}@r{i}")
        assert left(folder) == sorted(["config.json", "tokenizer.json", "tokenizer_config.json", *expected])
        del everything[expected[0]]


# ----------------------------------------------------------------------------------- hostile listings


def named(*names):
    return [{"rfilename": name, "size": 8} for name in names]


def listing(**changes):
    return json.dumps({"sha": COMMIT, "siblings": named("config.json", "model.safetensors")} | changes).encode()


HOSTILE = {
    "no JSON": (b"<html>", "expected JSON"),
    "deep": (b"[" * 100_000, "expected JSON"),
    "a list": (b"[]", "expected a JSON object"),
    "no commit": (b'{"siblings": []}', "'sha' is missing"),
    "commit leaves the cache": (listing(sha="../../../x"), "sha"),
    "commit with a line break": (listing(sha=COMMIT + "\n"), "sha"),
    "no files": (b'{"sha": "%s"}' % COMMIT.encode(), "'siblings' is missing"),
    "a file without a name": (listing(siblings=[{"size": 1}]), "rfilename"),
    "a file that is no object": (listing(siblings=["config.json"]), "rfilename"),
    "no config": (listing(siblings=named("model.safetensors")), "config.json"),
    "no weights": (listing(siblings=named("config.json")), "model.safetensors"),
    "only names elsewhere": (
        listing(siblings=named("../config.json", "/model.safetensors", "a/config.json", "../model.safetensors")),
        "expected config.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_listing_that_cannot_be_used(server, tmp_path, case):
    server.files[LISTING], word = HOSTILE[case]
    with pytest.raises(InputError) as error:
        hub.local(REPO)
    one_line(error, server.url, word)
    assert server.paths() == [LISTING + "?blobs=true"]


@pytest.mark.parametrize(
    "entry",
    [{}, {"size": -1}, {"size": "8"}, {"size": 8, "lfs": 3}, {"size": 8, "lfs": {"size": 8}},
     {"size": 8, "lfs": {"size": 8, "sha256": "../x"}}],
)  # fmt: skip
def test_a_file_whose_entry_is_wrong(server, entry):
    server.publish(MODEL, siblings=named("config.json") + [{"rfilename": "model.safetensors"} | entry])
    with pytest.raises(InputError) as error:
        hub.local(REPO)
    one_line(error, "model.safetensors", "size" if "lfs" not in entry else "")
    assert FILE not in server.paths()


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "missing.safetensors", "config.json",
             ".whole", "..", "", 3, None, ["a"], "x.safetensors\n"]
)  # fmt: skip
def test_an_index_names_what_it_must_not(server, tmp_path, name):
    """Even names that the listing has, and the server would send."""
    files = SHARDED | {"model.safetensors.index.json": json.dumps({"weight_map": {"a": name}}).encode()}
    files |= {} if name in ("missing.safetensors", "config.json") or not isinstance(name, str) else {name: b"x"}
    server.publish(files)
    with pytest.raises(InputError) as error:
        hub.local(REPO)
    one_line(error, "weight_map names", "expected a file of weights in the listing")
    assert left(hub.CACHE / "owner--name" / COMMIT) == ["model.safetensors.index.json"]
    assert left(tmp_path) == ["cache"] and left(hub.CACHE) == ["owner--name"]


def test_another_commit_than_the_pinned_one(server):
    server.publish(MODEL, revision="f" * 40)
    with pytest.raises(InputError) as error:
        hub.local(f"{REPO}@{'f' * 40}")
    one_line(error, COMMIT)


# ------------------------------------------------------------------------------------ breaks and halves


def test_a_break_is_gone_on_from(server, pauses):
    server.publish(MODEL)
    server.plans[FILE] = [planned(cut=100_000)]
    folder = hub.local(REPO)
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    assert server.ranges(FILE) == [None, "bytes=100000-"]
    assert server.requests[-1][1]["If-Range"] == tag(CONTENT)
    assert pauses == [1]


def test_many_breaks_that_each_get_further(server, get, pauses):
    """More than there are pauses: 20 times 10,000 bytes, then the rest."""
    server.plans["/file"] = [planned(cut=10_000)] * 20
    assert get() == CONTENT
    assert server.ranges("/file") == [None] + [f"bytes={n}0000-" for n in range(1, 21)]
    assert set(pauses) == {1}


def test_breaks_that_get_nowhere_end(server, get, pauses):
    """A server that ignores ranges and breaks off at the same byte: the part does not grow beyond."""
    server.plans["/file"] = [planned(cut=10_000, ranges=False)] * 50
    with pytest.raises(download.FetchError) as error:
        get()
    one_line(error, "/file", "broke off at 10.0 kB of 300.0 kB")
    assert pauses == [1, 1, 2, 4, 8, 16] or pauses == [1, 2, 4, 8, 16]


def test_silence_is_a_break(server, get, monkeypatch):
    """A server that sends half and then says nothing for longer than the timeout."""
    monkeypatch.setattr(download, "TIMEOUT", 0.5)
    over, ended = threading.Event(), []

    def stall(handler):
        send(handler, CONTENT, cut=150_000)
        handler.wfile.flush()
        over.wait(30)
        ended.append(True)

    server.plans["/file"] = [stall]
    assert get() == CONTENT and not ended
    over.set()
    assert server.ranges("/file") == [None, "bytes=150000-"]


def test_a_chunked_body_that_breaks_off(server, get):
    server.plans["/file"] = [partial(chunked, data=CONTENT[:50_000], last=False), partial(chunked, data=CONTENT)]
    assert get() == CONTENT


def test_a_server_that_ignores_ranges(server, get):
    server.plans["/file"] = [planned(cut=100_000), planned(ranges=False)]
    assert get() == CONTENT
    assert server.ranges("/file") == [None, "bytes=100000-"]


@pytest.mark.parametrize("trust", [False, True], ids=["If-Range", "If-Range passed over"])
def test_a_changed_file_is_not_glued_to_an_old_half(server, get, trust):
    server.plans["/file"] = [partial(send, data=CONTENT, cut=100_000), partial(send, data=OTHER, trust=trust)]
    server.files["/file"] = OTHER
    assert get(sha256=sha(OTHER)) == OTHER
    assert server.ranges("/file") == [None, "bytes=100000-"] + [None] * trust


def test_a_range_that_begins_elsewhere_is_not_glued(server, get):
    def elsewhere(handler):
        send(handler, CONTENT[5:], status=206, etag=tag(CONTENT), Content_Range=f"bytes 5-299999/{len(CONTENT)}")

    server.plans["/file"] = [planned(cut=100_000), elsewhere]
    assert get() == CONTENT
    assert server.ranges("/file") == [None, "bytes=100000-", None]


@pytest.mark.parametrize("etag", ["", 'W/"weak"'])
def test_without_a_strong_tag_a_half_is_gone_on_from_only_if_the_hash_is_known(server, get, etag):
    server.plans["/file"] = [planned(cut=100_000, etag=etag), planned(etag=etag)]
    assert get() == CONTENT
    assert server.ranges("/file") == [None, None]
    get.part.with_name("file").unlink()
    server.requests.clear()
    server.plans["/file"] = [planned(cut=100_000, etag=etag), planned(etag=etag)]
    assert get(sha256=sha(CONTENT)) == CONTENT
    assert server.ranges("/file") == [None, "bytes=100000-"]


def test_416(server, get):
    """A part that is whole already is kept, one that is too long is not; whatever is in it, the hash decides."""
    get.part.parent.mkdir()
    get.part.write_bytes(CONTENT)
    assert get(sha256=sha(CONTENT)) == CONTENT
    assert server.ranges("/file") == ["bytes=300000-"]
    get.part.with_name("file").unlink()
    get.part.write_bytes(CONTENT + b"!")
    assert get(sha256=sha(CONTENT)) == CONTENT
    get.part.with_name("file").unlink()
    get.part.write_bytes(OTHER)
    with pytest.raises(InputError):
        get(sha256=sha(CONTENT))
    assert left(get.part.parent) == []


def test_ctrl_c_leaves_the_part_for_the_next_time(server):
    """A true SIGINT in the main thread, while it waits for the second half."""
    server.publish(MODEL)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what is started in the background ignores it
    main, over = threading.main_thread().ident, threading.Event()

    def interrupt(handler):
        send(handler, CONTENT, cut=120_000)
        handler.wfile.flush()
        part = hub.CACHE / "owner--name" / COMMIT / "model.safetensors.part"
        while not part.exists():
            time.sleep(0.01)
        time.sleep(0.2)
        signal.pthread_kill(main, signal.SIGINT)
        over.wait(10)

    server.plans[FILE] = [interrupt]
    try:
        with pytest.raises(KeyboardInterrupt):
            hub.local(REPO)
    finally:
        signal.signal(signal.SIGINT, before)
        over.set()
    folder = hub.CACHE / "owner--name" / COMMIT
    assert (folder / "model.safetensors.part").read_bytes() == CONTENT[:120_000]
    assert not (folder / ".whole").exists()
    hub.local(REPO)
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    assert server.ranges(FILE) == [None, "bytes=120000-"]


def test_two_processes_fetch_each_file_once(server):
    """A child gets to the weights, which are held back until we have read the listing, too, and half a second more."""
    server.publish(MODEL)
    held, released = threading.Event(), threading.Event()

    def hold(handler):
        held.set()
        released.wait(300)
        time.sleep(0.5)
        send(handler, CONTENT)

    def listing(handler):
        released.set()
        planned()(handler)

    server.plans = {FILE: [hold], LISTING: [planned(), listing]}
    command = [sys.executable, "-c", f"import hub; hub.local({REPO!r})"]
    environment = os.environ | {"QADAPTER_CACHE": str(hub.CACHE)}
    with subprocess.Popen(command, cwd=Path(hub.__file__).parent, env=environment) as child:
        assert held.wait(300)
        told = []
        folder = hub.local(REPO, report=told.append)
        assert child.wait(300) == 0
    assert any("waiting for another process" in line for line in told)
    assert folder == hub.CACHE / "owner--name" / COMMIT
    assert {name: (folder / name).read_bytes() for name in left(folder)} == MODEL
    assert server.paths().count(FILE) == server.paths().count(f"/{REPO}/resolve/{COMMIT}/config.json") == 1


# ------------------------------------------------------------------------------------------- lies


@pytest.mark.parametrize("change", [-1, 1], ids=["too short", "too long"])
@pytest.mark.parametrize("half", [False, True], ids=["at once", "after a break"])
def test_another_size_than_listed(server, get, change, half):
    data = CONTENT[:-1] if change < 0 else CONTENT + b"!"
    server.plans["/file"] = [partial(send, data=CONTENT, etag='"a"', cut=100_000)] * half
    server.plans["/file"] += [partial(send, data=data, etag='"a"')] * 2
    with pytest.raises(InputError) as error:
        get(size=len(CONTENT))
    one_line(error, "/file: expected 300000 bytes", str(len(data)))
    assert left(get.part.parent) == []


def test_more_than_listed_in_a_body_of_unknown_length(server, get):
    server.plans["/file"] = [partial(chunked, data=CONTENT + OTHER)]
    with pytest.raises(InputError) as error:
        get(size=len(CONTENT))
    one_line(error, "/file: expected 300000 bytes")
    assert left(get.part.parent) == []


def test_less_than_stated_again_and_again(server, get, pauses):
    server.plans["/file"] = [planned(ranges=False, Content_Length="300001")] * 9
    with pytest.raises(download.FetchError) as error:
        get()
    one_line(error, "broke off at 300.0 kB of 300.0 kB")


def test_the_size_that_a_redirect_states(server, get):
    server.plans["/file"] = [redirect("/there", X_Linked_Size="299999")]
    server.files["/there"] = CONTENT
    with pytest.raises(InputError) as error:
        get()
    one_line(error, "expected 299999 bytes, the server states 300000")


def test_another_hash_than_listed(server):
    server.publish(MODEL)
    server.files[FILE] = OTHER
    with pytest.raises(InputError) as error:
        hub.local(REPO)
    one_line(error, FILE, sha(CONTENT), sha(OTHER))
    assert left(hub.CACHE / "owner--name" / COMMIT) == ["config.json"]
    server.files[FILE] = CONTENT
    assert (hub.local(REPO) / "model.safetensors").read_bytes() == CONTENT


def test_the_hash_that_a_redirect_states(server, get):
    server.files["/there"] = CONTENT
    server.plans["/file"] = [redirect("/there", X_Linked_ETag=f'"{sha(OTHER)}"')]
    with pytest.raises(InputError) as error:
        get()
    one_line(error, sha(OTHER))
    server.plans["/file"] = [redirect("/there", X_Linked_ETag=f'"{sha(CONTENT)}"')]
    assert get() == CONTENT


def test_an_entity_tag_alone_is_no_hash(server, get):
    """The hosts behind the hub have tags of 64 hex digits that are something else."""
    server.plans["/file"] = [planned(etag=f'"{sha(OTHER)}"')]
    assert get() == CONTENT


# --------------------------------------------------------------------------- refusals, redirects, tokens


@pytest.mark.parametrize("path", [LISTING, FILE], ids=["listing", "file"])
@pytest.mark.parametrize(
    "status, words",
    [(401, ["gated or private", "HF_TOKEN", "accept its terms"]), (403, ["gated or private", "HF_TOKEN"]),
     (404, ["no such model or revision", "no such folder or file here"]), (400, ["answers 400"])],
)  # fmt: skip
def test_refusals_are_not_tried_again(server, pauses, path, status, words):
    server.publish(MODEL)
    server.plans[path] = [planned(status=status)]
    with pytest.raises(InputError) as error:
        hub.local(REPO)
    one_line(error, REPO, server.url, *words)
    assert pauses == [] and server.plans[path] == []


@pytest.mark.parametrize(
    "status, headers, expected",
    [(429, {"Retry-After": "7"}, 7), (429, {"Retry-After": "99999"}, 120), (429, {}, 1), (500, {}, 1), (503, {}, 1),
     (503, {"Retry-After": "soon"}, 1)],
)  # fmt: skip
def test_busy_servers_are_asked_again(server, pauses, status, headers, expected):
    server.publish(MODEL)
    for path in (LISTING, FILE):
        server.plans[path] = [planned(status=status, **headers)]
    assert (hub.local(REPO) / "model.safetensors").read_bytes() == CONTENT
    assert pauses == [expected, expected]


def test_a_server_that_stays_broken(server, pauses):
    server.publish(MODEL)
    server.plans[LISTING] = [planned(status=500)] * 50
    told = []
    with pytest.raises(InputError) as error:
        hub.local(REPO, report=told.append)
    one_line(error, REPO, "answers 500")
    assert pauses == [1, 2, 4, 8, 16] and len(told) == 5 and all("answers 500; trying again" in line for line in told)


def test_cold_and_offline(server):
    server.close()
    with pytest.raises(InputError) as error:
        hub.local(REPO)
    one_line(error, REPO, server.url, "cannot be reached", str(hub.CACHE))


def test_the_token_goes_to_the_hub_and_nowhere_else(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.publish(MODEL)
    other = Server()
    other.files["/bytes"] = CONTENT
    server.plans[FILE] = [redirect("/moved"), redirect(other.url + "/bytes")]
    server.plans["/moved"] = [redirect(other.url + "/bytes")]
    hub.local(REPO)
    other.close()
    assert len(server.requests) == 4 and "/moved" in server.paths()
    assert all(headers["Authorization"] == "Bearer hf_secret" for _, headers in server.requests)
    [(path, headers)] = other.requests
    assert path == "/bytes" and not any("secret" in value for value in headers.values())


def test_a_half_behind_a_redirect_is_gone_on_from(server):
    server.publish(MODEL)
    other = Server()
    other.files["/bytes"] = CONTENT
    other.plans["/bytes"] = [planned(cut=100_000)]
    server.plans[FILE] = [redirect(other.url + "/bytes", X_Linked_ETag=f'"{sha(CONTENT)}"')] * 2
    assert (hub.local(REPO) / "model.safetensors").read_bytes() == CONTENT
    other.close()
    assert other.ranges("/bytes") == [None, "bytes=100000-"]


def test_no_token_no_header(server):
    server.publish(MODEL)
    hub.local(REPO)
    assert not any("Authorization" in headers for _, headers in server.requests)


@pytest.mark.parametrize("token", ["secret\nX: 1", "secret\u20ac"])
def test_a_token_that_is_none_is_not_shown(server, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(InputError) as error:
        hub.local(REPO)
    one_line(error)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("endpoint", ["huggingface.co", "file:///etc", "ftp://host", "http://host:port", "http://a b"])
def test_an_endpoint_that_is_none(server, monkeypatch, pauses, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(InputError) as error:
        hub.local(REPO)
    one_line(error, endpoint, "expected an address like https://host/path")
    assert pauses == []


@pytest.mark.parametrize("to", ["/file", "file:///etc/passwd"])
def test_redirects_that_lead_nowhere(server, get, to):
    server.plans["/file"] = [redirect(to)] * 50
    with pytest.raises(download.FetchError) as error:
        get()
    one_line(error, "answers 302")


# ------------------------------------------------------------------------------------ disk and progress


def test_a_full_disk_is_refused_before_anything_is_fetched(server, monkeypatch):
    """And what is there already is not counted as needed."""
    server.publish(MODEL)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage(0, 0, 250_000))
    with pytest.raises(InputError) as error:
        hub.local(REPO)
    one_line(error, REPO, "needs 300.0 kB", "250.0 kB free")
    assert server.paths() == [LISTING + "?blobs=true"]
    part = hub.CACHE / "owner--name" / COMMIT / "model.safetensors.part"
    part.write_bytes(CONTENT[:60_000])
    assert (hub.local(REPO) / "model.safetensors").read_bytes() == CONTENT
    assert server.ranges(FILE) == ["bytes=60000-"]


def test_a_full_disk_for_one_file(server, get, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage(0, 0, 299_999))
    with pytest.raises(InputError) as error:
        get()
    one_line(error, "/file", "needs 300.0 kB")


def test_a_folder_that_cannot_be_written(server, get, tmp_path, monkeypatch):
    (tmp_path / "taken").write_bytes(b"")
    with pytest.raises(InputError) as error:
        download.fetch(server.url + "/file", tmp_path / "taken" / "file", size=None, sha256=None)
    one_line(error, "cannot write", "taken")
    monkeypatch.setattr(hub, "CACHE", tmp_path / "taken")
    server.publish(MODEL)
    with pytest.raises(InputError) as error:
        hub.local(REPO)
    one_line(error, "cannot write", "taken")


def test_a_write_that_fails_is_no_break(server, get, pauses):
    """The kernel's limit on a file's size stands for a full disk: EFBIG instead of ENOSPC."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(InputError) as error:
            get()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    one_line(error, "cannot write", "files/file", "too large")
    assert pauses == [] and len(server.requests) == 1


def steps(monkeypatch, terminal: bool, total: int | None, seconds: float, count: int = 2000) -> list[str]:
    """What is reported of a file of 10 MB that comes in equal steps, by a clock of our own."""
    now = [0.0]
    monkeypatch.setattr(download, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    told = []
    with download._progress("file", 0, total, told.append) as tell:
        for i in range(1, count + 1):
            now[0] += seconds / count
            tell(10_000_000 * i // count)
    return told


@pytest.mark.parametrize("total", [10_000_000, None])
def test_lines_of_progress_are_few(monkeypatch, capsys, total):
    assert steps(monkeypatch, False, total, 4) == []
    hour = steps(monkeypatch, False, total, 3600)
    assert 10 <= len(hour) <= 20
    assert len(steps(monkeypatch, False, total, 10 * 3600)) <= 21
    assert capsys.readouterr() == ("", "")
    if total:
        percents = [int(re.search(r"(\d+)% of 10.0 MB", line)[1]) for line in hour]
        assert percents == sorted(percents) and percents[0] == 0 and percents[-1] > 60
        assert re.search("2.8 kB/s, 59:5[0-9] left$", hour[0])


def test_a_terminal_has_one_line(monkeypatch, capsys):
    assert steps(monkeypatch, True, 10_000_000, 100) == []
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.endswith("\n") and 100 < text.count("\r") < 600
    assert "100% of 10.0 MB, 100.0 kB/s, 0:00 left" in text.split("\r")[-1]


def test_amounts():
    assert [download.amount(n) for n in (0, 999, 1000, 1_234_567, 2_200_000_000, 10**16)] == [
        "0 bytes", "999 bytes", "1.0 kB", "1.2 MB", "2.2 GB", "10000.0 TB",
    ]  # fmt: skip
