"""Trains a captioner: `python train.py --dataset shapes`. Read it downward.

A run is a folder (`training/run.py`), and `--resume RUN` continues it bit for bit. The best checkpoint is the one with
the highest CIDEr on the validation split; the test split is scored once, after training. `torchrun --nproc-per-node 2
train.py ...` trains the same with two processes (`training/distributed.py`).

Letters: B clips of this process in a batch, T frames, S side in pixels, K captions per clip, L tokens of the longest
caption.
"""

import math
import shlex
import time
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import Tensor

from common import cli
from common.errors import InputError, error_prefix, explain_out_of_memory
from evaluate import caption_and_score, format_scores
from model import MAX_CAPTION_TOKENS, AdapterConfig, Captioner
from models.generation import make_generation_config
from report.build import report_split
from training import devices, distributed
from training.config import fill_models, parse_args
from training.frozen_models import backbone_hashes, load_meta_models, load_models, resolve_models
from training.inputs import cached_inputs
from training.interrupts import deferred_interrupts
from training.optimizer import make_optimizer, set_learning_rate
from training.plan import format_plan, format_schedule, planned_dataset, schedule_run, schedule_warnings
from training.progress import Progress
from training.run import Run
from video_data import datasets
from video_data.batches import TrainingExamples, collate, epoch_batches, prefetch

MEASURED_CLIPS = 16  # give the adapter's channel statistics


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up, the peak until half of all steps, then half a cosine down to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * max(0, 2 * step / steps - 1)))


def load_captioner(args, device: torch.device, group: distributed.ProcessGroup) -> tuple[Captioner, dict[str, str]]:
    """The captioner that the flags describe, and the SHA-256 of its frozen models' files.

    Stores the names of the models in args; a hub id gets its commit. For --plan, it is on the meta device.
    """
    fill_models(args, device)
    with group.rank0_first():  # one process of each machine downloads
        folders = resolve_models(args)
    load, dtype = load_meta_models if args.plan else load_models, devices.DTYPES[args.precision]
    models = load(folders, dtype, args.image_size)
    config = AdapterConfig(**{f.name: getattr(args, f.name) for f in fields(AdapterConfig)})
    with models.vit.position.device:
        captioner = Captioner(models.vit, models.lm, models.tokenizer, config, models.mllm)
    check_beams(args, captioner)
    return (captioner, {}) if args.plan else (captioner.to(device), backbone_hashes(folders))


def check_beams(args, captioner: Captioner) -> None:
    """Raises InputError for a search on the test split that would fail after training."""
    with error_prefix(f"--beams {args.beams}"):
        make_generation_config(captioner.lm.config, captioner.prefix_length(args.frames), beams=args.beams)


def format_gates(gates: dict[str, list[float]]) -> str:
    """"gates 0.37 0.68 0.81 (0 3 0 % saturated)  ", per block, and a warning where almost every gate is saturated: then
    little more is learned."""
    if not gates:
        return ""
    means = " ".join(f"{mean:.2f}" for mean in gates["gates"])
    shares = " ".join(f"{100 * share:.0f}" for share in gates["saturated"])
    warning = "  almost all saturated, try a lower --lr" if min(gates["saturated"]) > 0.9 else ""
    return f"gates {means} ({shares} % saturated){warning}  "


def log_step(run: Run, captioner: Captioner, progress: Progress, step: int, steps: int, loss: float,
             lr: float) -> None:  # fmt: skip
    """A row of the log and a line on the console."""
    speed, timing = progress.update(step)
    has_gates = captioner.adapter is not None and captioner.config.gate != "none"
    gates = captioner.adapter.gate_statistics() if has_gates else {}
    run.log({"step": step, "loss": loss, "lr": lr, "clips/s": speed, "elapsed": progress.elapsed()} | gates)
    print(f"step {step}/{steps}  loss {loss:.3f}  lr {lr:.1e}  {format_gates(gates)}{timing}")


def make_dataset(args) -> datasets.VideoDataset:
    """The dataset of the flags; `shapes` is made if it does not exist yet."""
    return datasets.read_dataset(args.dataset, args.data, args.shapes_sizes, args.allow_missing)


def load_examples(args, clips: list[datasets.Clip], cache, captioner: Captioner) -> TrainingExamples:
    """The training examples, from cached frames or block outputs."""
    examples = TrainingExamples(clips, cache, captioner.tokenizer, args.frames, args.captions_per_clip, args.seed,
                                captioner.lm.config.eos_id, MAX_CAPTION_TOKENS)  # fmt: skip
    if examples.num_truncated:
        print(f"captions: {examples.num_truncated} are longer than {MAX_CAPTION_TOKENS} tokens and are truncated")
    return examples


def measure_channels(captioner: Captioner, examples: list, device: torch.device) -> None:
    """Gives the adapter the channel statistics of some examples, which are the same in every process."""
    frames, _ = collate(examples)
    captioner.measure_channels(frames.to(device))


def accumulate_gradients(captioner: Captioner, frames: Tensor, labels: Tensor, tokens: int,
                         micro_batch_size: int | None) -> Tensor:  # fmt: skip
    """Adds the gradient of a batch's loss, its sum over all labels / tokens, one micro-batch after another.

    -> the loss, still on the device. Only one micro-batch is in the device's memory at once.
    """
    device, size = next(captioner.parameters()).device, micro_batch_size or len(frames)
    total = torch.zeros((), device=device)
    for micro_frames, micro_labels in zip(frames.split(size), labels.split(size), strict=True):
        with explain_out_of_memory(f"a step on {len(micro_frames)} clips at once, --micro-batch-size may be smaller"):
            loss = captioner(micro_frames.to(device, non_blocking=True), micro_labels) / tokens
            loss.backward()
        total += loss.detach()
    return total


def seconds_per_step(captioner: Captioner, frames: Tensor, labels: Tensor, micro_batch_size: int | None) -> float:
    """The time of a step on this batch, without the optimizer: the second of two, since the first also warms up."""
    for _ in range(2):
        start_time = time.monotonic()
        accumulate_gradients(captioner, frames, labels, 1, micro_batch_size).item()
    return time.monotonic() - start_time


def clips_at_once(args, group: distributed.ProcessGroup) -> int:
    """How many clips all processes caption at once: not more than they train on at once."""
    return group.world_size * args.micro_batch_size if args.micro_batch_size else args.batch_size


def validate(captioner: Captioner, dataset: datasets.VideoDataset, cache, args, group: distributed.ProcessGroup,
             run: Run, step: int, progress: Progress) -> float:  # fmt: skip
    """Scores the validation split, greedily; all captions go into RUN/val/STEP.json, two are printed. -> CIDEr."""
    result = caption_and_score(captioner, dataset, "val", cache, clips_at_once(args, group), group,
                               ("BLEU", "ROUGE_L", "CIDEr"))  # fmt: skip
    run.log({"step": step, "val": result.scores, "elapsed": progress.elapsed()})
    run.save_captions(f"val/{step}.json", result.captions, result.scores, result.signature)
    print(f"val at step {step}: {format_scores(result.scores)}")
    for clip in dataset.splits["val"][:2]:
        print(f"  {clip.id}: {result.captions[clip.id]}")
    return result.scores["CIDEr"]


def score_test(captioner: Captioner, dataset: datasets.VideoDataset, cache, args, group: distributed.ProcessGroup,
               run: Run, step: int, progress: Progress) -> None:  # fmt: skip
    """Scores the test split with --beams; all captions go into RUN/test.json and RUN/report.html, five are printed with
    a reference."""
    result = caption_and_score(captioner, dataset, "test", cache, clips_at_once(args, group), group, beams=args.beams)
    run.log({"step": step, "test": result.scores, "elapsed": progress.elapsed()})
    run.save_captions("test.json", result.captions, result.scores, result.signature)
    for clip in dataset.splits["test"][:5]:
        print(f"\n{clip.path}\n  caption    {result.captions[clip.id]}\n  reference  {clip.captions[0]}")
    print(f"\ntest: {format_scores(result.scores)}\n{result.signature}")
    if group.rank == 0:
        report_split(run.folder / "report.html", run.folder, captioner, dataset, "test", cache, result)


def score_untrained(captioner: Captioner, dataset: datasets.VideoDataset, caches: dict, args,
                    group: distributed.ProcessGroup, run: Run, start_time: float) -> None:  # fmt: skip
    """`--method none`: a run of no steps, which scores the frozen models as they are; resumed, it does so again."""
    if args.resume:
        run.restart()
    else:
        run.create(captioner, None, args, dataset)
    progress = Progress(0, [0], args.batch_size, start_time, test_ratio=0)
    validate(captioner, dataset, caches["val"], args, group, run, 0, progress)
    score_test(captioner, dataset, caches["test"], args, group, run, 0, progress)
    print(f"run: {run.folder}, {cli.format_seconds(progress.elapsed())}")
    print(format_next_steps(run.folder, None))


@torch.no_grad()
def check_finite(step: int, loss: float, grad_norm: float, captioner: Captioner, batch: tuple,
                 group: distributed.ProcessGroup) -> None:  # fmt: skip
    """Raises InputError if the loss or the norm of the gradient is not finite; it names the clips that cause it."""
    if math.isfinite(loss + grad_norm):
        return
    clips, frames, labels = batch
    device = next(captioner.parameters()).device
    losses = [captioner(frames[i : i + 1].to(device), labels[i : i + 1]) for i in range(len(clips))]
    local = [clip for clip, clip_loss in zip(clips, losses, strict=True) if not clip_loss.isfinite()]
    names = ", ".join(sum(group.all_gather(local), [])) or "none"
    raise InputError(f"step {step}: the loss is {loss}, the norm of its gradient {grad_norm}; clips whose own loss is "
                     f"not finite: {names}; last/ is unchanged")  # fmt: skip


def format_next_steps(folder: Path, epochs: int | None) -> str:
    """What can be done with a finished run of so many epochs, or of none, a line each."""
    words = shlex.quote(str(folder))
    lines = [f"look at its captions:  {words}/report.html",
             f"caption your videos:   python evaluate.py {words} --video FILE"]  # fmt: skip
    if epochs is not None:
        lines.append(f"train it longer:       python train.py --resume {words} --epochs {2 * epochs}")
    return "\n".join(lines)


def main() -> int:
    # 1. Flags, processes, device
    args = parse_args()
    group = distributed.init_process_group(args.device, args.batch_size)
    device = devices.setup(args)
    torch.manual_seed(args.seed)
    start_time = time.monotonic()

    # 2. Data and model
    with group.rank0_first():
        dataset = planned_dataset(args)  # makes nothing: flags that do not fit are refused first
    print(dataset)
    schedule = schedule_run(args, dataset.splits["train"])
    steps = schedule.steps
    if args.method != "none":
        print(format_schedule(schedule, args))
    captioner, hashes = load_captioner(args, device, group)
    print(captioner.parameter_table())
    if args.plan:
        print(format_plan(args, dataset, schedule, captioner, device, MAX_CAPTION_TOKENS + 1, group.world_size))
        group.destroy()
        return 0
    run = Run(args.out, group, hashes)
    if args.resume:
        run.check(asdict(captioner.config), dataset.counts(), args.data)
    if args.compile:
        captioner.compile_blocks()
    with group.rank0_first():  # one process of each machine makes `shapes` and decodes
        if args.dataset == "shapes":
            dataset = make_dataset(args)
        inputs = cached_inputs(args, dataset, captioner, hashes, device)
    train_clips = dataset.splits["train"]
    if args.method == "none":
        score_untrained(captioner, dataset, inputs, args, group, run, start_time)
        group.destroy()
        return 0
    examples = load_examples(args, train_clips, inputs["train"], captioner)

    def load_batch(batch: list[tuple[int, int]]) -> tuple[list[str], Tensor, Tensor]:
        """This process's share of a batch of (clip, epoch): ids, frames (B, T, 3, S, S), labels (B, K, L)."""
        local_batch = group.shard(batch)
        frames, labels = collate([examples[key] for key in local_batch])
        if device.type == "cuda":
            frames = frames.pin_memory()  # is copied to the GPU while the GPU computes
        return [train_clips[clip].id for clip, _ in local_batch], frames, labels

    # 3. Optimizer, and the step to start from
    first_batch = next(epoch_batches(len(train_clips), args.batch_size, 1, args.seed))
    trained = captioner.trained()
    optimizer = make_optimizer(trained, args.lr_scaling, args.weight_decay, args.gate_lr)
    step, best_cider = 0, -1.0
    if args.resume:
        step, best_cider, elapsed = run.resume(captioner, optimizer, args, steps, device)
        start_time -= elapsed
        print(f"resuming after step {step}")
    else:
        if captioner.adapter is not None and not args.raw_channels:
            measure_channels(captioner, [examples[key] for key in first_batch[:MEASURED_CLIPS]], device)
        run.create(captioner, optimizer, args, dataset)
    group.broadcast(captioner.saved().values())

    # 4. The loop
    batches = prefetch(load_batch, epoch_batches(len(train_clips), args.batch_size, args.epochs, args.seed, step))
    steps_between = steps // args.epochs * args.eval_every
    validation_steps = [*range(steps_between, steps, steps_between), steps]
    test_ratio = args.beams * len(dataset.splits["test"]) / len(dataset.splits["val"])
    progress = Progress(step, validation_steps, args.batch_size, start_time, test_ratio)
    if step == 0:
        with progress.validation():
            validate(captioner, dataset, inputs["val"], args, group, run, step, progress)
    with deferred_interrupts(repeatable=group.world_size > 1, compiling=args.compile) as interrupts:
        if step == 0:
            with progress.paused():
                _, frames, labels = load_batch(first_batch)
                seconds = steps * seconds_per_step(captioner, frames, labels, args.micro_batch_size)
            for line in schedule_warnings(schedule.passes, seconds):
                print(f"warning: {line}")
        for clips, frames, labels in batches:
            lr = learning_rate(step, steps, args.warmup, args.lr)
            set_learning_rate(optimizer, lr)

            # Of --token-dropout: each step and process hides other tokens, and a resumed run the same ones.
            torch.manual_seed(hash((args.seed, step, group.rank)))
            tokens = group.all_reduce(int((labels >= 0).sum()))  # the loss is a mean over the tokens of all processes
            optimizer.zero_grad(set_to_none=True)
            loss = accumulate_gradients(captioner, frames, labels, tokens, args.micro_batch_size)
            group.all_reduce_gradients(trained.values())
            grad_norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            loss, grad_norm = torch.stack([loss, grad_norm]).tolist()  # the only time that a step waits for a GPU
            loss = group.all_reduce(loss)
            check_finite(step + 1, loss, grad_norm, captioner, (clips, frames, labels), group)
            optimizer.step()
            step += 1

            if step % args.log_every == 0 or step == steps:
                log_step(run, captioner, progress, step, steps, loss, lr)

            if step in validation_steps:
                with progress.validation():
                    cider = validate(captioner, dataset, inputs["val"], args, group, run, step, progress)
                if cider > best_cider:
                    best_cider = cider
                    run.save("best", captioner, step)

            stop = group.all_reduce(len(interrupts)) > 0
            if step in validation_steps or stop or step % args.save_every == 0:
                run.save("last", captioner, step, optimizer, best_cider)
            if stop:
                group.barrier()  # torchrun ends all processes when one has ended
                print(f"\nstopped after step {step}; --resume {run.folder} continues")
                raise KeyboardInterrupt

    # 5. The test split, once, with the best weights
    run.load_best(captioner)
    score_test(captioner, dataset, inputs["test"], args, group, run, step, progress)
    print(f"run: {run.folder}, {cli.format_seconds(progress.elapsed())}")
    print(format_next_steps(run.folder, args.epochs))
    group.destroy()
    return 0


if __name__ == "__main__":
    cli.run(main, distributed.should_report_error)
