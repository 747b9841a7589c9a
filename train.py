"""Trains a captioner: `python train.py --dataset shapes`. Read it downward.

A run is a folder: config.json (every flag, versions, seed, sha256 of both backbones, split sizes),
log.jsonl (a row a report), best/ and last/ with adapter.safetensors (the trained tensors only), and
last/state.pt, out of which `--resume RUN` goes on. The best checkpoint is the one with the highest
CIDEr on the validation split; the test split is read once, after training.
"""

import argparse
import json
import math
import os
import pickle
import platform
import shutil
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import av
import numpy as np
import torch

import cli
import corpora
import data
import hub
import published
from cache import cached_features, cached_frames, frame_keys
from evaluate import (
    adapter_config,
    backbone_hashes,
    caption_split,
    check_checkpoint,
    checkpoint,
    pick_device,
    score_captions,
    table,
)
from lm import CausalLM
from model import LONGEST, AdapterConfig, Captioner
from tokens import load_tokenizer
from vit import ViT
from vit_public import check_vit
from weights import InputError, field, read_json, replace_atomically

TINY = "backbones/tiny-vit", "backbones/tiny-lm"
CLIP = "openai/clip-vit-base-patch16"
TINYLLAMA, LLAMA_160M = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", "JackFram/llama-160m"
NEWER = {"image_size", "allow_missing", "cache", "download"}  # flags that older runs do not have
CANDIDATES = 16  # frames kept of each training clip; a step draws T of them


def parse(argv: list[str] | None = None):
    parser = cli.Parser("Trains a captioner on a dataset.")
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=corpora.DATASETS, default="shapes", help="what to train on")
    group.add_argument("--data", type=Path, help="the dataset's folder; unset: data/DATASET")
    group.add_argument("--allow-missing", action="store_true", help="leave out clips without a video or a caption")
    group.add_argument("--download", action="store_true", help="first fetch what is published of msvd or msrvtt")
    group.add_argument("--cache", type=Path, help="where decoded frames are kept; unset: the dataset's folder")
    group.add_argument("--clips", type=cli.at_least(1), nargs=3, default=[6000, 200, 500],
                       metavar=("TRAIN", "VAL", "TEST"), help="clips that shapes is made of")  # fmt: skip
    group.add_argument("--cache-features", action="store_true",
                       help="run the frozen ViT once for each frame and keep what it makes of them on disk, in fp16")
    group.add_argument("--frames", type=cli.at_least(1, 4096), default=8, help="frames a clip")
    group.add_argument("--captions-per-clip", type=cli.at_least(1), default=1, help="captions a clip in a step")
    group = parser.add_argument_group("model")
    group.add_argument("--vit", help="the ViT: a folder, a .pth file or a hub id; unset: the tiny one for shapes, else "
                       f"{CLIP}")  # fmt: skip
    group.add_argument("--lm", help="the language model: a folder or a hub id; unset: the tiny one for shapes, else "
                       f"{TINYLLAMA} with a GPU, {LLAMA_160M} without")  # fmt: skip
    group.add_argument("--image-size", type=cli.at_least(1, 4096),
                       help="side of the ViT's input in pixels; unset: its own")  # fmt: skip
    group.add_argument("--method", choices=["qadapter", "linear", "lora", "full"], default="qadapter",
                       help="what is trained")  # fmt: skip
    group.add_argument("--reading", choices=["read", "write"], default="read", help="do patches read queries back?")
    group.add_argument("--queries", type=cli.at_least(1), default=16, help="query tokens, and so visual tokens")
    group.add_argument("--rank", type=cli.at_least(1), default=32, help="of the Q-Adapter's projections, of LoRA")
    group.add_argument("--heads", type=cli.at_least(1), default=8, help="attention heads of the Q-Adapter")
    group.add_argument("--last-blocks", type=cli.at_least(0), default=3, help="adapt only the last so many; 0: all")
    group.add_argument("--gate", choices=["sigmoid", "none"], default="sigmoid", help="the gating layer")
    group.add_argument("--talk", action="store_true", help="queries attend to each other too")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--batch-size", type=cli.at_least(1), default=64, help="clips a step")
    group.add_argument("--epochs", type=cli.at_least(1), default=16, help="passes over the training clips")
    group.add_argument("--lr", type=cli.number(0, above=True), default=5e-3, help="peak learning rate of AdamW")
    group.add_argument("--weight-decay", type=cli.number(0), default=0.01, help="of AdamW")
    group.add_argument("--warmup", type=cli.at_least(0), default=50, help="steps of linear warm-up")
    group.add_argument("--seed", type=cli.at_least(0), default=0, help="of weights, order, frames and captions")
    group = parser.add_argument_group("run and machine")
    group.add_argument("--out", type=Path, help="the run's folder; unset: runs/DATASET-METHOD")
    group.add_argument("--resume", type=Path, metavar="RUN", help="go on with this run, with its own flags")
    group.add_argument("--eval-every", type=cli.at_least(1), default=4, help="epochs between validations")
    group.add_argument("--log-every", type=cli.at_least(1), default=20, help="steps between reports")
    group.add_argument("--workers", type=cli.at_least(0), default=0, help="processes that decode; 0: one a core")
    group.add_argument("--device", default="auto", help="cuda, mps, cpu; auto takes the first that is there")
    return parser.parse_args(argv)


def flags_of_run(argv: list[str]) -> argparse.Namespace:
    """The flags of the run that `--resume` names. Beside it only where and on what may be given anew."""
    given = parse(argv)
    config = given.resume / "config.json"
    if not checkpoint(given.resume, "last").with_name("state.pt").is_file():
        raise InputError(f"{given.resume}: expected a run to go on with, with last/state.pt in it")
    free = {"--resume", "--device", "--workers", "--data", "--cache"}
    if odd := [word for word in argv if word.startswith("--") and word.split("=")[0] not in free]:
        raise InputError(f"{odd[0]}: a run goes on with its own flags; beside --resume only {', '.join(sorted(free))}")
    words, flags = [], field(read_json(config), "flags", dict, config)
    for name in vars(given).keys() - {"resume", "out"}:
        if name not in flags and name not in NEWER:
            raise InputError(f"{config}: flags: expected a field {name!r}")
        value = flags.get(name)
        if value is not None and value is not False:
            words.append("--" + name.replace("_", "-"))
            words += [] if value is True else map(str, value if isinstance(value, list) else [value])
    try:
        return parse([*words, *argv, "--out", str(given.resume)])
    except InputError as error:
        raise InputError(f"{config}: flags: {error}") from error


def backbones(dataset: str, device: torch.device) -> tuple[str, str]:
    """ViT and language model for a dataset, unless one says which."""
    return TINY if dataset == "shapes" else (CLIP, LLAMA_160M if device.type == "cpu" else TINYLLAMA)


def parameter_table(captioner: Captioner) -> str:
    """Parameters of each part, trained and in all, and the trained share."""
    lines = [f"{'part':12}{'trained':>12}{'in all':>14}"]
    total = mine = 0
    for name, part in captioner.named_children():
        sizes = {p: p.numel() for p in part.parameters()}  # a tied head counts once
        trained = sum(n for p, n in sizes.items() if p.requires_grad)
        lines.append(f"{name:12}{trained:>12,}{sum(sizes.values()):>14,}")
        mine, total = mine + trained, total + sum(sizes.values())
    if captioner.frames is not None:
        mine, total = mine + captioner.frames.numel(), total + captioner.frames.numel()
        lines.append(f"{'frames':12}{captioner.frames.numel():>12,}{captioner.frames.numel():>14,}")
    lines.append(f"{'together':12}{mine:>12,}{total:>14,}   trained: {100 * mine / total:.2f} %")
    return "\n".join(lines)


def check_trained(captioner: Captioner) -> None:
    """The trained set must be exactly what the method means."""
    method, names = captioner.config.method, set(captioner.trained())
    own = {"qadapter": ("adapter.", "connector."), "linear": ("frames", "connector."),
           "lora": ("frames", "connector."), "full": ("frames", "connector.", "vit.", "lm.")}[method]  # fmt: skip
    meant = {
        name for name, _ in captioner.named_parameters()
        if name.startswith(own) or (method == "lora" and ".lora_" in name)
    }  # fmt: skip
    assert names == meant, f"trained and should not be, or the reverse: {sorted(names ^ meant)[:5]}"


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up, the peak for half of all steps, then half a cosine down to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * max(0, 2 * step / steps - 1)))


def save_folder(folder: Path, captioner: Captioner, metadata: dict[str, str], state: dict | None = None) -> None:
    """Writes a checkpoint beside `folder` and renames it into place; until then the old one stays."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    captioner.save(new / "adapter.safetensors", metadata)
    if state is not None:
        with replace_atomically(new / "state.pt") as file:
            torch.save(state, file)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def note_interrupts() -> list[int]:
    """From here on a first Ctrl-C or SIGTERM is noted in the list returned; a second one interrupts at once."""
    noted: list[int] = []

    def note(number: int, _) -> None:
        noted.append(number)
        signal.signal(number, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return noted


def load_state(path: Path, optimizer: torch.optim.Optimizer, device: torch.device) -> tuple[int, float]:
    """Puts the optimizer where `last/state.pt` says it was; returns the step and the best score until then."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        return int(state["step"]), float(state["best"])
    except (RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{path}: not the state of this run: {str(error).splitlines()[0]}") from error


def keep_rows(path: Path, step: int) -> None:
    """Cuts the log back to what training and validation wrote up to `step`; a half-written last row goes too."""
    kept = []
    for row in path.read_text().splitlines() if path.exists() else []:
        try:
            content = json.loads(row)
        except json.JSONDecodeError:
            break
        if content["step"] <= step and "test" not in content:
            kept.append(row + "\n")
    with replace_atomically(path) as file:
        file.write("".join(kept).encode())


def write_json(path: Path, content: dict) -> None:
    with replace_atomically(path) as file:
        file.write((json.dumps(content, indent=1, default=str) + "\n").encode())


def main() -> int:
    # 1. The flags: of this command, or of the run that goes on.
    args = parse()
    resumed = args.resume
    if resumed:
        args = flags_of_run(sys.argv[1:])
    out = args.out = Path(args.out or f"runs/{args.dataset}-{args.method}")
    if (out / "config.json").exists() and not resumed:
        raise InputError(f"{out}: holds a run already; --resume {out} goes on with it, --out names another folder")
    if not os.access(next(folder for folder in out.absolute().parents if folder.exists()), os.W_OK | os.X_OK):
        raise InputError(f"--out {out}: no folder can be made there")
    device = pick_device(args.device)
    args.data = root = args.data or Path("data") / args.dataset
    torch.manual_seed(args.seed)
    begun = time.monotonic()

    # 2. The data: which clips there are and what is said of them.
    if args.download:
        published.download(args.dataset, root)
    corpus = corpora.read(args.dataset, root, args.clips, args.allow_missing)
    splits, counts = corpus.splits, corpus.counts()
    print(corpus)
    steps_an_epoch = counts["train"] // args.batch_size
    if steps_an_epoch == 0:
        raise InputError(f"--batch-size {args.batch_size}: the dataset has only {counts['train']} training clips")
    steps = args.epochs * steps_an_epoch

    # 3. The frozen backbones and what is trained beside them.
    usual = backbones(args.dataset, device)
    args.vit, args.lm = (usual[0] if args.vit is None else args.vit), (usual[1] if args.lm is None else args.lm)
    vit_path, lm_path = hub.local(args.vit, check=check_vit), hub.local(args.lm, check=load_tokenizer)
    args.vit, args.lm = hub.pinned(args.vit, vit_path), hub.pinned(args.lm, lm_path)
    vit = ViT.from_pretrained(vit_path, image_size=args.image_size)
    tokenizer, lm = load_tokenizer(lm_path), CausalLM.from_pretrained(lm_path)
    shape = AdapterConfig(args.method, args.reading, args.queries, args.rank, args.heads, args.last_blocks, args.gate,
                          args.talk, args.frames)  # fmt: skip
    captioner = Captioner(vit, lm, tokenizer, shape).to(device)
    check_trained(captioner)
    if args.cache_features and (args.method, args.reading) != ("qadapter", "read"):
        raise InputError("--cache-features: only --method qadapter with --reading read leaves the ViT's work as it is")
    hashes = backbone_hashes(vit_path, lm_path)
    if resumed:
        config = read_json(out / "config.json")
        check_checkpoint(checkpoint(out, "last"), hashes, adapter_config(config, out / "config.json"))
        if config.get("splits") != counts:
            raise InputError(f"{root}: holds {counts}, the run was trained on {config.get('splits')}")

    print(f"device: {device}, {torch.get_num_threads()} threads")
    print(parameter_table(captioner))

    # 4. Frames, decoded once, and batches.
    kept, view = corpora.kept_in(args.cache, args.dataset, root), vit.pixels

    def frames_of(split: str, count: int) -> np.ndarray:
        path = kept / f"{split}-{count}x{view.size}.frames"
        return cached_frames(splits[split], path, count, view, args.workers)

    candidates = max(CANDIDATES, 2 * args.frames)
    keys = frame_keys(splits["train"], candidates, view)  # first: a file that changes from here on is found out
    train_inputs = frames_of("train", candidates)
    if args.cache_features:
        keys = [json.dumps([hashes, captioner.adapter.first, key]) for key in keys]
        train_inputs = cached_features(
            train_inputs, kept / f"train-{candidates}x{view.size}-last{len(captioner.adapter.blocks)}.features", keys,
            lambda frames: captioner.block_outputs(frames.to(device)).cpu(), args.batch_size * args.frames,
        )  # fmt: skip
    examples = data.Examples(splits["train"], train_inputs, tokenizer, args.frames, args.captions_per_clip, args.seed,
                             lm.config.eos_id)  # fmt: skip
    if examples.cut:
        print(f"captions: {examples.cut} of the training clips' are longer than {LONGEST} tokens and are cut")
    val_frames = frames_of("val", args.frames)
    test_frames = frames_of("test", args.frames)  # now, lest a clip that cannot be decoded is found when all is trained
    val_references = {c.id: list(c.captions) for c in splits["val"]}

    # 5. The optimizer, and where to begin.
    trained = captioner.trained()
    optimizer = torch.optim.AdamW(trained.values(), args.lr, betas=(0.9, 0.98), weight_decay=args.weight_decay)
    first, best = 0, -1.0

    def log(row: dict) -> None:
        with open(out / "log.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    def save(which: str, step: int, with_state: bool) -> None:
        state = {"optimizer": optimizer.state_dict(), "step": step, "best": best} if with_state else None
        save_folder(out / which, captioner, hashes | {"step": str(step), "adapter": json.dumps(asdict(shape))}, state)

    if resumed:
        captioner.load(out / "last" / "adapter.safetensors")
        first, best = load_state(out / "last" / "state.pt", optimizer, device)
        keep_rows(out / "log.jsonl", first)
        print(f"going on after step {first}")
    else:
        out.mkdir(parents=True, exist_ok=True)
        try:
            open(out / "config.json", "x").close()  # only one of two runs that begin at once gets the folder
        except FileExistsError as error:
            raise InputError(f"{out}: holds a run already; --out names another folder") from error
        write_json(out / "config.json", {
            "flags": {k: v for k, v in vars(args).items() if k != "resume"}, "adapter": asdict(shape), "sha256": hashes,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "av": av.__version__},
            "splits": counts, "differences": corpus.differences(), "seed": args.seed,
        })  # fmt: skip
        save("last", 0, with_state=True)

    # 6. The loop.
    batches = data.order(counts["train"], args.batch_size, args.epochs, args.seed, first)
    validate_every = steps_an_epoch * args.eval_every
    step, since, reported = first, time.monotonic(), first
    interrupted = note_interrupts()  # between two steps the run can be gone on with to the bit; inside one it cannot
    for frames, targets in data.ahead(lambda batch: data.collate([examples[key] for key in batch]), batches):
        lr = learning_rate(step, steps, args.warmup, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        total, count = captioner(frames.to(device), targets.to(device))
        loss = total / count
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        step += 1

        report, validate = (step % every == 0 or step == steps for every in (args.log_every, validate_every))
        if (report or validate) and not math.isfinite(loss.item()):
            raise InputError(f"step {step}: the loss is {loss.item()}; a lower --lr helps, {out}/last is as it was")

        if report:
            now = time.monotonic()
            speed = (step - reported) * args.batch_size / (now - since)
            left = (steps - step) * args.batch_size / speed
            row = {"step": step, "loss": loss.item(), "lr": lr, "clips/s": speed}
            if captioner.adapter is not None:
                row["gates"] = captioner.adapter.mean_gates.tolist()
            log(row)
            print(f"step {step}/{steps}  loss {row['loss']:.3f}  lr {lr:.1e}  {speed:.0f} clips/s  "
                  f"elapsed {cli.clock(now - begun)}  left {cli.clock(left)}", flush=True)  # fmt: skip
            since, reported = now, step

        if validate:
            pause = time.monotonic()
            captioner.eval()
            captions = dict(zip(val_references, caption_split(captioner, val_frames, args.batch_size), strict=True))
            captioner.train()
            scores, _ = score_captions(args.dataset, val_references, captions, ("BLEU", "ROUGE_L", "CIDEr"))
            log({"step": step, "val": scores})
            print(f"val at step {step}: {table(scores)}", flush=True)
            if scores["CIDEr"] > best:
                best = scores["CIDEr"]
                save("best", step, with_state=False)
            save("last", step, with_state=True)
            since += time.monotonic() - pause

        if interrupted:
            save("last", step, with_state=True)
            print(f"\nstopped after step {step}; --resume {out} goes on")
            raise KeyboardInterrupt
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)

    # 7. The test split, once, with the weights that validated best.
    captioner.load(out / "best" / "adapter.safetensors")
    captioner.eval()
    said = caption_split(captioner, test_frames, args.batch_size)
    captions = dict(zip((c.id for c in splits["test"]), said, strict=True))
    references = {c.id: list(c.captions) for c in splits["test"]}
    scores, signature = score_captions(args.dataset, references, captions)
    signature += f"|{corpus.label('test')}"
    log({"step": step, "test": scores})
    write_json(out / "test.json", {"scores": scores, "signature": signature, "captions": captions})
    for clip in splits["test"][:5]:
        print(f"\n{clip.path}\n  says       {captions[clip.id]}\n  reference  {clip.captions[0]}")
    print(f"\ntest: {table(scores)}\n{signature}")
    print(f"run: {out}, {cli.clock(time.monotonic() - begun)}")
    return 0


if __name__ == "__main__":
    cli.run(main)
