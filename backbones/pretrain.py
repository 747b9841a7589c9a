"""Makes the two tiny backbones in `backbones/`: `python pretrain.py`.

The ViT learns from stills of `shapes` only: at each patch which colour and kind covers it, where that
shape's centre is, how big it is and how it is turned; at the class token which shapes are there. The
language model learns from text only: captions, captions after another telling or after notes ("circle
red left"), lists of notes told again in another order, and captions after blurred notes, in which words
run into each other. Neither meets a clip together with its caption; that is left to `train.py`.

Both are written as a public model's folder: config.json, model.safetensors (fp16), and for the ViT
preprocessor_config.json, for the language model tokenizer.model.

Letters: n images or texts, P tokens an image, D width of the ViT, S side in pixels, N positions of
blurred notes, C width of the language model.
"""

import io
import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cli
import shapes
from lm import CausalLM, LMConfig, lm_names
from model import IGNORED, PROMPT
from vit import ViT, ViTConfig, vit_names
from weights import replace_atomically, write_safetensors

VIT = ViTConfig(image_size=shapes.SIDE, patch_size=16, width=128, depth=6, heads=4, mlp_width=512,
                activation="gelu", norm_eps=1e-5)  # fmt: skip
# vocab: so many pieces at most; the model has as many as the tokenizer then finds.
LM = LMConfig(vocab=480, width=160, depth=4, heads=4, kv_heads=2, head_width=40, mlp_width=448,
              rope_theta=10000.0, norm_eps=1e-5, max_positions=256, tied=True, bos_id=1, eos_id=2)  # fmt: skip
COLOURS, KINDS = list(shapes.COLOURS), list(shapes.KINDS)
KEY_WORDS = [*COLOURS, *KINDS, *shapes.MOTIONS]  # each one piece of the tokenizer
NOTHING = -1

# ------------------------------------------------------------------------------------------ stills


def still(index: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Image (S, S, 3) uint8 and what there is to tell of it.

    Classes (P-1, 2) of the shape that covers each patch most, colour and kind (-1 where none does);
    geometry (P-1, 5) of that shape: centre from the image's centre in patches, log radius, turn as
    cosine and sine of the angle times the shape's symmetry; presence (colours * kinds,) of each shape.
    """
    rng = np.random.default_rng([seed, 9, index])
    scene = shapes.draw_scene(rng)
    u = rng.uniform(0, 1, 1)
    frames, covers = shapes.render(scene, u, rng)
    size, side = VIT.patch_size, shapes.SIDE // VIT.patch_size
    share = covers[:, 0].reshape(len(scene), side, size, side, size).mean((2, 4)).reshape(len(scene), -1)
    classes = np.full((side * side, 2), NOTHING, np.int64)
    geometry = np.zeros((side * side, 5), np.float32)
    presence = np.zeros((len(COLOURS), len(KINDS)), np.float32)
    for i, shape in enumerate(scene):
        own = (share[i] > 0.05) & (share[i] == share.max(0))
        x, y, radius, angle, _ = (float(v[0]) for v in shape.at(u))
        colour, kind = COLOURS.index(shape.colour), KINDS.index(shape.kind)
        presence[colour, kind] = own.any()
        turn = angle * shapes.SYMMETRY.get(shape.kind, 0)
        for p in np.flatnonzero(own):
            classes[p] = colour, kind
            geometry[p] = x / size - side / 2, y / size - side / 2, np.log(radius / 9), np.cos(turn), np.sin(turn)
    return frames[0], classes, geometry, presence.reshape(-1)


class StillHeads(nn.Module):
    """Linear read-outs of the ViT's tokens, thrown away after pretraining."""

    def __init__(self):
        super().__init__()
        self.colour = nn.Linear(VIT.width, len(COLOURS) + 1)
        self.kind = nn.Linear(VIT.width, len(KINDS) + 1)
        self.geometry = nn.Linear(VIT.width, 5)
        self.presence = nn.Linear(VIT.width, len(COLOURS) * len(KINDS))

    def forward(self, tokens: Tensor, classes: Tensor, geometry: Tensor, presence: Tensor) -> tuple[Tensor, dict]:
        """Tokens (n, P, D) and the targets of `still` -> loss, and figures for the log."""
        patches, covered = tokens[:, 1:], classes[..., 0] != NOTHING  # (n, P-1, D), (n, P-1)
        colour, kind, place = self.colour(patches), self.kind(patches), self.geometry(patches[covered])
        losses = [
            F.cross_entropy(colour.flatten(0, 1), classes[..., 0].flatten() + 1),
            F.cross_entropy(kind.flatten(0, 1), classes[..., 1].flatten() + 1),
            4 * F.mse_loss(place, geometry[covered]),
            20 * F.binary_cross_entropy_with_logits(self.presence(tokens[:, 0]), presence),
        ]
        right = (kind.argmax(-1) == classes[..., 1] + 1)[covered].float().mean()
        pixels = (place[:, :2] - geometry[covered][:, :2]).abs().mean() * VIT.patch_size
        return sum(losses), {"kind": right.item(), "off by pixels": pixels.item()}


def train(name: str, modules: list[nn.Module], batch, steps: int, lr: float) -> None:
    """AdamW with warm-up and cosine decay on `batch(step) -> (loss, figures)`."""
    parameters = [p for m in modules for p in m.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.98), weight_decay=0.05)
    begun = time.monotonic()
    for step in range(steps):
        scale = min(1, (step + 1) / 100) * 0.5 * (1 + np.cos(np.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * scale
        loss, figures = batch(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            told = "  ".join(f"{k} {v:.3f}" for k, v in figures.items())
            print(f"{name} step {step}/{steps}  loss {loss.item():.4f}  {told}  {time.monotonic() - begun:.0f} s",
                  flush=True)  # fmt: skip


def pretrain_vit(folder: Path, count: int, steps: int, batch_size: int, seed: int) -> None:
    with ProcessPoolExecutor() as pool:
        columns = zip(*pool.map(partial(still, seed=seed), range(count), chunksize=500), strict=True)
        images, classes, geometry, presence = (torch.from_numpy(np.stack(c)) for c in columns)
    images = images.permute(0, 3, 1, 2).contiguous()  # (count, 3, S, S)
    mean, std = [0.3] * 3, [0.2] * 3
    vit, heads = ViT(VIT, mean, std), StillHeads()
    nn.init.normal_(vit.position, std=0.3)  # as loud as the pixels, so that places are not drowned
    for block in vit.blocks:
        nn.init.zeros_(block.attn.out.weight)
        nn.init.zeros_(block.mlp.down.weight)
    draw = torch.Generator().manual_seed(seed)

    def batch(step: int):
        rows = torch.randint(count, (batch_size,), generator=draw)
        tokens = vit.post_norm(vit(vit.normalise(images[rows])))
        return heads(tokens, classes[rows], geometry[rows], presence[rows])

    train("vit", [vit, heads], batch, steps, lr=1e-3)
    config = {
        "architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "hidden_act": VIT.activation,
        "hidden_size": VIT.width, "image_size": VIT.image_size, "intermediate_size": VIT.mlp_width,
        "layer_norm_eps": VIT.norm_eps, "num_attention_heads": VIT.heads, "num_channels": 3,
        "num_hidden_layers": VIT.depth, "patch_size": VIT.patch_size, "torch_dtype": "float16",
    }  # fmt: skip
    pixels = {"image_mean": mean, "image_std": std, "size": {"shortest_edge": VIT.image_size}}
    save(folder, vit, vit_names(VIT), {"config.json": config, "preprocessor_config.json": pixels})


# -------------------------------------------------------------------------------------------- text


def notes(scene, rng: np.random.Generator) -> str:
    """Key words of each shape, in any order of the shapes: "circle red left square blue up"."""
    return " ".join(rng.permutation([f"{s.kind} {s.colour} {s.motion}" for s in scene]))


def document(rng: np.random.Generator) -> tuple[str, str]:
    """What comes first and what follows it, which are tokenised apart, as prompt and caption are in training.

    Of six documents one is a caption alone, one follows another telling, two follow notes, repeated, and two are lists
    of notes told again.
    """
    scene, style = shapes.draw_scene(rng), rng.integers(6)
    before = []
    if style == 1:
        before = [shapes.describe(scene, rng)]
    elif style in (2, 3):
        before = [notes(scene, rng) for _ in range(rng.integers(1, 5))]
    elif style > 3:
        many = [shapes.draw_shape(rng) for _ in range(rng.integers(3, 7))]
        return notes(many, rng), " ".join(notes(many, rng) for _ in range(rng.integers(1, 4)))
    return " ".join([*before, PROMPT]), shapes.describe(scene, rng)


def blurred(embed: nn.Embedding, words: Tensor, others: Tensor, draw: torch.Generator) -> Tensor:
    """Notes whose words run into each other: word ids (n, 2, 3) of two shapes a text -> embeddings (n, N, C).

    Each of N positions, as many in the whole batch, is the sum of one shape's three words in random proportions;
    in half of the texts some of the other shape's leaks in. Every word of `others` and noise are added. Visual
    tokens are like that while an adapter learns, and a frozen model that knows clean words only is hard to reach:
    the adapter would have to find them first. The proportions were found by trial.
    """
    n, count = len(words), int(torch.randint(4, 25, (1,), generator=draw))

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=draw)

    # Which shape a position tells of: they take turns, come at random, or one after the other.
    place, order = torch.arange(count), torch.randint(3, (n, 1), generator=draw)
    chance = torch.randint(2, (n, count), generator=draw)
    first = torch.where(order == 0, place % 2, torch.where(order == 1, chance, 2 * place // count))
    first = first ^ torch.randint(2, (n, 1), generator=draw)  # (n, N)
    leak = 0.4 * uniform(n, 1) * (uniform(n, 1) < 0.5)
    share = torch.stack([torch.where(first == i, 1, leak) for i in (0, 1)], dim=-1)  # (n, N, 2)
    weight = uniform(n, count, 3) ** (3 * uniform(n, 1, 1))  # all words alike in some texts, one above all in others
    weight = weight / weight.sum(-1, keepdim=True) * (0.5 + 2 * uniform(n, count, 1))  # (n, N, 3)
    told = torch.einsum("nps,npw,nswc->npc", share, weight, embed(words))  # (n, N, C)
    # What is added tells nothing, so embeddings must not learn from it: detached.
    size = embed.weight.detach().square().mean().sqrt()
    noise = 0.5 * size * uniform(n, 1, 1) * torch.randn(n, count, embed.embedding_dim, generator=draw)
    stray = 0.1 * uniform(n, 1, 1) * torch.randn(n, count, len(others), generator=draw)
    return told + noise + stray @ embed(others).detach()


def train_tokenizer(texts: list[str]) -> bytes:
    """A BPE model in which "red circle" or "moves left" is one piece, space and all: captions are then short,
    and the demo is quick."""
    nouns = [f"{colour} {kind}" for colour in COLOURS for kind in KINDS]
    verbs = [phrase for pairs in shapes.MOTIONS.values() for pair in pairs for phrase in pair]
    pieces = ["\u2581" + words.replace(" ", "\u2581") for words in [*nouns, *verbs, *KEY_WORDS]]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=LM.vocab,
        user_defined_symbols=pieces,
        byte_fallback=True, character_coverage=1.0, hard_vocab_limit=False, minloglevel=2,
        pad_id=-1, unk_id=0, bos_id=LM.bos_id, eos_id=LM.eos_id, num_threads=1,
    )  # fmt: skip
    return model.getvalue()


def padded(rows: list[list[int]]) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [IGNORED] * (longest - len(row)) for row in rows])


def some(rows: Tensor, keys: Tensor) -> Tensor:
    """Rows of a padded tensor, without the columns in which all of them are padding."""
    return rows[keys][:, : int((rows[keys] != IGNORED).sum(1).max())]


class Lessons:
    """What the language model learns from: documents as they are, and captions after blurred notes."""

    def __init__(self, pieces, texts: list[tuple[str, str]], rng: np.random.Generator, seed: int):
        bos, eos = pieces.bos_id(), pieces.eos_id()
        self.texts = padded([[bos, *pieces.encode(one), *pieces.encode(two), eos] for one, two in texts])
        scenes = [shapes.draw_scene(rng) for _ in texts]
        self.captions = padded([[*pieces.encode(shapes.describe(scene, rng)), eos] for scene in scenes])
        ids = {word: pieces.piece_to_id("\u2581" + word) for word in KEY_WORDS}
        assert pieces.unk_id() not in ids.values(), "every key word is a piece"
        self.key_words = torch.tensor(list(ids.values()))
        # A shape that is alone stands twice, and so leaks into itself.
        self.words = torch.tensor([[[ids[s.colour], ids[s.kind], ids[s.motion]] for s in (scene * 2)[:2]]
                                   for scene in scenes])  # fmt: skip
        self.bos, self.prompt = torch.tensor([bos]), torch.tensor(pieces.encode(PROMPT))
        self.draw = torch.Generator().manual_seed(seed)

    def on_texts(self, lm: CausalLM, size: int) -> Tensor:
        """Cross-entropy of each next token of `size` documents."""
        ids = some(self.texts, torch.randint(len(self.texts), (size,), generator=self.draw))
        hidden = lm.hidden(lm.embed(ids[:, :-1].clamp(min=0)))
        return F.cross_entropy(lm.head(hidden).flatten(0, 1), ids[:, 1:].flatten(), ignore_index=IGNORED)

    def on_notes(self, lm: CausalLM, size: int) -> Tensor:
        """Cross-entropy of `size` captions, each after blurred notes of its scene, laid out as in training."""
        keys = torch.randint(len(self.captions), (size,), generator=self.draw)
        blur, captions = blurred(lm.embed, self.words[keys], self.key_words, self.draw), some(self.captions, keys)
        bos, prompt = (lm.embed(ids).expand(size, -1, -1) for ids in (self.bos, self.prompt))
        said = lm.embed(captions[:, :-1].clamp(min=0))
        hidden = lm.hidden(torch.cat([bos, blur, prompt, said], dim=1))[:, -captions.shape[1] :]
        return F.cross_entropy(lm.head(hidden).flatten(0, 1), captions.flatten(), ignore_index=IGNORED)


def pretrain_lm(folder: Path, count: int, steps: int, batch_size: int, seed: int) -> None:
    rng = np.random.default_rng([seed, 8])
    texts = [document(rng) for _ in range(count)]
    tokenizer = train_tokenizer([" ".join(t) for t in texts[:20000]])
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    config = replace(LM, vocab=pieces.vocab_size())
    lm = CausalLM(config)
    nn.init.normal_(lm.embed.weight, std=0.05)  # it is the head too
    for block in lm.blocks:  # what a block adds grows from nothing, so that words are not drowned at the start
        nn.init.zeros_(block.attn.o.weight)
        nn.init.zeros_(block.down.weight)
    lessons, few = Lessons(pieces, texts, rng, seed), max(1, batch_size // 4)

    def batch(step: int):
        plain, noted = lessons.on_texts(lm, few), lessons.on_notes(lm, batch_size - few)
        return (plain + 3 * noted) / 4, {"texts": plain.item(), "notes": noted.item()}

    train("lm", [lm], batch, steps, lr=4e-3)
    told = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": config.vocab, "hidden_size": config.width, "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width, "intermediate_size": config.mlp_width,
        "rope_theta": config.rope_theta, "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions, "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos_id, "eos_token_id": config.eos_id, "attention_bias": False,
        "mlp_bias": False, "rope_scaling": None, "torch_dtype": "float16",
    }  # fmt: skip
    save(folder, lm, lm_names(config), {"config.json": told})
    with replace_atomically(folder / "tokenizer.model") as file:
        file.write(tokenizer)


def save(folder: Path, module: nn.Module, names: dict[str, str], texts: dict[str, dict]) -> None:
    """Writes a public model's folder: the module's tensors in fp16 under their public names, and JSON files."""
    folder.mkdir(parents=True, exist_ok=True)
    state = module.state_dict()
    write_safetensors(folder / "model.safetensors", {names[k]: v.half() for k, v in state.items()}, {"format": "pt"})
    for name, content in texts.items():
        with replace_atomically(folder / name) as file:
            file.write((json.dumps(content, indent=2) + "\n").encode())
    print(f"{folder}: {sum(p.numel() for p in module.parameters()):,} parameters")


def main() -> None:
    parser = cli.Parser("Makes the two tiny backbones.")
    parser.add_argument("--out", type=Path, default=Path("backbones"), help="where the two folders go")
    parser.add_argument("--only", choices=["vit", "lm"], help="make one of the two")
    parser.add_argument("--seed", type=cli.at_least(0), default=0, help="of data, weights and order")
    parser.add_argument("--stills", type=cli.at_least(1), default=60_000, help="stills drawn for the ViT")
    parser.add_argument("--vit-steps", type=cli.at_least(1), default=4000, help="steps of 128 stills")
    parser.add_argument("--texts", type=cli.at_least(1), default=50_000, help="texts written for the language model")
    parser.add_argument("--lm-steps", type=cli.at_least(1), default=2000, help="steps of 64 texts")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)  # now, and not after a quarter of an hour
    if args.only != "vit":
        torch.manual_seed(args.seed)
        pretrain_lm(args.out / "tiny-lm", args.texts, args.lm_steps, 64, args.seed)
    if args.only != "lm":
        torch.manual_seed(args.seed)
        pretrain_vit(args.out / "tiny-vit", args.stills, args.vit_steps, 128, args.seed)


if __name__ == "__main__":
    cli.run(main)
