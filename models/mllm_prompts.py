"""Prompts of public multimodal language models: one turn with the frames of a video and an instruction.

    <|im_start|>User:<fake_token_around_image><global-img> FRAME <fake_token_around_image>Describe it.<end_of_utterance>
    Assistant:

Each family has a format of its own, which its language model was trained with. A prompt of T frames is a list of T + 1
texts; the visual tokens of a frame come between two of them. Control tokens such as <|im_start|> are one token each.

References
[1] chat_template.jinja of llava-hf/llava-1.5-7b-hf
[2] transformers, processing_smolvlm.py, DEFAULT_CHAT_TEMPLATE and the texts of videos; processing_idefics3.py
[3] transformers, convert_llava_onevision_weights_to_hf.py and the processor's tests. White space around the control
    tokens of Qwen's two formats differs between revisions of the published templates.
"""

import re
from datetime import timedelta
from reprlib import repr as short

from common.errors import InputError
from models.bpe import BPETokenizer
from models.tokenizer import Tokenizer

INSTRUCTION = "Describe the video."  # the default
CONTROL_TOKEN = re.compile(r"<[\w|-]+>")
AROUND_IMAGE = "<fake_token_around_image><global-img>", "<fake_token_around_image>"  # its visual tokens

ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
ONES += "seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMBERS = ONES + [f"{ten}-{one}".removesuffix("-zero") for ten in TENS for one in ONES[:10]]  # from 0 to 99


def prompt_texts(family: str, lm_family: str, frames: int, instruction: str, seconds: float | None = None) -> list[str]:
    """The T + 1 texts before, between and after T = `frames` frames.

    Only SmolVLM2's prompt states times: those of the centres of T equal segments of a video of `seconds` seconds;
    None: one second a frame. Its prompt for a single frame is that for an image.
    """
    if family == "llava" and lm_family == "llama":  # [1]
        return ["USER: ", *["\n"] * (frames - 1), f"\n{instruction} ASSISTANT:"]
    if family == "llava":
        return ["<|im_start|>user\n", *["\n"] * (frames - 1), f"\n{instruction}<|im_end|>\n<|im_start|>assistant\n"]
    if family == "llava_onevision":  # [3]
        return ["<|im_start|>user ", *[""] * (frames - 1), f"\n{instruction}<|im_end|><|im_start|>assistant\n"]
    before, after = AROUND_IMAGE  # [2]
    end = f"{instruction}<end_of_utterance>\nAssistant:"
    if family == "idefics3" or frames == 1:
        return [f"<|im_start|>User:{before}", *[after + before] * (frames - 1), after + end]
    if frames > 99:
        raise InputError(f"{frames} frames: expected at most 99 for the prompt of {family}")
    seconds = frames if seconds is None else seconds
    times = [int((i + 0.5) / frames * seconds) for i in range(frames)]
    labels = [f"\nFrame from {time // 60:02d}:{time % 60:02d}:{before}" for time in times]
    intro = f"<|im_start|>User: You are provided the following series of {NUMBERS[frames]} frames from a "
    intro += f"{timedelta(seconds=int(seconds))} [H:MM:SS] video.\n"
    return [intro + labels[0], *[after + label for label in labels[1:]], f"{after}\n\n{end}"]


def encode_prompt(tokenizer: Tokenizer, family: str, lm_family: str, frames: int, instruction: str, seconds=None):
    """Returns the ids of `prompt_texts`, T + 1 lists, with BOS where texts begin with one.

    Raises InputError if the tokenizer is of another kind or lacks a control token of the prompt, and if the instruction
    contains a control token of a byte-level BPE.
    """
    added = tokenizer.config.added if isinstance(tokenizer, BPETokenizer) else {}
    if isinstance(tokenizer, BPETokenizer) and (family, lm_family) == ("llava", "llama"):  # Llama 3 has another prompt
        raise InputError("tokenizer: a byte-level BPE, the prompt of llava with a Llama needs a tokenizer.model")
    template = "".join(prompt_texts(family, lm_family, frames, "", seconds))
    if missing := [token for token in CONTROL_TOKEN.findall(template) if token not in added]:
        raise InputError(f"tokenizer: has no token {missing[0]}, which the prompt of {family} needs")
    if present := [token for token in added if token in instruction]:
        raise InputError(f"instruction: has the control token {short(present[0])}, expected plain text")
    texts = prompt_texts(family, lm_family, frames, instruction, seconds)
    if isinstance(tokenizer, BPETokenizer):
        return [tokenizer.encode_with_added(text) for text in texts]
    ids = [tokenizer.processor.encode(text) for text in texts]  # each gets sentencepiece's own space before it
    bos = [tokenizer.bos_id()] if tokenizer.bos_id() >= 0 else []
    return [bos + ids[0], *ids[1:]]
