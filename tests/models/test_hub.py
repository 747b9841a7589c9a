"""Downloads from the hub, with a server in a thread that breaks connections, sends wrong data and redirects on demand.

The server speaks RFC 9110's range requests (section 14) and lists models as huggingface.co documents. Downloaded bytes
must be equal. The contents are random, seed 0.
"""

import hashlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from common import files as common_files
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


def send_chunked(handler, data, complete=True):
    """Sends a body without Content-Length; if not complete, the connection is closed before the last chunk."""
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) + b"0\r\n\r\n" * complete)


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
def pauses(monkeypatch):
    """The pauses before retries, which are skipped."""
    requested = []
    monkeypatch.setattr(hub, "sleep", requested.append)
    return requested


@pytest.fixture
def server(monkeypatch, tmp_path, pauses):
    """A server with MODEL."""
    server = Server()
    for name in ("HF_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(hub, "CACHE", tmp_path / "cache")
    server.publish(MODEL)
    yield server
    server.close()


def visible_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def model_folder() -> Path:
    return hub.CACHE / "owner--name" / COMMIT


def assert_downloaded() -> None:
    """MODEL is downloaded to the cache."""
    folder = hub.resolve(REPO)
    assert {name: (folder / name).read_bytes() for name in visible_files(folder)} == MODEL


# ---------------------------------------------------------------------------------------- models


def test_the_files_of_a_model_are_downloaded_and_no_others(server):
    files = MODEL | {"tokenizer.model": b"t", "preprocessor_config.json": b"{}", "generation_config.json": b"g"}
    others = {"README.md": b"#", "pytorch_model.bin": b"x", "tokenizer.json": b"y", "onnx/a.bin": b"z"}
    server.publish(files | others | {"tokenizer_config.json": b"c", "vocab.json": b"v"})
    lines = []
    folder = hub.resolve(REPO, report=lines.append)
    assert folder == model_folder()
    assert {name: (folder / name).read_bytes() for name in visible_files(folder)} == files
    expected = [LISTING + "?blobs=true"] + [f"/{REPO}/resolve/{COMMIT}/{name}" for name in files]
    assert sorted(server.paths()) == sorted(expected)
    assert len(lines) == 1 and all(word in lines[0] for word in (REPO, COMMIT, "5 files", "300.0 kB"))
    assert (folder.parent / "refs" / "main").read_text() == COMMIT


def test_without_a_sentencepiece_model_tokenizer_json_is_downloaded(server):
    files = MODEL | {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}", "generation_config.json": b"{}"}
    server.publish(files | {"merges.txt": b"m", "special_tokens_map.json": b"s"})

    def check(folder: Path) -> None:
        assert visible_files(folder) == sorted(files.keys() - {"model.safetensors"})

    assert visible_files(hub.resolve(REPO, check=check)) == sorted(files)


def test_preprocessing_of_videos_is_downloaded(server):
    """Also from a folder within the model's."""
    files = MODEL | {"video_preprocessor_config.json": b"{}", "video_processor/preprocessor_config.json": b'{"a": 2}'}
    server.publish(files | {"video_processor/other.json": b"o"})
    folder = hub.resolve(REPO)
    assert {name: (folder / name).read_bytes() for name in files} == files
    assert not (folder / "video_processor" / "other.json").exists()


def test_a_complete_model_needs_no_network(server):
    folder = hub.resolve(REPO)
    server.requests.clear()
    assert hub.resolve(REPO) == hub.resolve(f"{REPO}@main") == hub.resolve(f"{REPO}@{COMMIT}") == folder
    assert server.requests == []
    server.close()
    assert hub.resolve(REPO) == folder


def test_main_keeps_its_commit_even_if_a_file_is_lost(server):
    folder = hub.resolve(REPO)
    server.publish(MODEL | {"model.safetensors": OTHER}, commit="f" * 40)
    server.publish(MODEL, revision=COMMIT)
    (folder / "model.safetensors").write_bytes(CONTENT[:-1])
    assert hub.resolve(REPO) == folder and (folder / "model.safetensors").read_bytes() == CONTENT
    (folder.parent / "refs" / "main").unlink()
    assert hub.resolve(REPO).name == "f" * 40


def test_complete_and_correct_files_are_not_downloaded_again(server):
    server.plans[WEIGHTS] = [sending(status=403)]
    with refused("403"):
        hub.resolve(REPO)
    assert not (hub.CACHE / "owner--name" / "refs" / "main").exists()
    (model_folder() / "model.safetensors").write_bytes(OTHER)  # of the right size: the SHA-256 differs
    assert_downloaded()
    assert server.paths().count(CONFIG) == 1


def test_a_revision_is_percent_encoded(server):
    server.publish(MODEL, "refs%2Fpr%2F3", "a" * 40)
    assert hub.resolve(f"{REPO}@refs/pr/3").name == "a" * 40
    assert visible_files(hub.CACHE / "owner--name" / "refs") == ["refs%2Fpr%2F3"]


def test_local_paths_and_the_project_s_backbones_are_returned(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    Path("weights.bin").write_bytes(b"")
    assert hub.resolve("owner/name") == Path("owner/name")
    assert hub.resolve(tmp_path / "weights.bin") == tmp_path / "weights.bin"
    assert hub.resolve("backbones/tiny-lm") == ROOT / "backbones" / "tiny-lm"
    with refused(str(ROOT / "backbones" / "other"), "expected the folder of a model"):
        hub.resolve("backbones/other")
    assert server.requests == []


def test_the_check_runs_before_the_weights_are_downloaded(server):
    """With config and tokenizer only; a complete model is not checked again."""
    server.publish(MODEL | {"tokenizer.model": b"t"})

    def check(folder: Path) -> None:
        assert visible_files(folder) == ["config.json", "tokenizer.model"]
        raise hub.InputError("not supported")

    with refused("not supported"):
        hub.resolve(REPO, check=check)
    assert WEIGHTS not in server.paths()
    hub.resolve(REPO)
    hub.resolve(REPO, check=check)


def test_a_pinned_name_keeps_its_commit(server, tmp_path):
    folder = hub.resolve(REPO)
    name = hub.pin_revision(REPO, folder)
    assert name == hub.pin_revision(f"{REPO}@main", folder) == hub.pin_revision(name, folder) == f"{REPO}@{COMMIT}"
    server.publish(MODEL | {"model.safetensors": OTHER}, commit="f" * 40)
    (folder.parent / "refs" / "main").unlink()
    assert hub.resolve(REPO) != folder == hub.resolve(name)
    for path in (tmp_path, folder, folder / "config.json"):
        assert hub.pin_revision(path, path) == hub.pin_revision(str(path), path) == str(path)
    assert hub.pin_revision("backbones/tiny-lm", hub.resolve("backbones/tiny-lm")) == "backbones/tiny-lm"


BAD_NAMES = [
    "", "name", "./owner/name", "/owner/name", "a/b/c", "owner/", "/name", "../name", "owner/..", "owner/.name", "-o/n",
    "o/-n", "o/n.", "o/n-", "o..o/n", "o--o/n", "o/n@", "o/n@..", "o/n@a..b", "o/n@-x", "o/n@.x", "o/n@/a", "o/n@a//b",
    "o/n@a/", "o/n@a@b", "o/n@a b", "o/n?x", "o/n#x", "o/n\n", "o/n\0", "ö/n", "o/n%2f", "https://huggingface.co/o/n",
    "o/" + "n" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES, ids=range(len(BAD_NAMES)))
def test_a_bad_name_is_refused_without_a_request(server, name):
    with refused("expected a folder, a file or a hub id like owner/name[@revision]" if len(name) < 1000 else "nnn"):
        hub.resolve(name)
    assert server.requests == [] and not hub.CACHE.exists()


SHARDS = ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]
INDEX = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}}
SHARDED = {
    "config.json": b"{}",
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    SHARDS[0]: CONTENT,
    SHARDS[1]: OTHER,
}
PICKLE = {"config.json": b"{}", "tokenizer.json": b"{}", "pytorch_model.bin": CONTENT}
SHARDED_PICKLE = {
    "config.json": b"{}",
    "pytorch_model.bin.index.json": json.dumps({"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}).encode(),
    "pytorch_model-00001-of-00001.bin": OTHER,
}


def test_the_preferred_format_of_weights_is_downloaded(server):
    """All formats at first, then without the most preferred ones; files that the index does not name are ignored."""
    files = SHARDED | SHARDED_PICKLE | PICKLE | MODEL | {"model-3-of-2.safetensors": b"not in the index"}
    for i, expected in enumerate([
        ["model.safetensors"],
        ["model.safetensors.index.json", *SHARDS],
        ["pytorch_model.bin"],
        ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"],
    ]):  # fmt: skip
        server.publish(files, f"r{i}", f"{i}" * 40)
        lines = []
        folder = hub.resolve(f"{REPO}@r{i}", report=lines.append)
        names = ["config.json", "tokenizer.json", *expected]
        assert {name: (folder / name).read_bytes() for name in visible_files(folder)} == {n: files[n] for n in names}
        assert f" {len(names)} files, " in lines[0]
        del files[expected[0]]


# ----------------------------------------------------------------------------- untrusted listings


def siblings(*names):
    return [{"rfilename": name, "size": 8} for name in names]


def listing(**changes):
    return json.dumps({"sha": COMMIT, "siblings": siblings("config.json", "model.safetensors")} | changes).encode()


def weights_entry(**entry):
    return listing(siblings=siblings("config.json") + [{"rfilename": "model.safetensors"} | entry])


BAD_LISTINGS = {
    "not JSON": (b"<html>", "expected JSON"),
    "deep": (b"[" * 100_000, "expected JSON"),
    "a list": (b"[]", "expected a JSON object"),
    "no commit": (b'{"siblings": []}', "'sha' is missing"),
    "a commit outside the cache": (listing(sha="../../../x"), "sha"),
    "a commit with a line break": (listing(sha=COMMIT + "\n"), "sha"),
    "no files": (b'{"sha": "%s"}' % COMMIT.encode(), "'siblings' is missing"),
    "a file without a name": (listing(siblings=[{"size": 1}]), "rfilename"),
    "a file that is not an object": (listing(siblings=["config.json"]), "rfilename"),
    "no config": (listing(siblings=siblings("model.safetensors")), "config.json"),
    "no weights": (listing(siblings=siblings("config.json")), "model.safetensors"),
    "only files in other folders": (
        listing(siblings=siblings("../config.json", "/model.safetensors", "a/config.json", "../model.safetensors")),
        "expected config.json",
    ),
    "no size": (weights_entry(), "model.safetensors: field 'size' is missing"),
    "a negative size": (weights_entry(size=-1), "model.safetensors: expected a size"),
    "a size that is not a number": (weights_entry(size="8"), "model.safetensors: field 'size'"),
    "lfs that is not an object": (weights_entry(size=8, lfs=3), "model.safetensors: field 'lfs'"),
    "lfs without a SHA-256": (weights_entry(size=8, lfs={"size": 8}), "'sha256' is missing"),
    "a SHA-256 that is not hex": (weights_entry(lfs={"size": 8, "sha256": "../x"}), "a SHA-256 in hex"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LISTINGS)
def test_a_bad_listing_is_refused(server, case):
    server.files[LISTING], word = BAD_LISTINGS[case]
    with refused(server.url, word):
        hub.resolve(REPO)
    assert server.paths() == [LISTING + "?blobs=true"]


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "missing.safetensors", "config.json",
             ".complete", "..", "", 3, None, ["a"], "x.safetensors\n"]
)  # fmt: skip
def test_an_index_with_a_bad_name_is_refused(server, tmp_path, name):
    """Even if the listing has the name and the server would send the file."""
    files = SHARDED | {"model.safetensors.index.json": json.dumps({"weight_map": {"a": name}}).encode()}
    files |= {} if name in ("missing.safetensors", "config.json") or not isinstance(name, str) else {name: b"x"}
    server.publish(files)
    with refused("model.safetensors.index.json: "):
        hub.resolve(REPO)
    assert visible_files(model_folder()) == ["model.safetensors.index.json"]
    assert visible_files(tmp_path) == ["cache"] and visible_files(hub.CACHE) == ["owner--name"]


def test_another_commit_than_requested_is_refused(server):
    server.publish(MODEL, revision="f" * 40)
    with refused(COMMIT):
        hub.resolve(f"{REPO}@{'f' * 40}")


# ---------------------------------------------------------------------------------- interruptions


def send_another_range(handler):
    send(handler, CONTENT[5:], status=206, Content_Range=f"bytes 5-299999/{len(CONTENT)}")


INTERRUPTIONS = {  # plans for the weights, the ranges that must be requested, the pauses
    "a break": ([sending(cut=100_000)], [None, "bytes=100000-"], [1]),
    "many breaks with progress": ([sending(cut=10_000)] * 20,
                                  [None, *(f"bytes={n}0000-" for n in range(1, 21))], [1] * 20),
    "ranges are ignored": ([sending(cut=100_000), sending(ranges=False)], [None, "bytes=100000-"], [1]),
    "another range": ([sending(cut=100_000), send_another_range], [None, "bytes=100000-", None], [1, 2]),
    "no length": ([partial(send_chunked, data=CONTENT[:50_000], complete=False), partial(send_chunked, data=CONTENT)],
                  [None, "bytes=50000-"], [1]),
    "busy": ([sending(status=429), sending(status=500), sending(status=503)], [None] * 4, [1, 2, 4]),
}  # fmt: skip


@pytest.mark.parametrize("case", INTERRUPTIONS)
def test_an_interrupted_download_is_completed(server, pauses, case):
    plans, ranges, expected_pauses = INTERRUPTIONS[case]
    server.plans[WEIGHTS] = list(plans)
    assert_downloaded()
    assert (server.ranges(WEIGHTS), pauses) == (ranges, expected_pauses)


def test_silence_longer_than_the_timeout_is_a_break(server, monkeypatch):
    monkeypatch.setattr(hub, "TIMEOUT", 3)  # seconds; a busy machine answers later than in one
    release = threading.Event()

    def stall(handler):
        send(handler, CONTENT, cut=150_000)
        handler.wfile.flush()
        release.wait(30)

    server.plans[WEIGHTS] = [stall]
    assert_downloaded()
    assert not release.is_set() and server.ranges(WEIGHTS) == [None, "bytes=150000-"]
    release.set()


def test_a_file_without_a_known_sha256_is_not_resumed(server):
    server.plans[CONFIG] = [sending(cut=4)]
    assert_downloaded()
    assert server.ranges(CONFIG) == [None, None]


@pytest.mark.parametrize("part, ranges", [
    (CONTENT, []), (CONTENT[:60_000], ["bytes=60000-"]), (CONTENT + b"!", [None]), (b"", [None]),
], ids=["complete", "partial", "too long", "empty"])  # fmt: skip
def test_a_partial_file_of_an_earlier_call_is_used(server, part, ranges):
    model_folder().mkdir(parents=True)
    (model_folder() / "model.safetensors.part").write_bytes(part)
    assert_downloaded()
    assert server.ranges(WEIGHTS) == ranges


def test_a_partial_file_with_other_contents_is_deleted(server):
    model_folder().mkdir(parents=True)
    (model_folder() / "model.safetensors.part").write_bytes(OTHER[:60_000])
    with refused(WEIGHTS, f"expected SHA-256 {sha256(CONTENT)}", sha256(OTHER[:60_000] + CONTENT[60_000:])):
        hub.resolve(REPO)
    assert visible_files(model_folder()) == ["config.json"]
    assert_downloaded()


def test_two_processes_download_each_file_once(server):
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
    command = [sys.executable, "-c", f"from models import hub; hub.resolve({REPO!r})"]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"QADAPTER_CACHE": str(hub.CACHE)}) as child:
        assert weights_requested.wait(300)
        hub.resolve(REPO, report=report)
        assert child.wait(300) == 0
    assert waiting.is_set()
    assert_downloaded()
    assert server.paths().count(WEIGHTS) == server.paths().count(CONFIG) == 1


# ------------------------------------------------------------------- wrong data, refusals, tokens


FAILURES = {  # plans for the weights, words of the error, the pauses
    "too short": ([partial(send, data=CONTENT[:-1])], ["expected 300000 bytes", "299999"], []),
    "too long": ([partial(send, data=CONTENT + b"!")], ["expected 300000 bytes", "300001"], []),
    "too long, no length": ([partial(send_chunked, data=CONTENT + OTHER)], ["expected 300000 bytes"], []),
    "other contents": ([partial(send, data=OTHER)], [sha256(CONTENT), sha256(OTHER)], []),
    "breaks without progress": ([sending(cut=0)] * 50, ["broke at 0 bytes of 300.0 kB"], [1, 2, 4, 8, 16]),
    "always busy": ([sending(status=500)] * 50, ["answers 500"], [1, 2, 4, 8, 16]),
    "401": ([sending(status=401)], ["gated, private or missing", "HF_TOKEN", "accept its terms"], []),
    "403": ([sending(status=403)], ["gated, private or missing", "HF_TOKEN", "accept its terms"], []),
    "404": ([sending(status=404)], ["no such local folder or file, and no such model or revision"], []),
    "400": ([sending(status=400)], ["answers 400"], []),
    "a circular redirect": ([redirecting(WEIGHTS)] * 50, ["answers 302"], []),
    "a redirect to a file": ([redirecting("file:///etc/passwd")], ["answers 302"], []),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failed_download_is_refused(server, pauses, case):
    plans, words, expected_pauses = FAILURES[case]
    server.plans[WEIGHTS], lines = list(plans), []
    with refused(server.url + WEIGHTS, *words):
        hub.resolve(REPO, report=lines.append)
    assert pauses == expected_pauses and sum("trying again in" in line for line in lines) == len(pauses)
    assert set(visible_files(model_folder())) <= {"config.json", "model.safetensors.part"}
    server.plans.clear()
    assert_downloaded()


def test_a_refused_listing_names_the_model(server):
    for status, word in ((401, "HF_TOKEN"), (404, "no such local folder or file")):
        server.plans[LISTING] = [sending(status=status)]
        with refused(server.url, REPO, word):
            hub.resolve(REPO)


def test_an_incomplete_model_without_network_is_refused(server):
    server.close()
    with refused(REPO, server.url, "cannot be reached", str(hub.CACHE)):
        hub.resolve(REPO)


def test_the_token_is_sent_to_the_hub_only(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    other = Server()
    other.files["/bytes"] = CONTENT
    server.plans[WEIGHTS] = [redirecting("/moved")]
    server.plans["/moved"] = [redirecting(other.url + "/bytes")]
    assert_downloaded()
    other.close()
    assert len(server.requests) == 4 and "/moved" in server.paths()
    assert all(headers["Authorization"] == "Bearer hf_secret" for _, headers in server.requests)
    [(path, headers)] = other.requests
    assert path == "/bytes" and not any("secret" in value for value in headers.values())


def test_a_download_behind_a_redirect_is_resumed(server):
    other = Server()
    other.files["/bytes"] = CONTENT
    other.plans["/bytes"] = [sending(cut=100_000)]
    server.plans[WEIGHTS] = [redirecting(other.url + "/bytes")] * 2
    assert_downloaded()
    other.close()
    assert other.ranges("/bytes") == [None, "bytes=100000-"]
    assert not any("Authorization" in headers for _, headers in server.requests + other.requests)


@pytest.mark.parametrize("token", ["secret\nX: 1", "secret\u20ac"])
def test_an_invalid_token_is_not_shown(server, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(hub.InputError, match="a token of ASCII") as error:
        hub.resolve(REPO)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("endpoint", ["huggingface.co", "file:///etc", "ftp://host", "http://host:port", "http://a b"])
def test_an_invalid_endpoint_is_refused(server, monkeypatch, pauses, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with refused(endpoint, "expected an address like https://host/path"):
        hub.resolve(REPO)
    assert pauses == []


# ------------------------------------------------------------------------------------ disk and progress


def test_too_little_disk_space_is_refused_before_the_download(server, monkeypatch):
    """Files that are already there do not count."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(common_files.shutil, "disk_usage", lambda path: usage(0, 0, 250_000))
    with refused(REPO, "needs 300.0 kB", "250.0 kB free"):
        hub.resolve(REPO)
    assert server.paths() == [LISTING + "?blobs=true"]
    (model_folder() / "model.safetensors.part").write_bytes(CONTENT[:60_000])
    assert_downloaded()


def test_a_folder_that_cannot_be_written_is_refused(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(hub, "CACHE", tmp_path / "file")
    with refused(f"cannot write {tmp_path / 'file'}"):
        hub.resolve(REPO)


def test_a_failed_write_is_not_retried(server, pauses):
    """A limit on file sizes simulates a full disk."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with refused("cannot write", "owner--name", "too large"):
            hub.resolve(REPO)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old_handler)
    assert pauses == [] and server.paths().count(WEIGHTS) == 1


def test_progress_is_reported_every_ten_seconds(monkeypatch):
    """10 MB in 100 chunks, one a second."""
    clock, lines = [0], []
    monkeypatch.setattr(hub, "monotonic", lambda: clock[0])

    class Response:
        def read1(self, size):
            clock[0] += 1
            return bytes(100_000) if clock[0] <= 100 else b""

    assert hub._copy(Response(), io.BytesIO(), 0, 10_000_000, "file", lines.append) == 10_000_000
    assert lines[0] == "file: 10% of 10.0 MB, 1:30 left" and lines[-1] == "file: 100% of 10.0 MB, 0:00 left"
    assert len(lines) == 10
