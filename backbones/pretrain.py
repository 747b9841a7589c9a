"""Makes the weights and tokenizers of the tiny models again: `python -m backbones.pretrain`.

    tiny-lm     a Llama that learns from text and from mixed keyword embeddings (`texts.py`)
    tiny-vit    a CLIP ViT that learns from still images of `shapes` (`stills.py`)
    tiny-mllm   both, joined in LLaVA's layout [1]

Each is a folder in the format of a public model. Its config.json and preprocessor_config.json say what is made; the
program writes model.safetensors (fp16) and tokenizer.model beside them. No model sees a clip together with its caption;
that is left to `train.py`.

The MLLM is trained as LLaVA is, in two stages, with a frozen ViT. First the projector alone learns captions of stills:
each patch has to become what the frozen language model already understands. Then projector and language model learn
them. The language model goes on with its own texts as well, so it does not forget how to say motion, of which stills
show nothing.

Shapes: n images, P tokens of the ViT per image, D ViT width, S side in pixels.

References
[1] https://arxiv.org/abs/2310.03744
"""

import io
import json
import struct
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn

from backbones.stills import COLOURS, KINDS, AlbumData, StillHeads, draw_still
from backbones.texts import KEYWORDS, PROMPT, TextData, document
from common import cli
from common.files import read_json
from models.llava import LLaVA
from models.lm import CausalLM
from models.names import VITS, lm_tensor_names, tensor_names
from models.safetensors import write_safetensors
from models.tokenizer import SentencePieceTokenizer
from models.vit import ViT
from video_data import shapes

MAX_PIECES = 480  # of the tokenizer, which has fewer
WORDS = ("USER:", "ASSISTANT:", "Describe", "video.")  # of LLaVA's prompt; tiny-lm would spell them in bytes
PUBLISHED_VIT = ("vision_model.embeddings.patch_embedding.weight",)  # its prefix is used; and of tiny-mllm:
PUBLISHED = ("vision_tower.vision_model.embeddings.patch_embedding.weight", "multi_modal_projector.linear_1.weight",
             "language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
STILLS_PER_PROMPT = (1, 2, 4, 8)  # drawn for each step


def train(name: str, parameters: list[nn.Parameter], compute_loss: Callable[[], Tensor], steps: int,
          peak_lr: float) -> None:
    """AdamW with warm-up and cosine decay. `compute_loss` draws a batch and returns its loss."""
    optimizer = torch.optim.AdamW(parameters, peak_lr, betas=(0.9, 0.98), weight_decay=0.05)
    for step in range(steps):
        scale = min(1, (step + 1) / 100) * 0.5 * (1 + np.cos(np.pi * step / steps))
        optimizer.param_groups[0]["lr"] = peak_lr * scale
        loss = compute_loss()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"{name} step {step}/{steps}  loss {loss.item():.4f}")


def save_weights(folder: Path, module: nn.Module, names: dict[str, str]) -> None:
    """Writes the tensors in fp16, under their public names."""
    tensors = {names[name]: tensor.half() for name, tensor in module.state_dict().items()}
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    print(f"{folder}: {sum(p.numel() for p in module.parameters()):,} parameters")


# --------------------------------------------------------------------------------------- tiny-vit


def pretrain_vit(folder: Path, count: int, steps: int, batch_size: int, seed: int, patches: bool = True) -> None:
    """Trains the ViT of a folder on `count` still images. patches: whether these learn what is on them; else the class
    token alone is trained."""
    torch.manual_seed(seed)
    with ProcessPoolExecutor() as pool:
        columns = zip(*pool.map(partial(draw_still, seed=seed), range(count), chunksize=500), strict=True)
        images, *targets = (torch.from_numpy(np.stack(column)) for column in columns)
    images = images.permute(0, 3, 1, 2).contiguous()  # (count, 3, S, S)
    vit = ViT.from_config(folder)
    vit, heads = ViT(vit.config, vit.preprocessing), StillHeads(vit.config.width)
    nn.init.normal_(vit.position, std=0.3)  # as large as the patch embeddings, or positions are hard to learn
    for block in vit.blocks:  # each block starts as the identity
        nn.init.zeros_(block.attn.out.weight)
        nn.init.zeros_(block.mlp.down.weight)
    generator = torch.Generator().manual_seed(seed)

    def compute_loss() -> Tensor:
        rows = torch.randint(count, (batch_size,), generator=generator)
        tokens = vit.post_norm(vit(vit.normalize(images[rows])))  # (n, P, D)
        classes, geometry, presence = (target[rows] for target in targets)
        loss = heads.class_token_loss(tokens, presence)
        return loss + heads.patch_loss(tokens, classes, geometry) if patches else loss

    train("vit", [*vit.parameters(), *heads.parameters()], compute_loss, steps, peak_lr=1e-3)
    save_weights(folder, vit, tensor_names(vit, VITS["clip"], PUBLISHED_VIT))


# ---------------------------------------------------------------------------------------- tiny-lm


def start_lm(folder: Path, texts: Iterable[str], phrases: Iterable[str]) -> tuple[CausalLM, SentencePieceProcessor]:
    """An untrained language model as config.json says, and a tokenizer of some texts, a BPE in which each of the
    phrases is one token. Writes the tokenizer, and its number of pieces into config.json."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=(model := io.BytesIO()), model_type="bpe", vocab_size=MAX_PIECES,
        user_defined_symbols=["\u2581" + words.replace(" ", "\u2581") for words in phrases], byte_fallback=True,
        character_coverage=1.0, hard_vocab_limit=False, minloglevel=2, pad_id=-1, unk_id=0, bos_id=1, eos_id=2,
        num_threads=1)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = SentencePieceProcessor(model_proto=model.getvalue())
    config = read_json(folder / "config.json") | {"vocab_size": tokenizer.vocab_size()}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    lm = CausalLM(CausalLM.from_config(folder).config)
    nn.init.normal_(lm.embed.weight, std=0.05)  # also the weight of the head
    for block in lm.blocks:  # each block starts as the identity
        nn.init.zeros_(block.attn.o.weight)
        nn.init.zeros_(block.down.weight)
    return lm, tokenizer


def pretrain_lm(folder: Path, count: int, steps: int, batch_size: int, seed: int) -> None:
    """Trains tokenizer and language model of a folder on `count` documents and as many captions. config.json gets the
    tokenizer's number of pieces."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 8])
    documents = [document(rng) for _ in range(count)]
    nouns = [f"{colour} {kind}" for colour in COLOURS for kind in KINDS]
    verbs = [phrase for pairs in shapes.MOTIONS.values() for pair in pairs for phrase in pair]
    # "red circle" and "moves left" are one token each: short captions, a fast demo.
    lm, tokenizer = start_lm(folder, [" ".join(parts) for parts in documents[:20000]], [*nouns, *verbs, *KEYWORDS])
    data = TextData(tokenizer, documents, rng, seed, [tokenizer.bos_id()], tokenizer.encode(PROMPT))

    def compute_loss() -> Tensor:
        num_documents = max(1, batch_size // 4)
        document_loss, caption_loss = data.loss(lm, num_documents, batch_size - num_documents)
        return (document_loss + 3 * caption_loss) / 4

    train("lm", list(lm.parameters()), compute_loss, steps, peak_lr=4e-3)
    save_weights(folder, lm, lm_tensor_names(lm))


# -------------------------------------------------------------------------------------- tiny-mllm


def add_words(tokenizer_model: bytes, words: tuple[str, ...]) -> bytes:
    """A sentencepiece model with more words, each one token after all others. The ids of the others do not change.

    The file is a protocol buffer. A list in it grows by appending to the file: field 1 of the model is one piece, with
    its text (field 1), score (2) and type (3; 4 is a user-defined symbol).
    """
    for word in words:
        text = f"\u2581{word}".encode()
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", 0) + b"\x18\x04"
        tokenizer_model += b"\x0a" + bytes([len(piece)]) + piece
    return tokenizer_model


def pretrain_mllm(folder: Path, backbones: Path, albums: int, texts: int, steps: tuple[int, int], batch_size: int,
                  seed: int) -> None:
    """Joins tiny-vit and tiny-lm in the folder `backbones` and trains both stages."""
    torch.manual_seed(seed)
    vit, lm = ViT.from_pretrained(backbones / "tiny-vit"), CausalLM.from_pretrained(backbones / "tiny-lm")
    tokenizer_model = add_words((backbones / "tiny-lm/tokenizer.model").read_bytes(), WORDS)
    (folder / "tokenizer.model").write_bytes(tokenizer_model)
    tokenizer = SentencePieceTokenizer(SentencePieceProcessor(model_proto=tokenizer_model))
    mllm = LLaVA(LLaVA.from_config(folder).config)
    mllm.vit = vit
    nn.init.normal_(mllm.lm.embed.weight, std=0.05)
    for name, tensor in lm.state_dict().items():
        mllm.lm.state_dict()[name][: len(tensor)] = tensor  # all rows but those of the new words
    rng = np.random.default_rng([seed, 12])
    stills = AlbumData(mllm.vit, tokenizer, albums, seed)
    documents = [document(rng) for _ in range(texts)]
    data = TextData(tokenizer.processor, documents, rng, seed, *mllm.prompt(tokenizer, 1))

    def still_loss() -> Tensor:
        return stills.loss(mllm, batch_size, int(rng.choice(STILLS_PER_PROMPT)))

    def whole_loss() -> Tensor:
        return still_loss() + sum(data.loss(mllm.lm, batch_size // 2, batch_size // 2))

    projector, lm_too = [*mllm.projector.parameters()], [*mllm.projector.parameters(), *mllm.lm.parameters()]
    mllm.lm.requires_grad_(False)
    train("projector", projector, still_loss, steps[0], peak_lr=4e-3)
    mllm.lm.requires_grad_(True)
    train("projector and lm", lm_too, whole_loss, steps[1], peak_lr=2e-3)
    save_weights(folder, mllm, mllm.names_in(PUBLISHED))


def main() -> None:
    parser = cli.Parser("Makes the weights and tokenizers of the tiny models.", "python -m backbones.pretrain")
    parser.add_argument("--folder", type=cli.path, default=Path(__file__).parent,
                        help="holds tiny-lm, tiny-vit and tiny-mllm with their config.json; weights are replaced")
    folder = parser.parse_args().folder
    pretrain_lm(folder / "tiny-lm", count=50_000, steps=2000, batch_size=64, seed=0)
    pretrain_vit(folder / "tiny-vit", count=60_000, steps=4000, batch_size=128, seed=0)
    pretrain_mllm(folder / "tiny-mllm", folder, albums=4000, texts=20_000, steps=(100, 400), batch_size=32, seed=0)


if __name__ == "__main__":
    cli.run(main)
