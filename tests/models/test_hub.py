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
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from models import hub
from tests.common.helpers import ROOT, refused

RANDOM = random.Random(0)
CONTENT = RANDOM.randbytes(300_000)
OTHER = RANDOM.randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = {"config.json": b'{"a": 1}', "model.safetensors": CONTENT}
REPO = "owner/name"
WEIGHTS = f"/{REPO}/resolve/{COMMIT}/model.safetensors"
CONFIG = f"/{REPO}/resolve/{COMMIT}/config.json"
LISTING = f"/api/models/{REPO}/revision/main"


# ----------------------------------------------------------------------------------------- server


class Handler(BaseHTTPRequestHandler):
    """Sends the file of the path, in the way that the path's next plan says: the arguments of `send`."""

    def do_GET(self):
        path = self.path.split("?")[0]
        self.server.requests.append((self.path, dict(self.headers)))
        plans = self.server.plans.get(path)
        self.send(self.server.files.get(path), **(plans.pop(0) if plans else {}))

    def send(self, body, other=None, status=200, location="", ranges=True, cut=None, before=lambda: None, stall=0):
        """cut: bytes until the connection is closed; ranges: support them; stall: seconds until it is closed."""
        before()
        status, body = (status, other or body) if other or body else (404, b"")
        if ranges and status == 200 and (requested := self.headers.get("Range")):
            status, body = 206, body[int(re.fullmatch(r"bytes=(\d+)-", requested)[1]) :]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Location", location)
        self.end_headers()
        self.wfile.write(body[:cut])
        time.sleep(stall)

    def log_message(self, *args):
        pass


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

    def publish(self, files, revision="main", commit=COMMIT, **changes):
        """Publishes a model as the hub lists it; `changes` replace fields of the listing."""
        siblings = []
        for name, data in files.items():
            siblings.append({"rfilename": name, "size": len(data)})
            if name.endswith((".safetensors", ".bin")):
                siblings[-1]["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
            self.files[f"/{REPO}/resolve/{commit}/{name}"] = data
        listing = {"sha": commit, "siblings": siblings} | changes
        self.files[f"/api/models/{REPO}/revision/{revision}"] = json.dumps(listing).encode()

    def ranges(self, path):
        return [headers.get("Range") for requested, headers in self.requests if requested == path]


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server with MODEL."""
    server = Server()
    for name in ("HF_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(hub, "CACHE", tmp_path / "cache")
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

VIDEO = {"video_preprocessor_config.json": b"{}", "video_processor/preprocessor_config.json": b'{"a": 2}'}
CONFIGS = {"preprocessor_config.json": b"{}", "processor_config.json": b"p", "generation_config.json": b"g"} | VIDEO
OTHERS = {"README.md": b"#", "onnx/a.bin": b"z", "vocab.json": b"v", "video_processor/other.json": b"o"}
TOKENIZERS = {"tokenizer.model": b"t", "tokenizer.json": b"{}"}


def test_the_files_of_a_model_are_downloaded_and_no_others(server, capsys, monkeypatch):
    """The number of files and bytes is announced; `check` runs before the weights are downloaded. The disk must have
    space for what is not there yet."""
    files, spaces = MODEL | CONFIGS | TOKENIZERS, []
    monkeypatch.setattr(hub, "check_disk_space", lambda home, space, what: spaces.append(space))
    server.publish(files | OTHERS)

    def check(folder: Path) -> None:
        assert contents(folder).keys() == files.keys() - {"model.safetensors"}
        raise hub.InputError("not supported")

    with refused("not supported"):
        hub.resolve(REPO, check=check)
    assert server.ranges(WEIGHTS) == []
    assert contents(hub.resolve(REPO)) == files
    assert spaces == [sum(map(len, files.values())), len(CONTENT)]
    expected = [LISTING + "?blobs=true"] * 2 + [f"/{REPO}/resolve/{COMMIT}/{name}" for name in files]
    assert sorted(path for path, _ in server.requests) == sorted(expected)  # each file once
    line = capsys.readouterr().out.splitlines()[0]
    assert line == f"downloading {REPO}: {len(files)} files, 300.0 kB, from {server.url} into {model_folder()}"


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
    with refused("other/name", server.url, "the same command goes on"):
        hub.resolve("other/name")


def test_local_paths_and_the_project_s_backbones_are_returned(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    Path("weights.bin").write_bytes(b"")
    for path in ("owner/name", tmp_path / "weights.bin"):
        assert hub.resolve(path) == Path(path) and hub.pin_revision(path, Path(path)) == str(tmp_path / path)
    assert hub.resolve("backbones/tiny-lm") == ROOT / "backbones/tiny-lm"
    assert hub.pin_revision("backbones/tiny-lm", ROOT / "backbones/tiny-lm") == "backbones/tiny-lm"
    assert server.requests == []


BAD_NAMES = ["", "name", "./o/n", "/o/n", "a/b/c", "../n", "o/..", "o/.n", "o/n@", "o/n@..", "o/n@a/../b", "o/n@a b"]
BAD_NAMES += ["o/n?x", "o/n#x", "o/n\n", "o/n\0", "ö/n", "o/n%2f", "https://huggingface.co/o/n"]


@pytest.mark.parametrize("name", BAD_NAMES, ids=range(len(BAD_NAMES)))
def test_a_bad_name_is_refused_without_a_request(server, name):
    with refused("expected a folder, a file or a hub id like owner/name[@revision]"):
        hub.resolve(name)
    assert server.requests == [] and not hub.CACHE.exists()


def test_an_index_and_its_shards_are_downloaded(server):
    """Not another format, and no file that the index does not name. Revisions are percent-encoded."""
    files = {"model.safetensors.index.json": b'{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}',
             "config.json": b"{}", "1.safetensors": OTHER, "2.safetensors": CONTENT}
    server.publish(files | {"pytorch_model.bin": CONTENT, "other.safetensors": b"x"}, "refs%2Fpr%2F1")
    assert contents(hub.resolve(f"{REPO}@refs/pr/1")) == files


# ----------------------------------------------------------------------------- untrusted listings

CONFIG_ENTRY, WEIGHTS_ENTRY = ({"rfilename": name, "size": 8} for name in MODEL)
BAD_LISTINGS = [{"sha": "../../../x"}, {"siblings": ["config.json"]}, {"siblings": [WEIGHTS_ENTRY]},
                {"siblings": [CONFIG_ENTRY]}, {"siblings": [CONFIG_ENTRY, WEIGHTS_ENTRY | {"lfs": {"size": 8}}]}]


@pytest.mark.parametrize("changes", BAD_LISTINGS, ids=range(len(BAD_LISTINGS)))
def test_a_bad_listing_is_refused(server, changes):
    server.publish(MODEL, **changes)
    with refused(server.url):
        hub.resolve(REPO)
    assert len(server.requests) == 1


@pytest.mark.parametrize("content", [b"", b"\xff", b"/etc"])
def test_a_damaged_name_of_the_commit_is_refused(server, content):
    ref = hub.resolve(REPO).parent / "refs/main"
    ref.write_bytes(content)
    with refused(str(ref)):
        hub.resolve(REPO)


def test_another_commit_than_requested_is_refused(server):
    server.publish(MODEL, revision="f" * 40)
    with refused(COMMIT):
        hub.resolve(f"{REPO}@{'f' * 40}")


# ---------------------------------------------------------------------------------- interruptions

DOWNLOADS = {  # what an earlier call left, plans for the weights, and the ranges that must be requested
    "complete": (CONTENT, [], []),
    "breaks": (b"", [{"cut": 100_000}, {"cut": 50_000}], [None, "bytes=100000-", "bytes=150000-"]),
    "ranges are ignored": (CONTENT[:9], [{"ranges": False}], ["bytes=9-"]),
    "silence": (b"", [{"cut": 2**17, "stall": 30}], [None, "bytes=131072-"]),
}


@pytest.mark.parametrize("case", DOWNLOADS)
def test_an_interrupted_download_is_continued(server, monkeypatch, case):
    part, plans, ranges = DOWNLOADS[case]
    monkeypatch.setattr(hub, "TIMEOUT", 3)  # seconds; a busy machine answers later than in one
    server.plans[WEIGHTS] = list(plans)
    model_folder().mkdir(parents=True)
    (model_folder() / "model.safetensors.part").write_bytes(part)
    start = time.monotonic()
    for _ in range(len(ranges) - 1):
        with refused(server.url + WEIGHTS, "the same command goes on"):
            hub.resolve(REPO)
    assert_downloaded()
    assert server.ranges(WEIGHTS) == ranges and time.monotonic() - start < 25


def test_a_file_without_a_known_sha256_is_not_resumed_and_one_cut_short_is_replaced(server):
    model_folder().mkdir(parents=True)
    (model_folder() / "model.safetensors").write_bytes(OTHER[:9])
    server.plans[CONFIG] = [{"cut": 4}]
    with refused("the connection broke at 4 bytes of 8 bytes"):
        hub.resolve(REPO)
    assert_downloaded()
    assert server.ranges(CONFIG) == [None, None]


def test_two_processes_download_each_file_once(server, monkeypatch):
    """A child process requests the weights; they are sent when this process says that it waits."""
    requested, waiting = threading.Event(), threading.Event()
    server.plans[WEIGHTS] = [{"before": lambda: (requested.set(), waiting.wait(300))}]
    monkeypatch.setattr("builtins.print", lambda line: waiting.set() if "waiting for another process" in line else None)
    command = [sys.executable, "-c", f"from models import hub; hub.resolve({REPO!r})"]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"QADAPTER_CACHE": str(hub.CACHE)}) as child:
        assert requested.wait(300)
        assert_downloaded()
        assert child.wait(300) == 0
    assert waiting.is_set()
    assert len(server.requests) == 3


# ------------------------------------------------------------------- wrong data, refusals, tokens

FAILURES = {  # a plan for the weights, words of the error
    "too long": ({"other": CONTENT + b"!"}, "expected 300000 bytes"),
    "other bytes": ({"other": OTHER}, SHA256),
    "403": ({"status": 403}, "gated, private or missing: accept its terms on its page and set HF_TOKEN"),
    "a redirect to a file": ({"status": 302, "location": "file:///etc/passwd"}, "302"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failed_download_is_refused(server, case):
    plan, words = FAILURES[case]
    server.plans[WEIGHTS] = [plan]
    with refused(server.url + WEIGHTS, words):
        hub.resolve(REPO)
    assert contents(model_folder()).keys() <= {"config.json", "model.safetensors.part"}
    assert_downloaded()


def test_the_token_is_sent_to_the_hub_only(server, monkeypatch):
    """No redirect gets it. A download behind a redirect is resumed."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    other = Server()
    other.files["/bytes"], other.plans["/bytes"] = CONTENT, [{"cut": 100_000}]
    server.plans[WEIGHTS] = [{"status": 302, "location": other.url + "/bytes"}] * 2
    with refused("the connection broke"):
        hub.resolve(REPO)
    assert_downloaded()
    other.close()
    assert len(server.requests) == 5
    assert all(headers["Authorization"] == "Bearer hf_secret" for _, headers in server.requests)
    assert other.ranges("/bytes") == [None, "bytes=100000-"]
    assert not any("secret" in value for _, headers in other.requests for value in headers.values())


def test_an_invalid_token_is_not_shown(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret\nX: 1")
    with pytest.raises(hub.InputError, match="a token of ASCII") as error:
        hub.resolve(REPO)
    assert "secret" not in str(error.value)
