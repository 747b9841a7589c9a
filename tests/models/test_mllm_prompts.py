"""Prompts of multimodal language models against the texts and ids of transformers' processors.

References
[1] transformers, models/smolvlm/processing_smolvlm.py and models/idefics3/processing_idefics3.py, their functions and
    templates, run here with a tiny tokenizer.
[2] chat_template.jinja of llava-hf/llava-1.5-7b-hf, and the normalizer of its tokenizer.json: after each added token, a
    text begins with sentencepiece's "▁".
[3] The chat templates of LLaVA-OneVision and LLaVA interleave, written out.
"""

import io
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import sentencepiece
import tokenizers
import torch
from jinja2 import Template
from tokenizers.normalizers import Prepend, Replace
from transformers.convert_slow_tokenizer import generate_merges
from transformers.models.smolvlm import processing_smolvlm

from models.llava import LLaVA, OneVision
from models.mllm import MLLM, MLLMConfig
from models.smolvlm import NUMBERS, Idefics3, SmolVLM
from models.tokenizer import SentencePieceTokenizer, load_bpe, load_tokenizer
from tests import tiny
from tests.common.helpers import ROOT, refused
from tests.models.test_internvl import write_tokenizer

LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEXT = "Describe the video."
IMAGE, SMOLVLM_TOKENS = "<image>", ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")


def make(layout: type[MLLM], lm_family: str) -> MLLM:
    """A model of a layout; the tokens of its prompt depend on neither sizes nor weights."""
    return layout(MLLMConfig(tiny.VIT, tiny.LM, lm_family))


def prompt_text(layout: type[MLLM], lm_family: str, frames: int, times: Sequence[float] | None = None) -> str:
    return IMAGE.join(make(layout, lm_family).prompt_texts(frames, times or range(frames + 1)))


def render(template: str, frames: int, kind: str = "image") -> str:
    content = [{"type": kind}] * (1 if kind == "video" else frames) + [{"type": "text", "text": TEXT}]
    messages = [{"role": "user", "content": content}]
    return Template(template, keep_trailing_newline=True).render(messages=messages, add_generation_prompt=True)


def smolvlm_text(frames: int, monkeypatch, times: Sequence[float] | None = None) -> str:
    """What [1] makes of the template for a video, with one token for the visual tokens of a frame."""
    monkeypatch.setattr(processing_smolvlm, "num2words", NUMBERS.__getitem__)
    tokens = {"fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>"}
    processor = SimpleNamespace(image_seq_len=1, image_token=IMAGE, **tokens)
    *seconds, duration = times or range(frames + 1)
    metadata = SimpleNamespace(fps=1, timestamps=seconds, duration=duration)
    inputs = {"pixel_values": torch.zeros(1, frames), "video_metadata": [metadata]}
    video = processing_smolvlm.SmolVLMProcessor.replace_video_token(processor, inputs, 0)
    return render(processing_smolvlm.DEFAULT_CHAT_TEMPLATE, frames, "video").replace("<video>", video)


@pytest.mark.parametrize("frames, times", [(2, None), (8, None), (32, None), (64, None), (99, None),
                                           (3, [0.99, 59.96, 3601.5, 3725.2])])
def test_smolvlm2_reads_the_frames_of_a_video_with_their_times(monkeypatch, frames, times):
    """One frame per second, and others; seconds are rounded down."""
    assert prompt_text(SmolVLM, "llama", frames, times) == smolvlm_text(frames, monkeypatch, times)


@pytest.mark.parametrize("layout, frames", [(SmolVLM, 1), (Idefics3, 1), (Idefics3, 3)])
def test_images_of_smolvlm_are_in_a_row(layout, frames):
    image = processing_smolvlm.get_image_prompt_string(0, 0, 1, "<fake_token_around_image>", IMAGE, "<global-img>")
    expected = render(processing_smolvlm.DEFAULT_CHAT_TEMPLATE, frames).replace(IMAGE, image)
    assert prompt_text(layout, "llama", frames) == expected


@pytest.mark.parametrize("frames", [1, 4])
def test_the_other_prompts(frames):
    """[2] and [3]."""
    assert prompt_text(LLaVA, "llama", frames) == render(LLAVA_TEMPLATE, frames)
    images = "\n".join([IMAGE] * frames)
    assert prompt_text(LLaVA, "qwen2", frames) == (
        f"<|im_start|>user\n{images}\nDescribe the video.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt_text(OneVision, "qwen2", frames) == (
        f"<|im_start|>user {IMAGE * frames}\nDescribe the video.<|im_end|><|im_start|>assistant\n"
    )


# -------------------------------------------------------------------------------------------- ids


def test_ids_of_smolvlm2_equal_those_of_the_whole_text(tmp_path, monkeypatch):
    """A tiny tokenizer, in the tokenizers package, on the text of [1]: the image token is where frames come."""
    path = write_tokenizer(tmp_path, *SMOLVLM_TOKENS)
    theirs = tokenizers.Tokenizer.from_file(str(path))
    expected = theirs.encode(smolvlm_text(8, monkeypatch), add_special_tokens=False).ids
    ids = make(SmolVLM, "llama").prompt(load_bpe(path, None), 8)
    assert len(ids) == 9
    found = ids[0]
    for text in ids[1:]:
        found = [*found, theirs.token_to_id(IMAGE), *text]
    assert found == expected


def test_ids_of_llava_equal_those_of_the_whole_text():
    """A sentencepiece model with Llama's options, trained here; the same as a tokenizer.json like that of [2], in the
    tokenizers package, on the rendered template."""
    words = [f"{TEXT} A USER and an ASSISTANT describe videos: they see it, and vice versa."] * 20
    model = io.BytesIO()
    options = {"vocab_size": 320, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    options |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(words), model_writer=model, **options)
    ours = SentencePieceTokenizer(sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()))
    pieces = {ours.processor.id_to_piece(i): i for i in range(len(ours))}
    merges = generate_merges(pieces, {piece: ours.processor.get_score(i) for piece, i in pieces.items()})
    bpe = tokenizers.models.BPE(pieces, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    theirs = tokenizers.Tokenizer(bpe)
    theirs.normalizer = tokenizers.normalizers.Sequence([Prepend("▁"), Replace(" ", "▁")])
    theirs.add_special_tokens([IMAGE])
    expected = theirs.encode(render(LLAVA_TEMPLATE, 2)).ids
    before, between, after = make(LLaVA, "llama").prompt(ours, 2)
    image = theirs.token_to_id(IMAGE)
    assert [*before, image, *between, image, *after] == [*ours.start, *expected]
    assert ours.start == [1] and len(between) == 2


def test_prompts_that_cannot_be_encoded_are_refused(tmp_path):
    smolvlm2, qwen = (load_bpe(write_tokenizer(tmp_path, *tokens), None) for tokens in (SMOLVLM_TOKENS, ()))
    with refused("tokenizer", "<|im_start|>"):
        make(SmolVLM, "llama").prompt(load_tokenizer(ROOT / "backbones" / "tiny-lm"), 2)
    with refused("tokenizer", "<fake_token_around_image>"):
        make(Idefics3, "llama").prompt(qwen, 2)
    with refused("tokenizer", "byte-level", "tokenizer.model"):
        make(LLaVA, "llama").prompt(qwen, 2)
    with refused("100 frames", "99"):
        make(SmolVLM, "llama").prompt(smolvlm2, 100)
