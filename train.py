"""Trains a captioner: `python train.py --dataset shapes`. Read it downward.

A run is a folder (`training/run.py`), and `--resume RUN` continues it bit for bit. The best checkpoint is the one with
the highest CIDEr on the validation split; the test split is scored once, after training. `torchrun --nproc-per-node 2
train.py ...` trains the same with two processes (`training/distributed.py`).

Letters: B clips of this process in a batch, T frames, S side in pixels, K captions per clip, L tokens of the longest
caption.
"""

import math
import time
from dataclasses import asdict

import torch
from torch import Tensor

from common import cli
from common.errors import InputError
from evaluate import caption_and_score, format_scores
from model import MAX_CAPTION_TOKENS, AdapterConfig, Captioner
from models import hub
from models.lm import CausalLM
from models.tokenizer import load_tokenizer
from models.vit import ViT
from models.vit_checkpoints import check_vit_config
from training import devices, distributed
from training.config import default_models, parse_args
from training.inputs import cached_inputs
from training.interrupts import deferred_interrupts
from training.optimizer import make_optimizer, set_learning_rate
from training.progress import Progress
from training.run import Run, backbone_hashes
from video_data import datasets
from video_data.batches import TrainingExamples, collate, epoch_batches, prefetch


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up, the peak until half of all steps, then half a cosine down to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * max(0, 2 * step / steps - 1)))


def load_captioner(args, device: torch.device, group: distributed.ProcessGroup) -> tuple[Captioner, dict[str, str]]:
    """The captioner that the flags describe, and the SHA-256 of its frozen backbones' files.

    Stores the names of both models in args; a hub id gets its commit.
    """
    default_vit, default_lm = default_models(args.dataset, device)
    args.vit = default_vit if args.vit is None else args.vit
    args.lm = default_lm if args.lm is None else args.lm
    with group.rank0_first():  # one process of each machine downloads
        vit_path, lm_path = hub.resolve(args.vit, check=check_vit_config), hub.resolve(args.lm, check=load_tokenizer)
    args.vit, args.lm = hub.pin_revision(args.vit, vit_path), hub.pin_revision(args.lm, lm_path)
    dtype = devices.DTYPES[args.precision]
    vit, lm = ViT.from_pretrained(vit_path, dtype, args.image_size), CausalLM.from_pretrained(lm_path, dtype)
    config = AdapterConfig(args.method, args.write_back, args.queries, args.rank, args.heads, args.last_blocks,
                           args.gate, args.query_self_attention, args.frames)  # fmt: skip
    return Captioner(vit, lm, load_tokenizer(lm_path), config).to(device), backbone_hashes(vit_path, lm_path)


def format_gates(gates: dict[str, list[float]]) -> str:
    """"gates 0.37 0.68 0.81  ", and a warning where almost every gate is saturated: then little more is learned."""
    if not gates or min(gates["gates"]) == 1:  # without a gate
        return ""
    warning = "  almost all saturated, try a lower --lr" if min(gates["saturated"]) > 0.9 else ""
    return f"gates {' '.join(f'{mean:.2f}' for mean in gates['gates'])}{warning}  "


def load_examples(args, clips: list[datasets.Clip], cache, captioner: Captioner) -> TrainingExamples:
    """The training examples, from cached frames or block outputs."""
    examples = TrainingExamples(clips, cache, captioner.tokenizer, args.frames, args.captions_per_clip, args.seed,
                                captioner.lm.config.eos_id, MAX_CAPTION_TOKENS)  # fmt: skip
    if examples.num_truncated:
        print(f"captions: {examples.num_truncated} are longer than {MAX_CAPTION_TOKENS} tokens and are truncated")
    return examples


@torch.no_grad()
def check_finite(step: int, loss: float, grad_norm: float, captioner: Captioner, batch: tuple,
                 group: distributed.ProcessGroup) -> None:  # fmt: skip
    """Raises InputError if the loss or the norm of the gradient is not finite; it names the clips that cause it."""
    if math.isfinite(loss + grad_norm):
        return
    clips, frames, labels = batch
    losses = [captioner(frames[i : i + 1], labels[i : i + 1])[0] for i in range(len(clips))]
    local = [clip for clip, clip_loss in zip(clips, losses, strict=True) if not clip_loss.isfinite()]
    names = ", ".join(sum(group.all_gather(local), [])) or "none"
    raise InputError(f"step {step}: the loss is {loss}, the norm of its gradient {grad_norm}; clips whose own loss is "
                     f"not finite: {names}; last/ is unchanged")  # fmt: skip


def main() -> int:
    # 1. Flags, processes, device
    args = parse_args()
    group = distributed.init_process_group(args.device, args.batch_size)
    device = devices.setup(args)
    torch.manual_seed(args.seed)
    start_time = time.monotonic()

    # 2. Data and model
    with group.rank0_first():
        dataset = datasets.read_dataset(args.dataset, args.data, args.shapes_sizes, args.allow_missing)
    print(dataset)
    train_clips = dataset.splits["train"]
    steps_per_epoch = len(train_clips) // args.batch_size
    if steps_per_epoch == 0:
        raise InputError(f"--batch-size {args.batch_size}: the dataset has only {len(train_clips)} training clips")
    steps = args.epochs * steps_per_epoch
    captioner, hashes = load_captioner(args, device, group)
    run = Run(args.out, group, hashes)
    if args.resume:
        run.check(asdict(captioner.config), dataset.counts(), args.data)
    print(captioner.parameter_table())
    if args.compile:
        captioner.compile_blocks()
    with group.rank0_first():  # one process of each machine decodes
        inputs = cached_inputs(args, dataset, captioner, hashes, device)
    examples = load_examples(args, train_clips, inputs["train"], captioner)

    def load_batch(batch: list[tuple[int, int]]) -> tuple[list[str], Tensor, Tensor]:
        """This process's share of a batch of (clip, epoch): ids, frames (B, T, 3, S, S), labels (B, K, L)."""
        local_batch = group.shard(batch)
        return [train_clips[clip].id for clip, _ in local_batch], *collate([examples[key] for key in local_batch])

    # 3. Optimizer, and the step to start from
    trained = captioner.trained()
    optimizer = make_optimizer(trained, args.lr_scaling, args.weight_decay)
    step, best_cider = 0, -1.0
    if args.resume:
        step, best_cider = run.resume(captioner, optimizer, args, steps, device)
        print(f"resuming after step {step}")
    else:
        run.create(captioner, optimizer, args, dataset)
    group.broadcast(trained.values())

    # 4. The loop
    batches = prefetch(load_batch, epoch_batches(len(train_clips), args.batch_size, args.epochs, args.seed, step))
    progress = Progress(step, steps, args.batch_size, start_time)
    with deferred_interrupts(repeatable=group.world_size > 1, compiling=args.compile) as interrupts:
        for clips, frames, labels in batches:
            lr = learning_rate(step, steps, args.warmup, args.lr)
            set_learning_rate(optimizer, lr)

            frames, labels = frames.to(device), labels.to(device)
            loss_sum, tokens = captioner(frames, labels)
            tokens = group.all_reduce(tokens)  # the loss is a mean over the tokens of all processes
            optimizer.zero_grad(set_to_none=True)
            (loss_sum / tokens).backward()
            group.all_reduce_gradients(trained.values())
            grad_norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0).item()
            loss = group.all_reduce(loss_sum.item() / tokens)
            check_finite(step + 1, loss, grad_norm, captioner, (clips, frames, labels), group)
            optimizer.step()
            step += 1

            if step % args.log_every == 0 or step == steps:
                speed, timing = progress.update(step)
                gates = {} if captioner.adapter is None else captioner.adapter.gate_statistics()
                run.log({"step": step, "loss": loss, "lr": lr, "clips/s": speed} | gates)
                print(f"step {step}/{steps}  loss {loss:.3f}  lr {lr:.1e}  {format_gates(gates)}{timing}", flush=True)

            validate = step % (steps_per_epoch * args.eval_every) == 0 or step == steps
            if validate:
                with progress.paused():
                    _, scores, _ = caption_and_score(captioner, dataset, "val", inputs["val"], args.batch_size, group,
                                                     ("BLEU", "ROUGE_L", "CIDEr"))  # fmt: skip
                    run.log({"step": step, "val": scores})
                    print(f"val at step {step}: {format_scores(scores)}", flush=True)
                    if scores["CIDEr"] > best_cider:
                        best_cider = scores["CIDEr"]
                        run.save("best", captioner, step)

            stop = group.all_reduce(len(interrupts)) > 0
            if validate or stop or step % args.save_every == 0:
                run.save("last", captioner, step, optimizer, best_cider)
            if stop:
                group.barrier()  # torchrun ends all processes when one has ended
                print(f"\nstopped after step {step}; --resume {run.folder} continues")
                raise KeyboardInterrupt

    # 5. The test split, once, with the best weights
    run.load_best(captioner)
    captions, scores, signature = caption_and_score(captioner, dataset, "test", inputs["test"], args.batch_size, group)
    run.log({"step": step, "test": scores})
    run.finish(scores, signature, captions)
    for clip in dataset.splits["test"][:5]:
        print(f"\n{clip.path}\n  caption    {captions[clip.id]}\n  reference  {clip.captions[0]}")
    print(f"\ntest: {format_scores(scores)}\n{signature}")
    print(f"run: {run.folder}, {cli.format_seconds(time.monotonic() - start_time)}")
    group.destroy()
    return 0


if __name__ == "__main__":
    cli.run(main, distributed.should_report_error)
