"""`Config`: flags, config.json and the words of a command line say the same, and what does not fit is refused."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

import common.config
import evaluate
from common.config import VERSION, Config, parse_args, parse_words, read_config, to_json, to_words
from common.errors import InputError
from common.files import read_json, write_json
from qadapter import HEADS

VALUES = dict(  # of every field, none of them the default
    dataset="msvd", data=Path("-odd name"), mllm="m", vit="v", lm="l", method="linear", epochs=(3, 1, 2), batch_size=5,
    cache_features=True, out=Path("o"), resume=Path("r"), plan=True, device="cuda", frames=7, captions_per_clip=2,
    image_size=(32,), vit_blocks=2, allow_missing=True, queries=9, rank=12, last_blocks=0,
    deep_rank=2, gate="none", compile=True, write_back=True,
    token_dropout=0.25, variant="v", visual="frames", grid=2, lr=0.5,
    weight_decay=1e-7, micro_batch_size=2, seed=8, precision="bf16", eval_every=2, beams=4)
NEEDS = {"visual": dict(mllm="m", write_back=True), "grid": dict(method="linear")}
STORED = [name for name in VALUES if name not in common.config.NOT_STORED]


def resolved(config: Config) -> Config:
    """The config as a run stores it: nothing is left to be chosen."""
    models = {} if config.mllm else {"vit": config.vit or "v", "lm": config.lm or "l"}
    precision = "fp32" if config.precision == "auto" else config.precision
    return replace(config, data=config.data or Path("d"), precision=precision, **models)


RESOLVED = resolved(Config())


def write_config(run: Path, config: Config, /, **changes) -> Path:
    run.mkdir(exist_ok=True)
    write_json(run / "config.json", {"version": VERSION, "config": to_json(config)} | changes)
    return run


def test_every_field_has_a_value_here():
    assert {field.name for field in fields(Config)} == VALUES.keys()
    assert all(getattr(Config(), name) != value for name, value in VALUES.items())


@pytest.mark.parametrize("name", STORED)
def test_flags_config_and_file_say_the_same(name, tmp_path):
    """Flags -> Config -> config.json -> Config -> words -> Config."""
    given = {name: VALUES[name]} | NEEDS.get(name, {})
    words = to_words({key: list(value) if isinstance(value, tuple) else value for key, value in given.items()})
    config, names = parse_words(words)
    assert names == given.keys() and all(getattr(config, key) == value for key, value in given.items())
    run = write_config(tmp_path / "run", resolved(config))
    again = read_config(run)
    assert to_json(again) == to_json(resolved(config)) and again.out == run
    stored = read_json(run / "config.json")["config"]
    assert to_json(parse_words(to_words(stored))[0]) == to_json(resolved(config))
    assert parse_args([*words, "--out", "x"]) == replace(config, out=Path("x"), data=config.data or Path(
        f"data/{config.dataset}"))


@pytest.mark.parametrize("dataset", common.config.PRESETS)
def test_the_defaults_of_a_dataset(dataset):
    """A flag overrides its own alone; paths follow from the dataset and the method."""
    config = parse_args(["--dataset", dataset, "--batch-size", "3"])
    assert config == replace(Config(dataset=dataset), **common.config.PRESETS[dataset] | {"batch_size": 3},
                             data=Path("data") / dataset, out=Path(f"runs/{dataset}-qadapter"))
    assert config.stored_frames == 2 * config.frames == 2 * replace(config, cache_features=True).stored_frames


@pytest.mark.parametrize("words, message", [
    ("--mllm m --vit v", "--vit, --lm and --vit-blocks: expected without --mllm"),
    ("--mllm m --image-size 32 32 32", "--image-size: expected one number"), ("--image-size 32 64", "--image-size"),
    ("--dataset msvd --lm l --visual frames --write-back", "--visual frames: expected --mllm"),
    ("--mllm m --visual frames", "--visual frames: expected .*--write-back"), ("--plan --method none", "--plan"),
    ("--method lora --write-back", "--write-back"), ("--method lora --last-blocks 2", ".*--last-blocks: expected"),
    ("--method st-adapter --gate none", ".*--gate"), ("--grid 2", "--grid: expected --visual frames"),
    ("--epochs 1 1 --method none", "--epochs: .* words"), ("--mllm m --method lora-lm --epochs 1 1", ".* words"),
    ("--epochs 1 1 1 1", "--epochs: expected one to three"), ("--epochs 0 0", "--epochs: .* not all 0"),
    ("--epochs 0 1 1 --method none", "--epochs: .* CIDEr"), ("--precision bf16 --method full", "--precision bf16"),
    ("--deep-rank 4 --method none", "--deep-rank: expected"), ("--rank 6", f"--rank: .* multiple of {HEADS}$"),
    ("--cache-features --write-back", "--cache-features"), ("--cache-features --method none", "--cache-features"),
    ("--frames 0", "--frames: expected a whole number from 1 to 4096, found '0'"), ("--epoch 3", "--epoch 3 .*--help"),
    ("--device meta", "--device: invalid choice"), ("--data=", "--data: expected Unicode"),
])
def test_what_does_not_fit_is_refused(words, message):
    with pytest.raises(InputError, match=message):
        parse_args(words.split())


def test_a_resumed_run_keeps_its_flags(tmp_path):
    config = replace(RESOLVED, dataset="folder", data=tmp_path, out=tmp_path / "run", epochs=(3,), lr=0.5)
    run = write_config(tmp_path / "run", config)
    assert parse_args(["--resume", str(run)]) == replace(config, resume=run)
    values = {"epochs": [9], "device": "cpu", "data": tmp_path / "run"}
    assert {"resume", *values} == common.config.ALLOWED_WITH_RESUME
    expected = replace(config, resume=run, **values | {"epochs": (9,)})
    assert parse_args(["--resume", str(run), *to_words(values)]) == expected
    for refused in ("--lr=1", "--out=x", "--plan", "--method=none"):
        with pytest.raises(InputError, match=f"{refused.partition('=')[0]}: a run keeps its own flags"):
            parse_args(["--resume", str(run), refused])
    for epochs, message in (("2 3", "0 of words, as many"), ("0 2 1", "3 of captions or more")):
        with pytest.raises(InputError, match=f"--epochs: expected {message}"):
            parse_args(["--resume", str(run), "--epochs", *epochs.split()])


@pytest.mark.parametrize("name, value", [
    ("frames", 0), ("frames", 10**30), ("frames", {}), ("dataset", "x"), ("dataset", []), ("seed", 1.5), ("epochs", 8),
    ("lr", "nan"), ("rank", 6), ("visual", "frames"), ("write_back", "yes"), ("lr", True), ("rank", False),
    ("seed", None), ("dataset", None), ("data", None), ("lm", None), ("precision", "auto"),
])
def test_a_value_that_was_changed_by_hand_is_named_with_its_file(name, value, tmp_path):
    """Each is checked like a flag, and null, which no flag says, is no default."""
    run = write_config(tmp_path / "run", RESOLVED, config=to_json(RESOLVED) | {name: value})
    with pytest.raises(InputError, match=f"run/config.json: config: .*{name.replace('_', '.')}"):
        read_config(run)


def test_another_version_or_other_fields_are_refused(tmp_path):
    stored = to_json(RESOLVED)
    without = {name: value for name, value in stored.items() if name != "epochs"}
    for changes, message in (
            ({"version": "0.12.0"}, f"made by version '0.12.0', this is version {VERSION}"),
            ({"version": None}, "made by version None"), ({"config": []}, "'config': expected an object"),
            ({"config": stored | {"x": 1}}, "config: expected just the fields of a run, differs in 'x'"),
            ({"config": without}, "config: .* differs in 'epochs'")):
        run = write_config(tmp_path / "run", Config(), **changes)
        with pytest.raises(InputError, match=f"run/config.json: .*{message}"):
            read_config(run)


def test_there_are_not_too_many_flags():
    """Without --help; each says what it is for."""
    for parser, most in ((common.config.make_parser(), 36), (evaluate.make_parser(), 14)):
        flags = [action for action in parser._actions if action.option_strings and action.dest != "help"]
        assert len(flags) <= most and all(action.help for action in flags) and parser.format_help()
