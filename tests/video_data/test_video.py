"""Video decoding against a plain decode of all frames.

References: generated files whose frame i has grey level 12 i, so a frame's level is its index; a brute-force search for
the displayed frame. Levels survive the codec within 3.
"""

import struct
import time
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from av.sidedata.sidedata import Type
from av.stream import Disposition
from torchvision.transforms.v2.functional import InterpolationMode, resize

from common.errors import InputError
from common.preprocessing import Preprocessing
from tests.common.helpers import damaged, refused
from video_data import video

STEP = 12
EVEN = list(range(0, 80, 4))  # hundredths of a second
QUALITY = {"mpeg4": {"qmin": "2", "qmax": "2"}, "libx264": {"crf": "1"}}


def write_video(path, times, width=48, height=32, codec="mpeg4", options=(), pix_fmt="yuv420p",
                aspect=None) -> Path:
    """Frame i, displayed from times[i] hundredths of a second on, has grey level 12 i and a white top left corner."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=100, options=QUALITY.get(codec, {}) | dict(options))
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.time_base = Fraction(1, 100)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for i, time in enumerate(times):
            picture = np.full((height, width, 3), STEP * i, np.uint8)
            picture[: height // 4, : width // 4] = 255
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = frame.reformat(format=pix_fmt)
            frame.pts, frame.time_base = time, Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def frame_indices(frames: torch.Tensor) -> list[int]:
    """The index of each frame (T, 3, S, S), read from its lower right quarter."""
    size = frames.shape[-1]
    grey = frames[:, :, size // 2 :, size // 2 :].float().mean((1, 2, 3))
    assert (grey / STEP - (grey / STEP).round()).abs().max() < 0.25
    return (grey / STEP).round().int().tolist()


def displayed(times: list[float], count: int) -> list[int]:
    """Indices of the frames displayed at the centres of `count` segments, by a search through all."""
    end = times[-1] + (times[-1] - times[0]) / max(1, len(times) - 1)
    centres = [times[0] + (end - times[0]) * (k + 0.5) / count for k in range(count)]
    return [max([i for i, t in enumerate(times) if t <= centre + 1e-6], default=0) for centre in centres]


@pytest.mark.parametrize("count", [1, 3, 8, 20, 32])
@pytest.mark.parametrize("times", [EVEN, [0, 1, 2, 3, 40, 41, 90, 95, 96, 97], [0]])
def test_frames_are_those_displayed_at_the_segment_centres(tmp_path, times, count):
    """Constant and variable rates and a single frame, against a search through all frames."""
    frames = video.read_frames(write_video(tmp_path / "a.mp4", times), count, 32)
    assert frames.dtype == torch.uint8 and frames.shape == (count, 3, 32, 32)
    assert frame_indices(frames) == displayed(times, count)


@pytest.mark.parametrize("name", ["skip.mp4", "all.mp4", "late.ts", "same.mkv"])
def test_the_times_of_frames_are_those_of_the_file(tmp_path, name):
    """From the first frame on, and the duration, within 1e-4 s: with frames skipped and decoded, of a clock that begins
    later, and 24 frames per second where the file has no times."""
    times = EVEN if name == "same.mkv" else [0, 1, 2, 3, 40, 41, 90, 95, 96, 97]
    written = [7] * 20 if name == "same.mkv" else [t + 300 * (name == "late.ts") for t in times]
    codec = "mpeg4" if name == "all.mp4" else "libx264"
    path = write_video(tmp_path / name, written, codec=codec, options={"bf": "0"})
    frames, found = video.read_clip(path, 6, 32)
    seconds = [i / 24 for i in range(20)] if name == "same.mkv" else [t / 100 for t in times]
    end = seconds[-1] + seconds[-1] / (len(times) - 1)
    assert found == pytest.approx([*(seconds[i] for i in displayed(times, 6)), end], abs=1e-4)
    assert torch.equal(frames, video.read_frames(path, 6, 32))


X264 = "bframes=3:b-adapt=0"
GOP = f"{X264}:open-gop=1:keyint=8:min-keyint=8"
SKIPPED = {
    "b.mp4": (X264, EVEN),
    "open.mp4": (GOP, EVEN),
    "pyramid.mkv": (f"{X264}:b-pyramid=normal:keyint=9", EVEN),
    "refresh.mp4": ("bframes=2:intra-refresh=1", EVEN),
    "fields.mkv": (f"{X264}:interlaced=1", EVEN),
    "late.mkv": (X264, [t + 500 for t in EVEN]),
    "early.mp4": (X264, [t - 30 for t in EVEN]),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_skipped_frames_change_nothing(tmp_path, monkeypatch, name):
    """H.264 with frames skipped: bit-identical to decoding all frames, and the indices of the search.

    MP4 does not display frames before time 0.
    """
    x264, times = SKIPPED[name]
    path = write_video(tmp_path / name, times, codec="libx264", options={"x264-params": x264})
    for count in (1, 4, 8, 32):
        frames, hidden = video.read_frames(path, count, 32), sum(t < 0 for t in times)
        assert frame_indices(frames) == [hidden + i for i in displayed(times[hidden:], count)]
        with video.open_video(path) as opened:
            assert video.skip_to_frames(*opened, video.sample_positions(count)) is not None
        with monkeypatch.context() as patch:
            patch.setattr(video, "skip_to_frames", lambda *_: None)
            assert torch.equal(video.read_frames(path, count, 32), frames)


def test_unneeded_frames_are_not_decoded(tmp_path, monkeypatch):
    """Zeros in every unwanted B-frame and in all frames after the last wanted one: the result is bit-identical."""
    path = write_video(tmp_path / "a.mp4", EVEN, codec="libx264", options={"x264-params": f"{X264}:b-pyramid=none"})
    expected = video.read_frames(path, 5, 32)
    wanted, data = {EVEN[i] for i in displayed(EVEN, 5)}, bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size, round(100 * float(p.pts * p.time_base))) for p in container.demux(video=0) if p.size]
    end = max(i for i, (_, _, time) in enumerate(packets) if time in wanted)
    unneeded = [(at, size) for i, (at, size, time) in enumerate(packets)  # nal_ref_idc, after four bytes of length
                if i and time not in wanted and (i > end or not data[at + 4] >> 5)]
    for at, size in unneeded:
        data[at + 5 : at + size] = bytes(size - 5)
    path.write_bytes(data)
    monkeypatch.delattr(video, "select_frames")  # which would decode all
    assert len(unneeded) >= 9 and torch.equal(video.read_frames(path, 5, 32), expected)
    with video.open_video(path) as opened:
        assert video.skip_to_frames(*opened, video.sample_positions(5)) is not None


H264, H264_B = (dict(codec="libx264", options={"bf": count}) for count in "02")
FILES = {  # name: the times in the file, those of display if they are others, how it is written
    # AVI has no display times. FFmpeg invents times that step back; sorting frames by them would swap frames.
    "h264.avi": (range(20), None, H264_B), "h264.mkv": (range(20), None, H264_B),
    "mpeg4.avi": (range(20), None, {"options": {"bf": "2"}}),
    # No times, or the same for all frames: evenly spaced. Of two frames with one time, the later is displayed.
    "none.h264": (EVEN, None, H264), "same.mkv": ([7] * 20, EVEN, H264),
    "twice.mkv": ([t // 8 * 8 for t in EVEN], None, H264),
    # 10 bits, alpha, interlaced, odd and extreme sizes, a colon in the name.
    **{name: (EVEN[:8], None, options) for name, options in {
        "ten.mp4": dict(codec="libx264", pix_fmt="yuv420p10le"), "alpha.mov": dict(codec="qtrle", pix_fmt="argb"),
        "fields.avi": dict(options={"flags": "+ildct+ilme"}), "take:1.mp4": {},
        "1.mkv": dict(codec="ffv1", pix_fmt="bgr0", width=1, height=1),
        "long.mkv": dict(codec="ffv1", pix_fmt="bgr0", width=2000, height=4),
        "high.mkv": dict(codec="ffv1", pix_fmt="bgr0", width=4, height=2000)}.items()},
}


@pytest.mark.parametrize("name", FILES)
def test_all_kinds_of_files_give_the_frames_that_are_displayed(tmp_path, monkeypatch, name):
    times, effective, options = FILES[name]
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / name, times, **options)
    for count in (4, len(times)):
        assert frame_indices(video.read_frames(Path(name), count, 32)) == displayed(effective or times, count)


def test_side_data_that_pyav_does_not_know(tmp_path, monkeypatch):
    """libx264 puts its settings into the first frame. Here they become a kind that is not in PyAV's list."""
    path = write_video(tmp_path / "a.mp4", EVEN, codec="libx264")
    expected = video.read_frames(path, 20, 32)
    monkeypatch.delitem(Type._value2member_map_, Type.SEI_UNREGISTERED.value)
    assert torch.equal(video.read_frames(path, 20, 32), expected)


def write_streams(path: Path, levels: dict[int, Disposition], codec="mpeg4", pix_fmt="yuv420p") -> Path:
    """A video with one stream for each {grey level: disposition}."""
    with av.open(str(path), "w") as container:
        streams = [container.add_stream(codec, rate=25) for _ in levels]
        for stream, disposition in zip(streams, levels.values(), strict=True):
            stream.width, stream.height, stream.pix_fmt, stream.disposition = 48, 32, pix_fmt, disposition
        for stream, level in zip(streams, levels, strict=True):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), level, np.uint8), format="rgb24")
            container.mux([*stream.encode(frame), *stream.encode()])
    return path


@pytest.mark.parametrize("default", [0, 1, 2])
def test_the_default_stream_is_read(tmp_path, default):
    """The one of three that players show; the first where none is marked, as in AVI files."""
    levels = {40 * i: Disposition.default if i == default else Disposition(0) for i in range(3)}
    assert abs(video.read_frames(write_streams(tmp_path / "a.mkv", levels), 1, 32).float().mean() - 40 * default) < 4
    assert video.read_frames(write_streams(tmp_path / "a.avi", levels), 1, 32).float().mean() < 4


def test_a_file_that_is_not_a_video_is_one_line(tmp_path):
    """Empty, text, missing, a cover picture alone, and two lists of other files, which FFmpeg would follow."""
    video.read_frames(write_streams(tmp_path / "a.ts", {40: Disposition.default}), 1, 32)
    write_streams(tmp_path / "cover.mp4", {40: Disposition.attached_pic}, "mjpeg", "yuvj420p")
    contents = {"empty.mp4": "", "text.mp4": "no video\n" * 99, "concat.mp4": "ffconcat version 1.0\nfile a.ts\n",
                "hls.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.ts\n#EXT-X-ENDLIST\n"}
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    for name in (*contents, "none.mp4", "cover.mp4"):
        with refused(str(tmp_path / name)):
            video.read_frames(tmp_path / name, 8, 32)


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_damaged_files_are_decoded_or_an_error(tmp_path, codec):
    """60 damaged copies, seeds 0 to 59, each within 10 s: frames of the right shape, or an InputError with the name."""
    original = write_video(tmp_path / "a.mp4", EVEN, codec=codec).read_bytes()
    path, results = tmp_path / "damaged.mp4", []
    for seed in range(60):
        start_time = time.monotonic()
        path.write_bytes(damaged(original, seed))
        try:
            results.append(video.read_frames(path, 8, 32).shape == (8, 3, 32, 32))
        except InputError as error:
            results.append(None)
            assert str(path) in str(error) and str(error).isprintable(), (seed, error)
        assert time.monotonic() - start_time < 10, seed
    assert set(results) == {True, None}


PREPROCESSINGS = [Preprocessing(48, 48), Preprocessing(48, 64), Preprocessing(48, 48, squash=True)]
WIDE = Preprocessing(48, 48, squash=True, width=80)


@pytest.mark.parametrize("preprocessing", [*PREPROCESSINGS, WIDE, Preprocessing(48, 64, interpolation="bilinear")])
@pytest.mark.parametrize("shape", [(120, 200), (200, 120), (96, 96)])
def test_frames_are_resized_and_cropped_like_torchvision(preprocessing, shape):
    """A smooth random picture (seed 0) against torchvision's antialiased resize and a crop, within 4 of 255 levels."""
    picture = F.interpolate(torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(0)), shape, mode="bicubic")
    picture = (picture * 200 + 20).clamp(0, 255).to(torch.uint8)[0]
    shape, size = preprocessing.shape, preprocessing.size
    side = shape if preprocessing.squash else [preprocessing.resize]
    expected = resize(picture, side, InterpolationMode(preprocessing.interpolation), antialias=True)
    if not preprocessing.squash:
        top, left = (expected.shape[-2] - size) // 2, (expected.shape[-1] - size) // 2
        expected = expected[:, top : top + size, left : left + size]
    frame = av.VideoFrame.from_ndarray(picture.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
    found = video.frame_to_rgb(frame, preprocessing, video.VideoReformatter())
    assert found.shape == (*shape, 3)
    assert np.abs(found.transpose(2, 0, 1).astype(int) - expected.numpy().astype(int)).max() <= 4


def plain_decode(path: Path) -> list[av.VideoFrame]:
    frames = []
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1  # several threads conceal damage differently
        for packet in container.demux(video=0):
            with suppress(av.error.InvalidDataError):
                frames += [frame for frame in packet.decode() if not frame.is_corrupt]
    return frames


CLIPS = """
    clips/12727.mp4 clips/av1_video.mkv clips/h265_10bits.mp4 clips/no_duration.webm clips/realshort.mp4
    clips/unordered.mov clips/video_90.mov clips/corrupted.mp4 clips/truncated.avi
    msvd/YouTubeClips/3qqEKTPxLNs_1_15.avi
""".split()


@pytest.mark.parametrize("name", CLIPS)
def test_real_clips_give_the_frames_of_a_plain_decode(real, name):
    """1, 8 and 32 frames, bit-identical. The k-th frame in the decoder's order is displayed at the k-th sorted time."""
    frames = plain_decode(real / name)
    times = sorted(f.time for f in frames)
    for count in (1, 8, 32):
        found = video.read_frames(real / name, count, 32).numpy()
        for picture, i in zip(found, displayed(times, count), strict=True):
            expected = video.frame_to_rgb(frames[i], Preprocessing(32, 32), video.VideoReformatter())
            assert np.array_equal(picture.transpose(1, 2, 0), expected)


MATRICES = "1 0 0 1, 0 1 -1 0, -1 0 0 -1, 0 -1 1 0, -1 0 0 1, 1 0 0 -1, 0 1 1 0, 0 -1 -1 0"


@pytest.mark.parametrize("matrix", MATRICES.split(", "))
def test_turned_and_mirrored_clips_are_shown_as_players_do(tmp_path, matrix):
    """Each display matrix a, b, c, d in the file's header, against its equation, pixel by pixel, for a square clip; as
    a wide picture, which twice as many columns make, within one level on average."""
    path = write_video(tmp_path / "a.mp4", EVEN, width=32, height=32)
    stored = plain_decode(path)[0].to_ndarray(format="rgb24")
    data, (a, b, c, d) = bytearray(path.read_bytes()), map(int, matrix.split())
    start = data.index(b"tkhd") + 44  # after version, times, id, duration, layer and volume
    data[start : start + 36] = struct.pack(">9i", *(65536 * x for x in (a, b, 0, c, d, 0, 0, 0)), 2**30)
    path.write_bytes(data)
    expected = np.empty_like(stored)
    for y in range(32):
        for x in range(32):
            u, v = 2 * x - 31, 2 * y - 31  # twice the distance from the centre
            expected[(b * u + d * v + 31) // 2, (a * u + c * v + 31) // 2] = stored[y, x]
    lanczos = Preprocessing(32, 32, squash=True, interpolation="lanczos", longest_edge=32)
    for preprocessing in (32, lanczos):
        found = video.read_frames(path, 20, preprocessing)[0].permute(1, 2, 0).numpy()
        assert np.array_equal(found, expected)
    found = video.read_frames(path, 20, Preprocessing(32, 32, squash=True, width=64))[0].permute(1, 2, 0).numpy()
    assert np.abs(found.reshape(32, 32, 2, 3).mean(2) - expected).mean() < 1


@pytest.mark.parametrize("aspect", [Fraction(2), Fraction(1, 2), Fraction(16, 11)])
def test_pixels_that_are_not_square_are_stretched(tmp_path, aspect):
    """48 x 32 pixels, shown 96, 24 or 70 wide. Against FFmpeg's own resizing to the shown shape, bit for bit; a ViT
    that squashes its input sees the same as ever."""
    path = write_video(tmp_path / "a.mp4", EVEN, aspect=aspect)
    shown, frame = round(48 * aspect), plain_decode(path)[0]
    short = min(shown, 32)
    width, height = 64 * shown // short, 64 * 32 // short
    picture = frame.reformat(width, height, "rgb24", interpolation="BICUBIC").to_ndarray()
    picture = picture[(height - 64) // 2 :, (width - 64) // 2 :][:64, :64]
    assert np.array_equal(video.read_frames(path, 20, 64)[0].permute(1, 2, 0).numpy(), picture)
    square, squashed = write_video(tmp_path / "b.mp4", EVEN), Preprocessing(64, 64, squash=True)
    assert torch.equal(video.read_frames(path, 3, squashed), video.read_frames(square, 3, squashed))
