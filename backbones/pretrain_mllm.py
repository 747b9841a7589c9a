"""Makes the tiny multimodal language model `backbones/tiny-mllm`: `python -m backbones.pretrain_mllm`.

It joins the two tiny backbones in LLaVA's layout [1] and trains as LLaVA does, in two stages. The ViT stays frozen in
both.

1. The projector alone learns captions of still images. The language model is frozen, so each patch has to become what
   the language model already understands.
2. The projector and the language model learn captions of stills. The language model also learns text and captions
   after mixed keywords (`lm_data.py`), the latter in LLaVA's prompt. So it does not forget how to say motion.

The stills and their captions are those of `mllm_data.py`. They show no motion, and their captions name none.

The folder has the published spelling of LLaVA 1.5: config.json, model.safetensors (fp16), preprocessor_config.json,
tokenizer.model.

References
[1] https://arxiv.org/abs/2310.03744
"""

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch import Tensor, nn

from backbones.lm_data import LMTrainingData, document
from backbones.mllm_data import AlbumData
from backbones.pretrain import save_model, train
from common import cli
from common.files import read_json, replace_atomically
from models.lm import CausalLM
from models.mllm import MLLM, MLLMConfig
from models.mllm_checkpoints import mllm_tensor_names
from models.mllm_prompts import INSTRUCTION
from models.tokenizer import SentencePieceTokenizer
from models.vit import ViT

WORDS = ("USER:", "ASSISTANT:", "Describe", "video.")  # of the prompt; the tokenizer would spell them in bytes
PUBLISHED = [  # names with the prefixes of published files
    "vision_tower.vision_model.embeddings.patch_embedding.weight", "language_model.model.embed_tokens.weight",
    "language_model.lm_head.weight", "multi_modal_projector.linear_1.weight",
]  # fmt: skip
STILLS_A_PROMPT = (1, 2, 4, 8)  # drawn for each step


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


def join_backbones(vit: ViT, lm: CausalLM, vocab: int) -> MLLM:
    """An MLLM of both, with a new projector. `vocab` exceeds the language model's by new words and the image token."""
    config = MLLMConfig("llava", vit.config, replace(lm.config, vocab=vocab), "clip", "llama", image_token_id=vocab - 1)
    mllm = MLLM(config)
    mllm.vit = vit
    nn.init.normal_(mllm.lm.embed.weight, std=0.05)
    weights = mllm.lm.state_dict()
    for name, tensor in lm.state_dict().items():
        weights[name][: len(tensor)] = tensor  # all rows but those of the new tokens
    return mllm


def save_mllm(folder: Path, mllm: MLLM, backbones: Path, tokenizer_model: bytes) -> None:
    """Writes the MLLM's folder. What it shares with the backbones is read from their configs."""
    vit, lm = (read_json(backbones / name / "config.json") for name in ("tiny-vit", "tiny-lm"))
    config = {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "image_token_index": mllm.config.image_token_id, "image_seq_length": mllm.config.tokens_per_image,
        "projector_hidden_act": "gelu", "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default", "tie_word_embeddings": mllm.config.lm.tied,
        "torch_dtype": "float16", "vision_config": vit, "text_config": lm | {"vocab_size": mllm.config.lm.vocab},
    }  # fmt: skip
    preprocessing = read_json(backbones / "tiny-vit/preprocessor_config.json")
    configs = {"config.json": config, "preprocessor_config.json": preprocessing}
    save_model(folder, mllm, mllm_tensor_names(mllm, PUBLISHED), configs)
    with replace_atomically(folder / "tokenizer.model") as file:
        file.write(tokenizer_model)


def pretrain_mllm(folder: Path, backbones: Path, albums: int, texts: int, steps: tuple[int, int], batch_size: int,
                  seed: int) -> None:  # fmt: skip
    """Joins tiny-vit and tiny-lm in the folder `backbones`, trains both stages and writes the MLLM's folder."""
    vit, lm = ViT.from_pretrained(backbones / "tiny-vit"), CausalLM.from_pretrained(backbones / "tiny-lm")
    tokenizer_model = add_words((backbones / "tiny-lm/tokenizer.model").read_bytes(), WORDS)
    tokenizer = SentencePieceTokenizer(sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model))
    mllm = join_backbones(vit, lm, len(tokenizer) + 1)
    rng = np.random.default_rng([seed, 12])
    album_data = AlbumData(mllm, tokenizer, albums, seed)
    before, after = mllm.prompt(tokenizer, 1, INSTRUCTION)
    text_data = LMTrainingData(tokenizer.processor, [document(rng) for _ in range(texts)], rng, seed, before, after)

    def still_loss() -> Tensor:
        return album_data.loss(mllm, batch_size, int(rng.choice(STILLS_A_PROMPT)))

    def whole_loss() -> Tensor:
        half = max(1, batch_size // 2)
        return still_loss() + text_data.document_loss(mllm.lm, half) + text_data.caption_loss(mllm.lm, half)

    mllm.requires_grad_(False)
    mllm.projector.requires_grad_(True)
    train("projector", list(mllm.projector.parameters()), still_loss, steps[0], peak_lr=4e-3)
    mllm.lm.requires_grad_(True)
    trained = [*mllm.projector.parameters(), *mllm.lm.parameters()]
    train("projector and lm", trained, whole_loss, steps[1], peak_lr=2e-3)

    save_mllm(folder, mllm, backbones, tokenizer_model)


def main() -> None:
    parser = cli.Parser("Makes the tiny multimodal language model from the two tiny backbones.")
    parser.add_argument("--backbones", type=Path, default=Path("backbones"), help="where tiny-vit and tiny-lm are")
    parser.add_argument("--out", type=Path, default=Path("backbones/tiny-mllm"), help="the folder that is written")
    parser.add_argument("--seed", type=cli.at_least(0), default=0, help="of data, weights and order")
    parser.add_argument("--albums", type=cli.at_least(1), default=4000, help="scenes drawn, eight stills each")
    parser.add_argument("--texts", type=cli.at_least(1), default=20_000, help="texts written for the language model")
    parser.add_argument("--projector-steps", type=cli.at_least(1), default=100, help="steps of the first stage")
    parser.add_argument("--steps", type=cli.at_least(1), default=400, help="steps of the second stage")
    parser.add_argument("--batch-size", type=cli.at_least(2), default=32, help="prompts with stills in a step")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)  # fail now, not after minutes
    torch.manual_seed(args.seed)
    pretrain_mllm(args.out, args.backbones, args.albums, args.texts, (args.projector_steps, args.steps),
                  args.batch_size, args.seed)  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
