"""Video decoding against a plain decode of everything.

References: files made here whose frame i has grey level 12 i, so that a picked frame tells its index;
a brute-force search for the frame on screen. Levels survive the codec within 3.
"""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2.functional import InterpolationMode, resize

import video
from pixels import Pixels
from weights import InputError

STEP = 12


def write_video(path: Path, times: list[int], width=48, height=32, codec="mpeg4", rotation=0) -> Path:
    """Frame i, shown from times[i] hundredths of a second on, is grey of level 12 i, its top left corner white."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=100, options={"qmin": "2", "qmax": "2"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 100)
        for i, time in enumerate(times):
            picture = np.full((height, width, 3), STEP * i, np.uint8)
            picture[: height // 4, : width // 4] = 255
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def levels(frames: torch.Tensor) -> list[int]:
    """The index of each frame (T, 3, S, S), read from its lower right quarter."""
    size = frames.shape[-1]
    grey = frames[:, :, size // 2 :, size // 2 :].float().mean((1, 2, 3))
    assert (grey / STEP - (grey / STEP).round()).abs().max() < 0.25
    return (grey / STEP).round().int().tolist()


@pytest.mark.parametrize("count", [1, 3, 8, 20, 32])
@pytest.mark.parametrize("times", [list(range(0, 80, 4)), [0, 1, 2, 3, 40, 41, 90, 95, 96, 97], [0]])
def test_frames_are_those_on_screen_at_the_segment_centres(tmp_path, times, count):
    """Constant and variable rates and a single frame, against a search through all frames."""
    path = write_video(tmp_path / "a.mp4", times)
    end = times[-1] + (times[-1] - times[0]) / max(1, len(times) - 1)
    shown = []
    for k in range(count):
        moment = times[0] + (end - times[0]) * (k + 0.5) / count
        shown.append(max([i for i, t in enumerate(times) if t <= moment + 1e-6], default=0))
    frames = video.read_frames(path, count, 32)
    assert frames.dtype == torch.uint8 and frames.shape == (count, 3, 32, 32)
    assert levels(frames) == shown


def test_jittered_frames_stay_in_their_segments_and_depend_on_the_generator_alone(tmp_path):
    """40 frames, 8 segments of 5, seeds 0..19: each frame out of its own segment, in order, not always the same."""
    path = write_video(tmp_path / "a.mp4", list(range(0, 80, 4)))
    picks = {tuple(levels(video.read_frames(path, 5, 32, np.random.default_rng(s)))) for s in range(20)}
    assert all(4 * k <= i < 4 * (k + 1) for pick in picks for k, i in enumerate(pick)) and len(picks) > 10
    again = [video.read_frames(path, 5, 32, np.random.default_rng(3)) for _ in range(2)]
    assert torch.equal(*again)


def test_a_long_video_is_decoded_twice_to_the_same_frames(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", list(range(0, 80, 4)))
    held = video.read_frames(path, 8, 32)
    monkeypatch.setattr(video, "HELD_BYTES", 10_000)
    assert torch.equal(video.read_frames(path, 8, 32), held)


def test_the_short_side_is_scaled_and_the_centre_kept(tmp_path):
    """96 x 32 to 16: the white corner (left quarter, 24 pixels) lies outside the central 32, at no scale inside."""
    frames = video.read_frames(write_video(tmp_path / "a.mp4", [0, 4, 8], 96, 32), 3, 16)
    assert frames.shape[-2:] == (16, 16) and frames.max() < 60


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [("empty.mp4", b"", "empty file"), ("text.mp4", b"hello, not a video\n" * 50, "cannot be read as a video"),
     ("none.mp4", None, "cannot be read as a video")],
)  # fmt: skip
def test_what_is_no_video_is_named_in_one_line(tmp_path, name, content, says):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        video.read_frames(path, 8, 32)
    assert str(path) in str(error.value) and says in str(error.value) and "\n" not in str(error.value)


def test_sound_without_pictures_is_named(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux([*stream.encode(sound), *stream.encode()])
    with pytest.raises(InputError, match=r"sound\.mp4: has no video stream"):
        video.read_frames(path, 8, 32)


def test_cut_and_flipped_files_are_decoded_or_named(tmp_path):
    """60 damaged copies, seed 0: frames of the right shape or an InputError with the name, nothing else."""
    whole = write_video(tmp_path / "a.mp4", list(range(0, 80, 4))).read_bytes()
    rng = np.random.default_rng(0)
    path, named = tmp_path / "damaged.mp4", 0
    for i in range(60):
        damaged = bytearray(whole[: rng.integers(1, len(whole))] if i % 2 else whole)
        for at in rng.integers(0, len(damaged), rng.integers(1, 30)):
            damaged[at] = rng.integers(256)
        path.write_bytes(bytes(damaged))
        try:
            assert video.read_frames(path, 8, 32).shape == (8, 3, 32, 32)
        except InputError as error:
            named += str(path) in str(error)
    assert 0 < named < 60


def plain_decode(path: Path) -> list[av.VideoFrame]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # damage is patched up differently by several threads
        return [f for p in container.demux(stream) for f in decode_or_skip(p) if not f.is_corrupt]


def decode_or_skip(packet) -> list[av.VideoFrame]:
    try:
        return packet.decode()
    except av.error.InvalidDataError:
        return []


@pytest.mark.parametrize("view", [
    Pixels(48, 48), Pixels(48, 64), Pixels(48, 48, squash=True), Pixels(48, 64, interpolation="bilinear"),
])  # fmt: skip
@pytest.mark.parametrize("shape", [(120, 200), (200, 120), (96, 96)])
def test_frames_are_resized_and_cropped_as_the_view_says(view, shape):
    """torchvision's resize with antialias, then a crop, of a smooth random picture (seed 0), within 4 of 255 levels."""
    picture = F.interpolate(torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(0)), shape, mode="bicubic")
    picture = (picture * 200 + 20).clamp(0, 255).to(torch.uint8)[0]
    side = [view.resize] * 2 if view.squash else view.resize
    expected = resize(picture, side, InterpolationMode(view.interpolation), antialias=True)
    top, left = (expected.shape[-2] - view.size) // 2, (expected.shape[-1] - view.size) // 2
    expected = expected[:, top : top + view.size, left : left + view.size]
    frame = av.VideoFrame.from_ndarray(picture.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
    found = video.to_pixels(frame, view, video.VideoReformatter())
    assert found.shape == (view.size, view.size, 3)
    assert np.abs(found.transpose(2, 0, 1).astype(int) - expected.numpy().astype(int)).max() <= 4


GOOD = ["12727.mp4", "av1_video.mkv", "h265_10bits.mp4", "no_duration.webm", "realshort.mp4", "test.avi",
        "unordered.mov", "video_0.mov", "video_90.mov", "video_180.mov", "walk.mkv", "corrupted.mp4",
        "truncated.avi"]  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_real_clips_give_the_frames_of_a_plain_decode(real, name):
    """Bit for bit, 8 and 32 frames, picked by the frames' own times."""
    path = real / "clips" / name
    frames = plain_decode(path)
    times = [f.time for f in frames]
    pictures = [video.to_pixels(f, Pixels(32, 32), video.VideoReformatter()) for f in frames]
    order = sorted(range(len(times)), key=lambda i: times[i])
    span = times[order[-1]] - times[order[0]]
    span += span / max(1, len(times) - 1)
    for count in (8, 32):
        moments = [times[order[0]] + span * (k + 0.5) / count for k in range(count)]
        want = [[i for i in order if times[i] <= m + 1e-9][-1] for m in moments]
        got = video.read_frames(path, count, 32).numpy()
        assert all(np.array_equal(got[k].transpose(1, 2, 0), pictures[i]) for k, i in enumerate(want))


@pytest.mark.parametrize(("name", "quarters"), [("video_0.mov", 0), ("video_90.mov", -1), ("video_180.mov", -2)])
def test_rotated_clips_come_upright(real, name, quarters):
    """Against numpy's rot90 of the stored picture; the letters on the keyboard were seen to stand upright."""
    path = real / "clips" / name
    stored = plain_decode(path)[0].reformat(113, 64, "rgb24", interpolation="BICUBIC").to_ndarray()
    middle = stored[:, (stored.shape[1] - 64) // 2 :][:, :64]
    assert np.array_equal(video.read_frames(path, 3, 64)[0].permute(1, 2, 0).numpy(), np.rot90(middle, quarters))


@pytest.mark.parametrize("name", ["WrongFile.mp4", "audio_only.mp4", "empty.mp4"])
def test_real_bad_files_are_named(real, name):
    with pytest.raises(InputError, match=name):
        video.read_frames(real / "clips" / name, 8, 32)
