"""Downloads from the hub, with a server in a thread that breaks connections, sends wrong data and redirects on demand.

The server speaks RFC 9110's range requests (section 14) and lists models as huggingface.co documents. Downloaded bytes
must be equal. The contents are random, seed 0.
"""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from models import hub
from tests.common.helpers import ROOT, refused

RANDOM = random.Random(0)
CONTENT = RANDOM.randbytes(300_000)
OTHER = RANDOM.randbytes(300_000)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = {"config.json": b'{"a": 1}', "model.safetensors": CONTENT}
REPO = "owner/name"
WEIGHTS = f"/{REPO}/resolve/{COMMIT}/model.safetensors"
CONFIG = f"/{REPO}/resolve/{COMMIT}/config.json"
LISTING = f"/api/models/{REPO}/revision/main"


# ----------------------------------------------------------------------------------------- server


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers with the next plan for the path, or sends the file."""

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, dict(self.headers)))
        path = self.path.split("?")[0]
        if plans := server.plans.get(path):
            plans.pop(0)(self)
        elif path in server.files:
            send(self, server.files[path])
        else:
            send(self, b"none", status=404)

    def log_message(self, *args):
        pass


def send(handler, data, *, status=200, cut=None, ranges=True, **headers):
    """Sends the requested range of a file. cut: close the connection after so many bytes; ranges: support them."""
    body, headers = data, {name.replace("_", "-"): value for name, value in headers.items()}
    if ranges and status == 200 and (requested := handler.headers.get("Range")):
        first = int(re.fullmatch(r"bytes=(\d+)-", requested)[1])
        status, body = (206, data[first:]) if first < len(data) else (416, b"")
        headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}" if body else f"bytes */{len(data)}"
    handler.send_response(status)
    for name, value in ({"Content-Length": str(len(body))} | headers).items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body[:cut])


def sending(**options):
    """A plan: sends the file of the path with these options."""
    return lambda handler: send(handler, handler.server.files[handler.path.split("?")[0]], **options)


def redirecting(url):
    return lambda handler: send(handler, b"moved", status=302, Location=url)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.plans, self.requests = {}, {}, []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # the client closed the connection, as some tests intend

    def close(self):
        self.shutdown()
        self.server_close()

    def publish(self, files, revision="main", commit=COMMIT, repo=REPO, **changes):
        """Publishes a model as the hub lists it; `changes` replace fields of the listing."""
        siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
        for sibling in siblings:
            data = files[sibling["rfilename"]]
            if sibling["rfilename"].endswith((".safetensors", ".bin")):
                sibling["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 134}
            self.files[f"/{repo}/resolve/{commit}/{sibling['rfilename']}"] = data
        listing = {"id": repo, "sha": commit, "siblings": siblings} | changes
        self.files[f"/api/models/{repo}/revision/{revision}"] = json.dumps(listing).encode()

    def ranges(self, path):
        return [headers.get("Range") for requested, headers in self.requests if requested == path]

    def paths(self):
        return [path for path, _ in self.requests]


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server with MODEL; there are no pauses before retries."""
    server = Server()
    for name in ("HF_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(hub, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(hub, "sleep", lambda seconds: None)
    server.publish(MODEL)
    yield server
    server.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def model_folder() -> Path:
    return hub.CACHE / "owner--name" / COMMIT


def assert_downloaded() -> None:
    """MODEL is downloaded to the cache."""
    assert contents(hub.resolve(REPO)) == MODEL


# ---------------------------------------------------------------------------------------- models


SENTENCEPIECE = MODEL | {
    "tokenizer.model": b"t",
    "preprocessor_config.json": b"{}",
    "generation_config.json": b"g",
    "video_preprocessor_config.json": b"{}",
    "video_processor/preprocessor_config.json": b'{"a": 2}',
}
BPE = MODEL | {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}"}
OTHERS = {"README.md": b"#", "onnx/a.bin": b"z", "vocab.json": b"v", "video_processor/other.json": b"o"}


@pytest.mark.parametrize(
    "files, others", [(SENTENCEPIECE, OTHERS | {"tokenizer.json": b"y"}), (BPE, OTHERS)], ids=["sentencepiece", "bpe"]
)
def test_the_files_of_a_model_are_downloaded_and_no_others(server, capsys, files, others):
    """The number of files and bytes is announced; `check` runs before the weights are downloaded."""
    server.publish(files | others)

    def check(folder: Path) -> None:
        assert contents(folder).keys() == files.keys() - {"model.safetensors"}
        raise hub.InputError("not supported")

    with refused("not supported"):
        hub.resolve(REPO, check=check)
    assert WEIGHTS not in server.paths()
    folder = hub.resolve(REPO)
    assert folder == model_folder() and contents(folder) == files
    expected = [LISTING + "?blobs=true"] * 2 + [f"/{REPO}/resolve/{COMMIT}/{name}" for name in files]
    assert sorted(server.paths()) == sorted(expected)  # each file once
    line = capsys.readouterr().out.splitlines()[0]
    assert all(word in line for word in (REPO, COMMIT, f"{len(files)} files", "300.0 kB"))


def test_a_complete_model_needs_no_network_and_keeps_its_commit(server, tmp_path):
    folder = hub.resolve(REPO)
    pinned = hub.pin_revision(REPO, folder)
    assert pinned == hub.pin_revision(f"{REPO}@main", folder) == hub.pin_revision(pinned, folder) == f"{REPO}@{COMMIT}"
    server.publish(MODEL | {"model.safetensors": OTHER}, commit="f" * 40)
    server.requests.clear()
    assert hub.resolve(REPO) == hub.resolve(f"{REPO}@main") == hub.resolve(pinned) == folder
    assert server.requests == []
    (folder.parent / "refs" / "main").unlink()
    assert hub.resolve(REPO).name == "f" * 40
    server.close()
    assert hub.resolve(pinned) == folder
    with refused("other/name", server.url, str(hub.CACHE)):
        hub.resolve("other/name")
    for path in (tmp_path, folder, folder / "config.json"):
        assert hub.pin_revision(path, path) == hub.pin_revision(str(path), path) == str(path)
    assert hub.pin_revision("backbones/tiny-lm", hub.resolve("backbones/tiny-lm")) == "backbones/tiny-lm"


def test_a_revision_is_percent_encoded(server):
    server.publish(MODEL, "refs%2Fpr%2F3", "a" * 40)
    assert hub.resolve(f"{REPO}@refs/pr/3").name == "a" * 40
    assert (hub.CACHE / "owner--name" / "refs" / "refs%2Fpr%2F3").read_text() == "a" * 40


def test_local_paths_and_the_project_s_backbones_are_returned(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    Path("weights.bin").write_bytes(b"")
    assert hub.resolve("owner/name") == Path("owner/name")
    assert hub.resolve(tmp_path / "weights.bin") == tmp_path / "weights.bin"
    assert hub.resolve("backbones/tiny-lm") == ROOT / "backbones" / "tiny-lm"
    assert server.requests == []


BAD_NAMES = ["", "name", "./o/n", "/o/n", "a/b/c", "../n", "o/..", "o/.n", "o/n@", "o/n@..", "o/n@a/../b", "o/n@a b"]
BAD_NAMES += ["o/n?x", "o/n#x", "o/n\n", "o/n\0", "ö/n", "o/n%2f", "https://huggingface.co/o/n"]


@pytest.mark.parametrize("name", BAD_NAMES, ids=range(len(BAD_NAMES)))
def test_a_bad_name_is_refused_without_a_request(server, name):
    with refused("expected a folder, a file or a hub id like owner/name[@revision]"):
        hub.resolve(name)
    assert server.requests == [] and not hub.CACHE.exists()


def index_of(*shards) -> bytes:
    return json.dumps({"weight_map": {f"w{i}": shard for i, shard in enumerate(shards)}}).encode()


FORMATS = [  # in the order of preference
    MODEL,
    {
        "model.safetensors.index.json": index_of("model-1-of-2.safetensors", "model-2-of-2.safetensors"),
        "model-1-of-2.safetensors": CONTENT,
        "model-2-of-2.safetensors": OTHER,
    },
    {"pytorch_model.bin": CONTENT},
    {"pytorch_model.bin.index.json": index_of("part-1.bin"), "part-1.bin": OTHER},
]


def test_the_preferred_format_of_weights_is_downloaded(server):
    """All formats at first, then without the most preferred ones; files that the index does not name are ignored."""
    for i, expected in enumerate(FORMATS):
        published = {name: data for files in FORMATS[i:] for name, data in files.items()}
        server.publish(published | {"config.json": b"{}", "other.safetensors": b"x"}, f"r{i}", f"{i}" * 40)
        assert contents(hub.resolve(f"{REPO}@r{i}")) == expected | {"config.json": b"{}"}


# ----------------------------------------------------------------------------- untrusted listings

CONFIG_ENTRY, WEIGHTS_ENTRY = ({"rfilename": name, "size": 8} for name in MODEL)
BAD_LISTINGS = {  # changes of the listing, or the answer
    "not JSON": b"<html>",
    "a list": b"[]",
    "no commit": {"sha": None},
    "a commit outside the cache": {"sha": "../../../x"},
    "a commit with a line break": {"sha": COMMIT + "\n"},
    "no files": {"siblings": None},
    "a file without a name": {"siblings": [{"size": 1}]},
    "a file that is not an object": {"siblings": ["config.json"]},
    "no config": {"siblings": [WEIGHTS_ENTRY]},
    "no weights": {"siblings": [CONFIG_ENTRY]},
    "no size": {"siblings": [CONFIG_ENTRY, {"rfilename": "model.safetensors"}]},
    "a negative size": {"siblings": [CONFIG_ENTRY, WEIGHTS_ENTRY | {"size": -1}]},
    "lfs without a SHA-256": {"siblings": [CONFIG_ENTRY, WEIGHTS_ENTRY | {"lfs": {"size": 8}}]},
}


@pytest.mark.parametrize("case", BAD_LISTINGS)
def test_a_bad_listing_is_refused(server, case):
    if isinstance(BAD_LISTINGS[case], bytes):
        server.files[LISTING] = BAD_LISTINGS[case]
    else:
        server.publish(MODEL, **BAD_LISTINGS[case])
    with refused(server.url):
        hub.resolve(REPO)
    assert server.paths() == [LISTING + "?blobs=true"]


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.bin", "missing.safetensors", "config.json", "..", 3])
def test_an_index_with_a_bad_name_is_refused(server, tmp_path, name):
    """Even if the listing has the name and the server would send the file."""
    files = {"config.json": b"{}", "model.safetensors.index.json": index_of(name)}
    server.publish(files if name in ("missing.safetensors", 3) else files | {name: b"x"})
    with refused("model.safetensors.index.json: "):
        hub.resolve(REPO)
    assert contents(model_folder()).keys() == {"model.safetensors.index.json"}
    assert os.listdir(tmp_path) == ["cache"]


def test_another_commit_than_requested_is_refused(server):
    server.publish(MODEL, revision="f" * 40)
    with refused(COMMIT):
        hub.resolve(f"{REPO}@{'f' * 40}")


# ---------------------------------------------------------------------------------- interruptions

INTERRUPTIONS = {  # plans for the weights, and the ranges that must be requested
    "breaks": ([sending(cut=100_000), sending(cut=50_000)], [None, "bytes=100000-", "bytes=150000-"]),
    "ranges are ignored": ([sending(cut=100_000), sending(ranges=False)], [None, "bytes=100000-"]),
    "busy": ([sending(status=429), sending(status=500), sending(status=503)], [None] * 4),
}


@pytest.mark.parametrize("case", INTERRUPTIONS)
def test_an_interrupted_download_is_completed(server, case):
    server.plans[WEIGHTS], ranges = list(INTERRUPTIONS[case][0]), INTERRUPTIONS[case][1]
    assert_downloaded()
    assert server.ranges(WEIGHTS) == ranges


def test_silence_longer_than_the_timeout_is_a_break(server, monkeypatch):
    monkeypatch.setattr(hub, "TIMEOUT", 3)  # seconds; a busy machine answers later than in one
    release = threading.Event()

    def stall(handler):
        send(handler, CONTENT, cut=150_000)
        handler.wfile.flush()
        release.wait(30)

    server.plans[WEIGHTS] = [stall]
    assert_downloaded()
    assert not release.is_set() and len(server.ranges(WEIGHTS)) == 2
    release.set()


def test_a_file_without_a_known_sha256_is_not_resumed(server):
    server.plans[CONFIG] = [sending(cut=4)]
    assert_downloaded()
    assert server.ranges(CONFIG) == [None, None]


@pytest.mark.parametrize("part, ranges", [(CONTENT, []), (CONTENT[:60_000], ["bytes=60000-"]), (b"", [None])])
def test_a_partial_file_of_an_earlier_call_is_used(server, part, ranges):
    model_folder().mkdir(parents=True)
    (model_folder() / "model.safetensors.part").write_bytes(part)
    assert_downloaded()
    assert server.ranges(WEIGHTS) == ranges


@pytest.mark.parametrize("part", [OTHER[:60_000], CONTENT + b"!"])
def test_a_partial_file_with_other_contents_is_deleted(server, part):
    model_folder().mkdir(parents=True)
    (model_folder() / "model.safetensors.part").write_bytes(part)
    with refused(WEIGHTS, f"expected 300000 bytes of SHA-256 {sha256(CONTENT)}"):
        hub.resolve(REPO)
    assert contents(model_folder()).keys() == {"config.json"}
    assert_downloaded()


def test_a_file_of_the_right_size_with_other_contents_is_downloaded_again(server):
    model_folder().mkdir(parents=True)
    (model_folder() / "model.safetensors").write_bytes(OTHER)
    assert_downloaded()


def test_two_processes_download_each_file_once(server, monkeypatch):
    """A child process requests the weights; they are sent when this process says that it waits."""
    weights_requested, waiting = threading.Event(), threading.Event()

    def hold(handler):
        weights_requested.set()
        waiting.wait(300)
        send(handler, CONTENT)

    def report(line):
        if "waiting for another process" in line:
            waiting.set()

    server.plans = {WEIGHTS: [hold]}
    monkeypatch.setattr("builtins.print", report)
    command = [sys.executable, "-c", f"from models import hub; hub.resolve({REPO!r})"]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"QADAPTER_CACHE": str(hub.CACHE)}) as child:
        assert weights_requested.wait(300)
        assert_downloaded()
        assert child.wait(300) == 0
    assert waiting.is_set()
    assert server.paths().count(WEIGHTS) == server.paths().count(CONFIG) == 1


# ------------------------------------------------------------------- wrong data, refusals, tokens

FAILURES = {  # plans for the weights, words of the error, the number of requests
    "too short": ([sending(cut=0)] * 9, ["broke at 0 bytes of 300.0 kB"], 4),
    "too long": ([lambda handler: send(handler, CONTENT + b"!")], ["expected 300000 bytes"], 1),
    "other contents": ([lambda handler: send(handler, OTHER)], [sha256(CONTENT)], 1),
    "always busy": ([sending(status=500)] * 9, ["500"], 4),
    "403": ([sending(status=403)], ["gated, private or missing", "HF_TOKEN", "accept its terms"], 1),
    "404": ([sending(status=404)], ["no such local folder or file, and no such model or revision"], 1),
    "a redirect to a file": ([redirecting("file:///etc/passwd")] * 9, ["302"], 4),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failed_download_is_refused(server, case):
    plans, words, requests = FAILURES[case]
    server.plans[WEIGHTS] = list(plans)
    with refused(server.url + WEIGHTS, *words):
        hub.resolve(REPO)
    assert len(server.ranges(WEIGHTS)) == requests
    assert contents(model_folder()).keys() <= {"config.json", "model.safetensors.part"}
    server.plans.clear()
    assert_downloaded()


def test_the_token_is_sent_to_the_hub_only(server, monkeypatch):
    """Redirects within the hub get it. A download behind a redirect is resumed."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    other = Server()
    other.files["/bytes"] = CONTENT
    other.plans["/bytes"] = [sending(cut=100_000)]
    server.plans[WEIGHTS] = [redirecting("/moved")] * 2
    server.plans["/moved"] = [redirecting(other.url + "/bytes")] * 2
    assert_downloaded()
    other.close()
    assert len(server.requests) == 6 and "/moved" in server.paths()
    assert all(headers["Authorization"] == "Bearer hf_secret" for _, headers in server.requests)
    assert other.ranges("/bytes") == [None, "bytes=100000-"]
    assert not any("secret" in value for _, headers in other.requests for value in headers.values())


@pytest.mark.parametrize("token", ["secret\nX: 1", "secret\u20ac"])
def test_an_invalid_token_is_not_shown(server, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(hub.InputError, match="a token of ASCII") as error:
        hub.resolve(REPO)
    assert "secret" not in str(error.value)
