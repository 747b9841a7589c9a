"""How tests run the project's scripts: in an interpreter of their own, or in forked copies of this process."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import train
from backbones import pretrain
from common import cli
from common.errors import InputError
from common.files import read_json, write_json
from models.safetensors import read_safetensors, write_safetensors

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
FORK, TIMEOUT = multiprocessing.get_context("fork"), 120  # seconds
TWELVE_STEPS = ["--batch-size", "4", "--epochs", "4", "--eval-every", "2",
                "--device", "cpu", "--queries", "4", "--rank", "4", "--last-blocks", "0", "--captions-per-clip", "2",
                "--precision", "fp32", "--lr", "0.02"]


def make_backbones(folder: Path) -> Path:
    """Writes two tiny backbones, `vit` and `lm`, seed 0. The language model's weights are large: its text depends on
    all of its input."""
    vit = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    lm = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
          "intermediate_size": 48}
    for name, small in (("vit", vit), ("lm", lm)):
        shutil.copytree(ROOT / f"backbones/tiny-{name}", folder / name)
        write_json(folder / name / "config.json", read_json(folder / name / "config.json") | small)
    pretrain.pretrain_vit(folder / "vit", count=8, steps=1, batch_size=4, seed=0)
    pretrain.pretrain_lm(folder / "lm", count=300, steps=1, batch_size=2, seed=0)
    path = folder / "lm/model.safetensors"
    tensors = read_safetensors(path)
    random = {name: 0.3 * torch.randn(tensor.shape) for name, tensor in tensors.items() if "norm" not in name}
    write_safetensors(path, tensors | {name: tensor.half() for name, tensor in random.items()})
    return folder


def run_script(script, words: Sequence, out, err, environment: dict) -> None:
    """In a fork of this process, which has imported everything already. Each step of training is logged."""
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    sys.stdout, sys.stderr = (open(descriptor, "w", closefd=False) for descriptor in (1, 2))
    sys.argv = [script.__name__, *map(str, words)]
    os.environ.update(environment)
    os.chdir(ROOT)
    train.LOG_EVERY = 1
    warnings.simplefilter("error")
    cli.run(script.main)


def run_forked(script, *words, environments: Sequence[dict] = ({},)) -> subprocess.CompletedProcess:
    """Runs a script in a forked process, or in one for each environment at the same time. Returns the first exit code
    that is not 0, and the output of all."""
    with TemporaryFile("w+b", buffering=0) as out, TemporaryFile("w+b", buffering=0) as err:
        processes = [FORK.Process(target=run_script, args=(script, words, out, err, environment))
                     for environment in environments]
        for process in processes:
            process.start()
        for process in processes:  # if one has failed, those that wait for it are killed
            process.join(5 if any(other.exitcode for other in processes) else TIMEOUT)
            process.kill()
            process.join()
        texts, codes = [], [process.exitcode for process in processes]
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess([script.__name__, *words], next(filter(None, codes), 0), *texts)


def refuse(script, words: Sequence, message: str) -> None:
    """Runs a script in this process, where `cli.run` would turn its InputError into exit code 2."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match=message) as error:
        patch.setattr(sys, "argv", [script.__name__, *map(str, words)])
        script.main()
    assert str(error.value).isprintable()


def succeed(script, *words) -> str:
    """Runs a script in a forked process. Returns its standard output; the exit code must be 0."""
    done = run_forked(script, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fork_two(*words) -> subprocess.CompletedProcess:
    """`train.py` in two forks of this process, in the environment that torchrun sets."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # where they meet
    shared = {"TORCHELASTIC_RUN_ID": "one", "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "localhost",
              "MASTER_PORT": str(store.port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return run_forked(train, *words, environments=[shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"])


def act_at_call(owner, name: str, n: int, action):
    """A context in which the n-th call of a function, in this process or in a fork of it, runs `action` first."""
    function, calls = getattr(owner, name), []

    def call(*args, **options):
        calls.append(1)
        if len(calls) == n:
            action()
        return function(*args, **options)

    return mock.patch.object(owner, name, call)


def assert_error(done: subprocess.CompletedProcess, *words: str) -> None:
    """Exit code 2, no traceback, and last on stderr one line with these words."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr
    assert lines[-1].startswith("error: ") and all(word in lines[-1] for word in words), done.stderr
    assert "Traceback" not in done.stderr


def read_log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses(run: Path) -> torch.Tensor:
    """Of each step."""
    return torch.tensor([row["loss"] for row in read_log(run) if "loss" in row])


def contents(run: Path) -> dict:
    """Everything in the folder of a run but its times and speeds."""
    rows = [{key: row[key] for key in row.keys() - {"clips/s", "elapsed"}} for row in read_log(run)]
    state = torch.load(run / "last/state.pt", weights_only=True)
    moments = {f"{n} {key}": value.tolist() for n, one in state["optimizer"]["state"].items()
               for key, value in one.items()}
    files = {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    for name in ("log.jsonl", "last/state.pt", "config.json", "report.html", "stdout.txt"):
        files[name] = None
    return {"rows": rows, "step": state["step"], "best": state["best"], "moments": moments, "files": files}
