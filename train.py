"""Trains a captioner: `python train.py --dataset shapes`. Read it downward.

A run is a folder (`runs.py`), with which `--resume RUN` goes on to the bit. The best checkpoint is the one with the
highest CIDEr on the validation split; the test split is read once, after training. `torchrun --nproc-per-node 2
train.py ...` trains the same with two processes (`parallel.py`).
"""

import json
import math
import os
import platform
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

import cli
import corpora
import data
import devices
import flags
import hub
import parallel
import published
import runs
from cache import cached_features, cached_frames, frame_keys
from evaluate import caption_split, score_captions, table
from lm import CausalLM
from model import LONGEST, AdapterConfig, Captioner
from tokens import load_tokenizer
from vit import ViT
from vit_public import check_vit
from weights import InputError, read_json, sync_folder

CANDIDATES = 16  # frames kept of each training clip; a step draws T of them


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


def note_interrupts(patient: bool) -> list[int]:
    """From here on a first Ctrl-C or SIGTERM is noted in the list returned; a second one interrupts at once, unless
    `patient`: torchrun sends a signal that its processes have had from the terminal already."""
    noted: list[int] = []

    def note(number: int, _) -> None:
        noted.append(number)
        if not patient:
            signal.signal(number, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return noted


@torch.no_grad()
def not_finite(captioner: Captioner, clips: list[str], frames: Tensor, targets: Tensor) -> list[str]:
    """Which of a batch's clips have a loss of their own that is not finite."""
    losses = [captioner(frames[i : i + 1], targets[i : i + 1])[0] for i in range(len(clips))]
    return [clip for clip, loss in zip(clips, losses, strict=True) if not loss.isfinite()]


def main() -> int:
    # 1. The flags, of this command or of the run that goes on; which of several processes this is; and the device.
    args = flags.parse()
    resumed = args.resume
    if resumed:
        args = flags.of_run(sys.argv[1:])
    ranks = parallel.join(args.device)
    out = args.out = Path(args.out or f"runs/{args.dataset}-{args.method}")
    if (out / "config.json").exists() and not resumed:
        raise InputError(f"{out}: holds a run already; --resume {out} goes on with it, --out names another folder")
    if not os.access(next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists()),
                     os.W_OK | os.X_OK):  # fmt: skip
        raise InputError(f"--out {out}: cannot be written to")
    device, why = devices.pick_device(args.device)
    args.precision, why_so = devices.pick_precision(args.precision, device, frozen=args.method != "full")
    dtype = devices.DTYPES[args.precision]
    print(f"device: {device} ({why}), {torch.get_num_threads()} threads; "
          f"frozen weights in {args.precision} ({why_so}), trained ones in fp32")  # fmt: skip
    if args.compile:
        devices.compiler_for(device)
    if args.batch_size < ranks.count:
        raise InputError(f"--batch-size {args.batch_size}: expected one at least for each of {ranks.count} processes")
    devices.keep_freed_memory()
    args.data = root = args.data or Path("data") / args.dataset
    torch.manual_seed(args.seed)
    begun = time.monotonic()

    # 2. The data: which clips there are and what is said of them.
    with ranks.one_first():
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
    usual = flags.backbones(args.dataset, device)
    args.vit, args.lm = (usual[0] if args.vit is None else args.vit), (usual[1] if args.lm is None else args.lm)
    with ranks.one_first():
        vit_path, lm_path = hub.local(args.vit, check=check_vit), hub.local(args.lm, check=load_tokenizer)
    args.vit, args.lm = hub.pinned(args.vit, vit_path), hub.pinned(args.lm, lm_path)
    vit = ViT.from_pretrained(vit_path, dtype, args.image_size)
    tokenizer, lm = load_tokenizer(lm_path), CausalLM.from_pretrained(lm_path, dtype)
    shape = AdapterConfig(args.method, args.reading, args.queries, args.rank, args.heads, args.last_blocks, args.gate,
                          args.talk, args.frames)  # fmt: skip
    captioner = Captioner(vit, lm, tokenizer, shape).to(device)
    check_trained(captioner)
    if args.cache_features and (args.method, args.reading) != ("qadapter", "read"):
        raise InputError("--cache-features: only --method qadapter with --reading read leaves the ViT's work as it is")
    hashes = runs.backbone_hashes(vit_path, lm_path)
    if resumed:
        config, where = read_json(out / "config.json"), out / "config.json"
        runs.check_checkpoint(runs.checkpoint(out, "last"), hashes, runs.adapter_config(config, where))
        if config.get("splits") != counts:
            raise InputError(f"{root}: holds {counts}, the run was trained on {config.get('splits')}")
    print(parameter_table(captioner))
    if args.compile:
        captioner.compile_blocks()

    # 4. Frames, decoded once, and batches.
    kept, view = corpora.kept_in(args.cache, args.dataset, root), vit.pixels

    def frames_of(split: str, count: int) -> np.ndarray:
        path = kept / f"{split}-{count}x{view.size}.frames"
        return cached_frames(splits[split], path, count, view, args.workers)

    candidates = max(CANDIDATES, 2 * args.frames)
    with ranks.one_first():
        keys = frame_keys(splits["train"], candidates, view)  # first: a file that changes from here on is found out
        train_inputs = frames_of("train", candidates)
        if args.cache_features:
            name = f"train-{candidates}x{view.size}-last{len(captioner.adapter.blocks)}.features"
            keys = [json.dumps([hashes, args.precision, captioner.adapter.first, key]) for key in keys]
            train_inputs = cached_features(
                train_inputs, kept / name, keys, lambda frames: captioner.block_outputs(frames.to(device)).cpu(),
                args.batch_size * args.frames,
            )  # fmt: skip
        val_frames = frames_of("val", args.frames)
        test_frames = frames_of("test", args.frames)  # now: a clip that cannot be decoded must not be found at the end
    examples = data.Examples(splits["train"], train_inputs, tokenizer, args.frames, args.captions_per_clip, args.seed,
                             lm.config.eos_id)  # fmt: skip
    if examples.cut:
        print(f"captions: {examples.cut} of the training clips' are longer than {LONGEST} tokens and are cut")
    val_references = {c.id: list(c.captions) for c in splits["val"]}

    def say(frames: np.ndarray) -> list[str]:
        """A caption for each clip of a split; every rank makes its share of them."""
        captioner.eval()
        said = caption_split(captioner, ranks.share(frames), max(1, args.batch_size // ranks.count))
        captioner.train()
        return ranks.gather(said)

    # 5. The optimizer, and where to begin.
    trained = captioner.trained()
    optimizer = torch.optim.AdamW(trained.values(), args.lr, betas=(0.9, 0.98), weight_decay=args.weight_decay,
                                  fused=True)  # fmt: skip
    first, best = 0, -1.0

    def log(row: dict) -> None:
        if ranks.rank == 0:
            runs.add_row(out / "log.jsonl", row)

    def save(which: str, step: int, with_state: bool) -> None:
        if ranks.rank == 0:
            state = {"optimizer": optimizer.state_dict(), "step": step, "best": best} if with_state else None
            runs.save_checkpoint(out / which, captioner, hashes | {"step": str(step)}, state)

    if ranks.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        runs.take(out)
    ranks.wait()  # what a kill left is put in its place before another rank reads
    if resumed:
        captioner.load(runs.checkpoint(out, "last"))
        first, best = runs.load_state(out / "last" / "state.pt", optimizer, device)
        if first > steps:
            raise InputError(f"{where}: flags: make {steps} steps, {out}/last is at step {first} already")
        if ranks.rank == 0:
            runs.keep_rows(out / "log.jsonl", first)
            moved = config["flags"] | {"data": str(root), "cache": args.cache and str(args.cache)}
            if moved != config["flags"]:
                runs.write_json(where, config | {"flags": moved})
        print(f"going on after step {first}")
    elif ranks.rank == 0:
        if (out / "config.json").exists():
            raise InputError(f"{out}: holds a run already; --out names another folder")
        (out / "log.jsonl").unlink(missing_ok=True)
        save("last", 0, with_state=True)
        sync_folder(out.parent)
        runs.write_json(out / "config.json", {
            "flags": {k: v for k, v in vars(args).items() if k != "resume"}, "adapter": asdict(shape), "sha256": hashes,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "av": av.__version__},
            "splits": counts, "differences": corpus.differences(), "seed": args.seed,
        })  # fmt: skip
    ranks.spread(trained.values())

    # 6. The loop.
    def load(batch: list[tuple[int, int]]) -> tuple[list[str], Tensor, Tensor]:
        """This rank's clips of a batch: their names, frames and captions."""
        mine = ranks.share(batch)
        return [splits["train"][clip].id for clip, _ in mine], *data.collate([examples[key] for key in mine])

    batches = data.order(counts["train"], args.batch_size, args.epochs, args.seed, first)
    validate_every = steps_an_epoch * args.eval_every
    step, since, reported = first, time.monotonic(), first
    interrupted = note_interrupts(patient=ranks.count > 1)  # from now on a run stops between two steps, not inside one
    for clips, frames, targets in data.ahead(load, batches):
        lr = learning_rate(step, steps, args.warmup, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        frames, targets = frames.to(device), targets.to(device)
        try:
            total, count = captioner(frames, targets)
        except RuntimeError:
            if args.compile and interrupted:  # the compiler that it waited for has had the signal too
                raise KeyboardInterrupt from None
            raise
        count = ranks.add(count)
        optimizer.zero_grad(set_to_none=True)
        (total / count).backward()
        ranks.add_gradients(trained.values())
        loss, norm = ranks.add(total.item() / count), torch.nn.utils.clip_grad_norm_(trained.values(), 1.0).item()
        if not math.isfinite(loss + norm):
            bad = sum(ranks.all(not_finite(captioner, clips, frames, targets)), [])
            raise InputError(f"step {step + 1}: the loss is {loss}, the gradient's norm {norm}; clips whose own loss "
                             f"is not finite: {', '.join(bad) or 'none'}; {out}/last is as it was")  # fmt: skip
        optimizer.step()
        step += 1

        report, validate, due = (step % every == 0 or step == steps
                                 for every in (args.log_every, validate_every, args.save_every))  # fmt: skip
        if report:
            now = time.monotonic()
            speed = (step - reported) * args.batch_size / (now - since)
            left = (steps - step) * args.batch_size / speed
            row = {"step": step, "loss": loss, "lr": lr, "clips/s": speed}
            if captioner.adapter is not None:
                row["gates"] = captioner.adapter.mean_gates.tolist()
            log(row)
            print(f"step {step}/{steps}  loss {row['loss']:.3f}  lr {lr:.1e}  {speed:.0f} clips/s  "
                  f"elapsed {cli.clock(now - begun)}  left {cli.clock(left)}", flush=True)  # fmt: skip
            since, reported = now, step

        if validate:
            pause = time.monotonic()
            captions = dict(zip(val_references, say(val_frames), strict=True))
            scores, _ = score_captions(args.dataset, val_references, captions, ("BLEU", "ROUGE_L", "CIDEr"))
            log({"step": step, "val": scores})
            print(f"val at step {step}: {table(scores)}", flush=True)
            if scores["CIDEr"] > best:
                best = scores["CIDEr"]
                save("best", step, with_state=False)
            since += time.monotonic() - pause

        stop = ranks.add(len(interrupted)) > 0
        if validate or due or stop:
            save("last", step, with_state=True)
        if stop:
            ranks.wait()  # torchrun ends all when one has
            print(f"\nstopped after step {step}; --resume {out} goes on")
            raise KeyboardInterrupt
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)

    # 7. The test split, once, with the weights that validated best.
    if ranks.rank == 0:
        captioner.load(runs.checkpoint(out, "best"))
    ranks.spread(trained.values())
    captions = dict(zip((c.id for c in splits["test"]), say(test_frames), strict=True))
    references = {c.id: list(c.captions) for c in splits["test"]}
    scores, signature = score_captions(args.dataset, references, captions)
    signature += f"|{corpus.label('test')}"
    log({"step": step, "test": scores})
    if ranks.rank == 0:
        runs.write_json(out / "test.json", {"scores": scores, "signature": signature, "captions": captions})
    for clip in splits["test"][:5]:
        print(f"\n{clip.path}\n  says       {captions[clip.id]}\n  reference  {clip.captions[0]}")
    print(f"\ntest: {table(scores)}\n{signature}")
    print(f"run: {out}, {cli.clock(time.monotonic() - begun)}")
    ranks.leave()
    return 0


if __name__ == "__main__":
    cli.run(main)
