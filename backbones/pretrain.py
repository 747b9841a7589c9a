"""Makes the two tiny backbones in `backbones/`: `python -m backbones.pretrain`.

The ViT learns from still images of `shapes`. At each patch it predicts the colour and kind of the shape that covers it
and where that shape's centre is, how large it is and how it is rotated; at the class token which shapes are present.

The language model learns from text and from mixed keyword embeddings (`lm_data.py`). Neither model sees a clip together
with its caption; that is left to `train.py`.

Both are written as the folder of a public model: config.json, model.safetensors (fp16), and for the ViT
preprocessor_config.json, for the language model tokenizer.model.

Letters: n images, P tokens an image, D width of the ViT, S side in pixels.
"""

import io
import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.lm_data import KEYWORDS, LMTrainingData, document
from common import cli
from common.files import replace_atomically
from common.preprocessing import Preprocessing
from models.lm import CausalLM, LMConfig
from models.names import CLIP, lm_tensor_names, tensor_names
from models.safetensors import write_safetensors
from models.vit import ViT, ViTConfig
from video_data import shapes

VIT = ViTConfig(image_size=shapes.SIDE, patch_size=16, width=128, depth=6, heads=4, mlp_width=512,
                activation="gelu", norm_eps=1e-5)  # fmt: skip
# vocab is an upper limit; the model gets as many as the tokenizer has.
LM = LMConfig(vocab=480, width=160, depth=4, heads=4, kv_heads=2, head_width=40, mlp_width=448,
              rope_theta=10000.0, norm_eps=1e-5, max_positions=256, tied=True, bos_id=1, eos_id=2)  # fmt: skip
COLOURS, KINDS = list(shapes.COLOURS), list(shapes.KINDS)
NO_SHAPE = -1

# ------------------------------------------------------------------------------------ still images


def draw_still(index: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """An image (S, S, 3) uint8 and its targets.

    classes (P-1, 2): colour and kind of the shape that covers most of each patch, or -1. geometry (P-1, 5) of that
    shape: centre from the image's centre in patches, log radius, cosine and sine of the angle times the shape's
    symmetry. presence (colours * kinds,) of each shape in the image.
    """
    rng = np.random.default_rng([seed, 9, index])
    scene = shapes.draw_scene(rng)
    u = rng.uniform(0, 1, 1)
    frames, masks = shapes.render(scene, u, rng)
    size, side = VIT.patch_size, shapes.SIDE // VIT.patch_size
    share = masks[:, 0].reshape(len(scene), side, size, side, size).mean((2, 4)).reshape(len(scene), -1)
    classes = np.full((side * side, 2), NO_SHAPE, np.int64)
    geometry = np.zeros((side * side, 5), np.float32)
    presence = np.zeros((len(COLOURS), len(KINDS)), np.float32)
    for i, shape in enumerate(scene):
        covered = (share[i] > 0.05) & (share[i] == share.max(0))  # (P-1,)
        x, y, radius, angle, _ = (float(v[0]) for v in shape.state_at(u))
        colour, kind = COLOURS.index(shape.colour), KINDS.index(shape.kind)
        presence[colour, kind] = covered.any()
        rotation = angle * shapes.SYMMETRY.get(shape.kind, 0)
        classes[covered] = colour, kind
        geometry[covered] = (x / size - side / 2, y / size - side / 2, np.log(radius / 9), np.cos(rotation),
                             np.sin(rotation))  # fmt: skip
    return frames[0], classes, geometry, presence.reshape(-1)


class StillHeads(nn.Module):
    """Linear heads on the ViT's tokens, discarded after pretraining."""

    def __init__(self):
        super().__init__()
        self.colour = nn.Linear(VIT.width, len(COLOURS) + 1)
        self.kind = nn.Linear(VIT.width, len(KINDS) + 1)
        self.geometry = nn.Linear(VIT.width, 5)
        self.presence = nn.Linear(VIT.width, len(COLOURS) * len(KINDS))

    def forward(self, tokens: Tensor, classes: Tensor, geometry: Tensor, presence: Tensor) -> Tensor:
        """Tokens (n, P, D) and the targets of `draw_still` -> the loss."""
        patches, covered = tokens[:, 1:], classes[..., 0] != NO_SHAPE  # (n, P-1, D), (n, P-1)
        return (
            F.cross_entropy(self.colour(patches).flatten(0, 1), classes[..., 0].flatten() + 1)
            + F.cross_entropy(self.kind(patches).flatten(0, 1), classes[..., 1].flatten() + 1)
            + 4 * F.mse_loss(self.geometry(patches[covered]), geometry[covered])
            + 20 * F.binary_cross_entropy_with_logits(self.presence(tokens[:, 0]), presence)
        )


def train(name: str, parameters: list[nn.Parameter], compute_loss: Callable[[], Tensor], steps: int,
          peak_lr: float) -> None:  # fmt: skip
    """AdamW with warm-up and cosine decay. `compute_loss` draws a batch and returns its loss."""
    optimizer = torch.optim.AdamW(parameters, peak_lr, betas=(0.9, 0.98), weight_decay=0.05)
    start_time = time.monotonic()
    for step in range(steps):
        scale = min(1, (step + 1) / 100) * 0.5 * (1 + np.cos(np.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * scale
        loss = compute_loss()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            elapsed = cli.format_seconds(time.monotonic() - start_time)
            print(f"{name} step {step}/{steps}  loss {loss.item():.4f}  {elapsed}", flush=True)


def pretrain_vit(folder: Path, count: int, steps: int, batch_size: int, seed: int) -> None:
    """Trains the ViT on `count` still images and writes its folder."""
    with ProcessPoolExecutor() as pool:
        columns = zip(*pool.map(partial(draw_still, seed=seed), range(count), chunksize=500), strict=True)
        images, *targets = (torch.from_numpy(np.stack(column)) for column in columns)
    images = images.permute(0, 3, 1, 2).contiguous()  # (count, 3, S, S)
    mean, std = [0.3] * 3, [0.2] * 3
    preprocessing = Preprocessing(VIT.image_size, VIT.image_size, mean=tuple(mean), std=tuple(std))
    vit, heads = ViT(VIT, preprocessing), StillHeads()
    nn.init.normal_(vit.position, std=0.3)  # as large as the patch embeddings, or positions are hard to learn
    for block in vit.blocks:
        nn.init.zeros_(block.attn.out.weight)
        nn.init.zeros_(block.mlp.down.weight)
    generator = torch.Generator().manual_seed(seed)

    def compute_loss() -> Tensor:
        rows = torch.randint(count, (batch_size,), generator=generator)
        tokens = vit.post_norm(vit(vit.normalize(images[rows])))  # (n, P, D)
        return heads(tokens, *(target[rows] for target in targets))

    train("vit", [*vit.parameters(), *heads.parameters()], compute_loss, steps, peak_lr=1e-3)
    config = {
        "architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "hidden_act": VIT.activation,
        "hidden_size": VIT.width, "image_size": VIT.image_size, "intermediate_size": VIT.mlp_width,
        "layer_norm_eps": VIT.norm_eps, "num_attention_heads": VIT.heads, "num_channels": 3,
        "num_hidden_layers": VIT.depth, "patch_size": VIT.patch_size, "torch_dtype": "float16",
    }  # fmt: skip
    preprocessor = {"image_mean": mean, "image_std": std, "size": {"shortest_edge": VIT.image_size}}
    configs = {"config.json": config, "preprocessor_config.json": preprocessor}
    save_model(folder, vit, tensor_names(vit, CLIP, "vision_model."), configs)


# ---------------------------------------------------------------------------------- language model


def train_tokenizer(texts: list[str]) -> bytes:
    """A sentencepiece BPE model in which "red circle" or "moves left" is one token: short captions, a fast demo."""
    nouns = [f"{colour} {kind}" for colour in COLOURS for kind in KINDS]
    verbs = [phrase for pairs in shapes.MOTIONS.values() for pair in pairs for phrase in pair]
    symbols = ["\u2581" + words.replace(" ", "\u2581") for words in [*nouns, *verbs, *KEYWORDS]]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=LM.vocab,
        user_defined_symbols=symbols,
        byte_fallback=True, character_coverage=1.0, hard_vocab_limit=False, minloglevel=2,
        pad_id=-1, unk_id=0, bos_id=LM.bos_id, eos_id=LM.eos_id, num_threads=1,
    )  # fmt: skip
    return model.getvalue()


def pretrain_lm(folder: Path, count: int, steps: int, batch_size: int, seed: int) -> None:
    """Trains tokenizer and language model on `count` documents and as many captions, and writes their folder."""
    rng = np.random.default_rng([seed, 8])
    documents = [document(rng) for _ in range(count)]
    tokenizer_model = train_tokenizer([" ".join(parts) for parts in documents[:20000]])
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model)
    lm = CausalLM(replace(LM, vocab=tokenizer.vocab_size()))
    nn.init.normal_(lm.embed.weight, std=0.05)  # also the weight of the head
    for block in lm.blocks:  # each block starts as the identity
        nn.init.zeros_(block.attn.o.weight)
        nn.init.zeros_(block.down.weight)
    data, num_documents = LMTrainingData(tokenizer, documents, rng, seed), max(1, batch_size // 4)

    def compute_loss() -> Tensor:
        document_loss = data.document_loss(lm, num_documents)
        caption_loss = data.caption_loss(lm, batch_size - num_documents)
        return (document_loss + 3 * caption_loss) / 4

    train("lm", list(lm.parameters()), compute_loss, steps, peak_lr=4e-3)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": lm.config.vocab, "hidden_size": LM.width, "num_hidden_layers": LM.depth,
        "num_attention_heads": LM.heads, "num_key_value_heads": LM.kv_heads,
        "head_dim": LM.head_width, "intermediate_size": LM.mlp_width,
        "rope_theta": LM.rope_theta, "rms_norm_eps": LM.norm_eps,
        "max_position_embeddings": LM.max_positions, "tie_word_embeddings": LM.tied,
        "bos_token_id": LM.bos_id, "eos_token_id": LM.eos_id, "attention_bias": False,
        "mlp_bias": False, "rope_scaling": None, "torch_dtype": "float16",
    }  # fmt: skip
    save_model(folder, lm, lm_tensor_names(lm), {"config.json": config})
    with replace_atomically(folder / "tokenizer.model") as file:
        file.write(tokenizer_model)


# -------------------------------------------------------------------------------- the command line


def save_model(folder: Path, module: nn.Module, names: dict[str, str], configs: dict[str, dict]) -> None:
    """Writes the folder of a public model: the tensors in fp16 under their public names, and JSON files."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {names[name]: tensor.half() for name, tensor in module.state_dict().items()}
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    for name, config in configs.items():
        with replace_atomically(folder / name) as file:
            file.write((json.dumps(config, indent=2) + "\n").encode())
    print(f"{folder}: {sum(p.numel() for p in module.parameters()):,} parameters")


def main() -> None:
    parser = cli.Parser("Makes the two tiny backbones.")
    parser.add_argument("--out", type=Path, default=Path("backbones"), help="where the two folders are written")
    parser.add_argument("--only", choices=["vit", "lm"], help="make one of the two")
    parser.add_argument("--seed", type=cli.at_least(0), default=0, help="of data, weights and order")
    parser.add_argument("--stills", type=cli.at_least(1), default=60_000, help="images drawn for the ViT")
    parser.add_argument("--vit-steps", type=cli.at_least(1), default=4000, help="steps of 128 images")
    parser.add_argument("--texts", type=cli.at_least(1), default=50_000, help="texts written for the language model")
    parser.add_argument("--lm-steps", type=cli.at_least(1), default=2000, help="steps of 64 texts")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)  # fail now, not after a quarter of an hour
    if args.only != "vit":
        torch.manual_seed(args.seed)
        pretrain_lm(args.out / "tiny-lm", args.texts, args.lm_steps, 64, args.seed)
    if args.only != "lm":
        torch.manual_seed(args.seed)
        pretrain_vit(args.out / "tiny-vit", args.stills, args.vit_steps, 128, args.seed)


if __name__ == "__main__":
    cli.run(main)
