"""Trains a captioner: `python train.py --dataset shapes`. Read it downward.

A run is a folder (`training/run.py`), and `--resume RUN` continues it bit for bit. The best checkpoint is the one with
the highest CIDEr on the validation split after any training; the test split is scored once, at the end. `torchrun
--nproc-per-node 2 train.py ...` trains the same with two processes (`training/distributed.py`).

Shapes: frames (B, T, 3, S, S) or features (B, T, ...), labels (B, K, L), times (B, T + 1); see `Batch` in
video_data/batches.py.
"""

import math
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from common import cli
from common.cli import Progress
from common.config import Config, parse_args
from common.errors import InputError
from evaluate import caption_and_score, format_scores, make_captioner
from model import MAX_CAPTION_TOKENS, Captioner, variant_of
from models.lm import CausalLM
from report.curves import draw_run
from report.page import report_split
from training import devices, distributed
from training.frozen_models import fingerprint_models, resolve_models, with_default_models
from training.inputs import cached_inputs
from training.optimizer import make_optimizer, set_learning_rate
from training.phases import Loss, Phase, make_phases
from training.plan import count_steps, format_plan, format_steps
from training.run import Run, check_models, check_out, data_differences
from video_data import shapes
from video_data.annotations import Clip
from video_data.batches import Batch, ClipCache, TrainingExamples, epoch_batches, prefetch
from video_data.datasets import read_dataset

MEASURED_CLIPS = 16  # at most, of the first batch, give the adapter's channel statistics
LOG_EVERY, SAVE_EVERY = 20, 200  # steps


def accumulate_gradients(captioner: Captioner, batch: Batch, compute_loss: Loss, total: int,
                         micro_batch_size: int | None) -> Tensor:
    """Adds the gradient of a batch's loss, its sum / total, one micro-batch after another.

    Returns the loss, still on the device. Only one micro-batch is in the device's memory at once.
    """
    device, size = next(captioner.parameters()).device, micro_batch_size or len(batch.frames)
    value = torch.zeros((), device=device)
    for i in range(0, len(batch.frames), size):
        # The labels stay on the CPU, where their positions are found without waiting for a GPU.
        part = Batch(*(x if x is None else x[i : i + size] for x in batch))
        part = part._replace(frames=part.frames.to(device, non_blocking=True))
        loss = compute_loss(captioner, part) / total
        loss.backward()
        value += loss.detach()
    return value


def log_step(run: Run, captioner: Captioner, progress: Progress, phase: Phase, step: int, loss: float,
             lr: float) -> None:
    """A row of the log and a line on the console."""
    speed, left = progress.update(step)
    speed *= captioner.config.batch_size
    has_gates = captioner.adapter is not None and captioner.config.gate != "none"
    statistics = captioner.adapter.gate_statistics() if has_gates else {}
    run.log({"step": step, "phase": phase.name, "loss": loss, "lr": lr, "clips/s": speed} | statistics)
    gates = " ".join(["gates", *(f"{mean:.2f}" for mean in statistics["gates"])]) if has_gates else ""
    print(f"{phase.name}: step {step}/{phase.end}  loss {loss:.3f}  lr {lr:.1e}  {gates}  {speed:.2f} clips/s  "
          f"elapsed {cli.format_seconds(run.elapsed())}  left {cli.format_seconds(left)}")


def eval_batch_size(config: Config, group: distributed.ProcessGroup) -> int:
    """How many clips all processes caption at once: not more than they train on at once."""
    return min(config.batch_size, group.world_size * (config.micro_batch_size or config.batch_size))


def validate(captioner: Captioner, dataset, cache, group: distributed.ProcessGroup, run: Run, step: int) -> float:
    """Scores the validation split, greedily; all captions go into RUN/val/STEP.json, two are printed. Returns CIDEr."""
    result = caption_and_score(captioner, dataset, "val", cache, eval_batch_size(captioner.config, group), group,
                               ("BLEU", "ROUGE_L", "CIDEr"))
    run.log({"step": step, "val": result.scores})
    run.save_captions(f"val/{step}.json", result)
    print(f"val at step {step}: {format_scores(result.scores)}")
    for clip in dataset.splits["val"][:2]:
        print(f"  {clip.id}: {result.captions[clip.id]}")
    return result.scores["CIDEr"]


def score_test(captioner: Captioner, dataset, cache, group: distributed.ProcessGroup, run: Run, step: int) -> None:
    """Scores the test split with --beams; all captions go into RUN/test.json and RUN/report.html, five are printed with
    a reference."""
    config = captioner.config
    result = caption_and_score(captioner, dataset, "test", cache, eval_batch_size(config, group), group,
                               beams=config.beams)
    run.log({"step": step, "test": result.scores})
    run.save_captions("test.json", result)
    for clip in dataset.splits["test"][:5]:
        print(f"\n{clip.path}\n  caption    {result.captions[clip.id]}\n  reference  {clip.captions[0]}")
    print(f"\ntest: {format_scores(result.scores)}\n{result.signature}")
    if group.rank == 0:
        report_split(run.folder / "report.html", run.folder, captioner, dataset, "test", cache, result)
    words, python = shlex.quote(str(run.folder)), shlex.quote(sys.executable.removeprefix(f"{Path.cwd()}/"))
    print(f"run: {words}, {cli.format_seconds(run.elapsed())}\n"
          f"look at its captions:  {words}/report.html\n"
          f"caption your videos:   {python} evaluate.py {words} --video FILE")
    if step and len(config.epochs) == 1:
        print(f"train it longer:       {python} train.py --resume {words} --epochs {2 * config.epochs[0]}")


def compile_blocks(lm: CausalLM, device: torch.device) -> None:
    """Compiles the blocks of the language model when they first run. Raises InputError if nothing can be compiled."""
    probe = torch.nn.SiLU()
    for module in (probe, *lm.blocks):
        module.compile(dynamic=True)
    try:
        probe(torch.zeros(8, device=device))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--compile: expected a compiler that PyTorch can use; {reason}") from error


def load_captioner(config: Config, device: torch.device,
                   group: distributed.ProcessGroup) -> tuple[Captioner, dict[str, str]]:
    """The captioner of a config on its device, and the fingerprints of its frozen models' files. Its `config` names the
    models that were found. For --plan it is on the meta device."""
    with group.first_of_machine():  # one process of each machine downloads
        config, folders = resolve_models(with_default_models(config, device))
    captioner = make_captioner(config, folders)
    if config.compile and not config.plan:
        compile_blocks(captioner.lm, device)
    return (captioner, {}) if config.plan else (captioner.to(device), fingerprint_models(folders))


def backward_and_step(captioner: Captioner, optimizer: torch.optim.Optimizer, step: int, batch: Batch,
                      compute_loss: Loss, group: distributed.ProcessGroup) -> float:
    """Step number `step` + 1 of training, on this process's share of a batch. Returns the loss of the whole batch.

    Raises InputError, before the weights change, if the loss or the norm of its gradient is not finite.
    """
    config = captioner.config
    trained = [parameter for param_group in optimizer.param_groups for parameter in param_group["params"]]
    # Seeds --token-dropout and samples: others in each step and process, the same in a run resumed with as many.
    torch.manual_seed((config.seed * 2**20 + step) * 2**10 + group.rank)
    total = group.all_reduce(compute_loss.terms(batch))  # the loss is a mean over the terms of all processes
    optimizer.zero_grad(set_to_none=True)
    loss = accumulate_gradients(captioner, batch, compute_loss, total, config.micro_batch_size)
    group.all_reduce_gradients(trained)
    grad_norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
    loss, grad_norm = torch.stack([loss, grad_norm]).tolist()  # the only time that a step waits for a GPU
    loss = group.all_reduce(loss)
    if not math.isfinite(loss + grad_norm):
        raise InputError(f"step {step + 1}: the loss is {loss}, its gradient's norm {grad_norm}; last/ is unchanged")
    optimizer.step()
    return loss


def make_examples(captioner: Captioner, clips: list[Clip], cache: ClipCache | None) -> TrainingExamples:
    """The training examples of a run; says how many captions are truncated."""
    config, eos_id = captioner.config, captioner.lm.config.eos_id
    rows = captioner.vit.num_steps(config.frames) if config.cache_features else config.frames  # of a clip in the cache
    examples = TrainingExamples(clips, cache, captioner.tokenizer, rows, config.captions_per_clip, config.seed, eos_id,
                                MAX_CAPTION_TOKENS)
    if examples.num_truncated:
        print(f"captions longer than {MAX_CAPTION_TOKENS} tokens, which are truncated: {examples.num_truncated}")
    return examples


def measure_channels(captioner: Captioner, examples: TrainingExamples) -> None:
    """Gives the adapter, if there is one, its channel statistics, from the same clips in every process."""
    config = captioner.config
    if captioner.adapter is not None:
        first_batch = next(epoch_batches(len(examples.captions), config.batch_size, 1, config.seed))
        frames = examples.read(first_batch[:MEASURED_CLIPS]).frames
        captioner.measure_channels(frames.to(captioner.prefix_scale.device))


def main() -> int:
    # 1. Flags, processes, device
    start_time = time.monotonic()
    config = parse_args()
    variant_of(Captioner, config)  # refuses an unknown one before any work
    if not (config.plan or config.resume):
        check_out(config.out)
    group = distributed.init_process_group(config.device, config.batch_size)
    device = devices.select_device(config.device, config.plan)
    # A path is absolute in the run's folder: from wherever it is resumed, it means the same data.
    config = replace(config, data=config.data.absolute(), precision=devices.select_precision(config, device))
    print(f"device: {device}, {torch.get_num_threads()} threads; frozen weights in {config.precision}")
    devices.keep_freed_memory()
    torch.manual_seed(config.seed)

    # 2. Data and model
    with group.first_of_machine():
        if config.dataset == "shapes" and not config.resume:
            shapes.make_dataset(config.data)
        dataset = read_dataset(config.dataset, config.data, config.allow_missing)
    if config.resume and (different := data_differences(config.resume, dataset)):
        lines = "; ".join(f"{split}: {line}" for split, line in different.items())
        raise InputError(f"{config.data}: expected the same ids, captions and sizes of videos as the run; {lines}")
    clips = dataset.splits["train"]
    steps = count_steps(config, len(clips))
    print(f"{dataset}\n{format_steps(config, steps, sum(len(clip.captions) for clip in clips))}")
    captioner, fingerprints = load_captioner(config, device, group)
    config = captioner.config
    print(captioner.parameter_table())
    if config.plan:
        print(format_plan(config, dataset, captioner, device, MAX_CAPTION_TOKENS + 1, group.world_size))
        return group.destroy()
    if config.resume:
        check_models(config.resume, fingerprints)
        draw_run(config.resume, 0)  # the page of a damaged log would fail after training
    with group.first_of_machine():  # stores frames and, with --cache-features, the frozen ViT's outputs on the disk
        inputs = cached_inputs(config, dataset, captioner, fingerprints)
    examples = make_examples(captioner, clips, inputs.get("train"))
    phases = make_phases(config, steps, captioner, clips, examples.captions) if steps else []

    def load_batch(keys: list[tuple[int, int]]) -> Batch:
        """This process's share of a batch of (clip, epoch)."""
        batch = examples.read(group.shard(keys))
        if device.type == "cuda":
            batch = batch._replace(frames=batch.frames.pin_memory())  # is copied to the GPU while the GPU computes
        return batch

    # 3. Optimizer, and the step to start from
    optimizer = make_optimizer(captioner.trained(), config.weight_decay) if steps else None
    run = Run(config.out, group, start_time)  # with --resume, `out` is that folder
    step, best_cider = 0, -1.0  # the untrained weights of step 0 never become the best
    if config.resume:
        step, best_cider = run.resume(captioner, optimizer, steps, device)
        print(f"resuming after step {step}")
    else:
        measure_channels(captioner, examples)
        run.create(captioner, optimizer, dataset, fingerprints)
    group.broadcast(captioner.checkpoint_tensors().values())

    # 4. The loop
    order = epoch_batches(len(clips), config.batch_size, sum(config.phase_epochs), config.seed, step) if steps else ()
    per_epoch = max(1, steps // sum(config.phase_epochs))
    # Also where the captions end: their rate is zero there, and the phase of CIDEr may lead to worse weights.
    validation_steps = {steps, *(phase.end for phase in phases if phase.name == "captions"),
                        *range(per_epoch * (config.phase_epochs[0] + config.eval_every), steps,
                               per_epoch * config.eval_every)}
    if step == 0:
        validate(captioner, dataset, inputs["val"], group, run, step)
    progress = Progress(steps, step)
    with cli.deferred_interrupts(repeatable=group.world_size > 1) as interrupts:
        for batch in prefetch(load_batch, order):
            phase = next(phase for phase in phases if step < phase.end)  # words, captions or CIDEr
            if progress.total != phase.end:  # the time left is that of a phase: a step takes longer in the next one
                progress = Progress(phase.end, step)
            lr = phase.learning_rate(step)
            set_learning_rate(optimizer, lr)
            loss = backward_and_step(captioner, optimizer, step, batch, phase.loss, group)
            step += 1

            if step % LOG_EVERY == 0 or step == steps:
                log_step(run, captioner, progress, phase, step, loss, lr)
            if step in validation_steps:
                cider = validate(captioner, dataset, inputs["val"], group, run, step)
                progress.restart(step)
                if cider > best_cider:
                    best_cider = cider
                    run.save_best(captioner)
            stop = group.all_reduce(len(interrupts)) > 0
            if step in validation_steps or stop or step % SAVE_EVERY == 0:
                run.save_last(captioner, step, optimizer, best_cider)
            if stop:
                group.barrier()  # torchrun ends all processes when one has ended
                print(f"\nstopped after step {step}; --resume {run.folder} continues")
                raise KeyboardInterrupt

    # 5. The test split, once, with the best weights
    run.load_best(captioner)
    score_test(captioner, dataset, inputs["test"], group, run, step)
    return group.destroy()


if __name__ == "__main__":
    cli.run(main)
