"""Windows of a long video. Reference: a search through all of its frames."""

import math

import numpy as np
import pytest

from common.preprocessing import Preprocessing
from tests.common.helpers import refused
from tests.video_data.test_video import EVEN, frame_indices, plain_decode, write_video
from video_data import windows
from video_data.windows import format_srt, iter_windows

SQUARE = Preprocessing(32, 32)


def expected_windows(times: list[float], length: float, count: int) -> list[tuple]:
    """(start, end, index of the frame displayed at each centre), by a search through all frames for each centre."""
    end = times[-1] + (times[-1] - times[0]) / (len(times) - 1)
    found, k = [], 0
    while (start := times[0] + k * length) < end:
        stop = min(start + length, end)
        centres = [start + (stop - start) * (i + 0.5) / count for i in range(count)]
        if k == 0 or start + length / count / 2 < stop:
            found.append((start, stop, [max(i for i, t in enumerate(times) if t <= x + 1e-9) for x in centres]))
        k += 1
    return found


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("length", [0.37, 0.5, 0.1, 0.03, 5.0])
@pytest.mark.parametrize("times", [EVEN, [0, 1, 2, 3, 40, 41, 90, 95, 96, 97]])
def test_windows_have_the_frames_displayed_at_their_centres(tmp_path, times, length, count):
    """Windows shorter than a frame to longer than the video. The last one has its frames from what there is."""
    found = list(iter_windows(write_video(tmp_path / "a.mp4", times), length, count, SQUARE))
    expected = expected_windows([t / 100 for t in times], length, count)
    assert [(start, end) for start, end, *_ in found] == [pytest.approx(row[:2]) for row in expected]
    assert [frame_indices(frames) for _, _, frames, _ in found] == [row[2] for row in expected]
    end = times[-1] / 100 + times[-1] / 100 / (len(times) - 1)
    for (*_, seconds), (*_, indices) in zip(found, expected, strict=True):  # of the file, not of the window
        assert seconds == pytest.approx([*(times[i] / 100 for i in indices), end], abs=1e-4)


def test_a_video_of_one_frame_has_one_window(tmp_path):
    ((start, end, frames, times),) = iter_windows(write_video(tmp_path / "a.mp4", [0]), 2.0, 4, SQUARE)
    assert (start, end) == (0, windows.ONE_FRAME) and frames.shape == (4, 3, 32, 32)
    assert times == [0, 0, 0, 0, windows.ONE_FRAME]


def test_times_count_from_the_start_of_the_file(tmp_path):
    """As players count. The clock of a transport stream does not begin at 0, but the file does at its first frame."""
    path = write_video(tmp_path / "a.ts", [150 + t for t in EVEN])
    found = list(iter_windows(path, 0.2, 2, SQUARE))
    assert [start for start, *_ in found] == pytest.approx([0, 0.2, 0.4, 0.6])
    assert [frame_indices(frames) for _, _, frames, _ in found] == [[1, 3], [6, 8], [11, 13], [16, 18]]


@pytest.mark.parametrize("start, end, last", [
    (0.0, 0.8, [15, 17, 19]), (0.0, 0.95, [16, 16, 18]), (math.inf, math.inf, [16, 16, 18]), (0.0, 0.5, [16, 16, 18]),
    (9.0, 0.8, [15, 17, 19]), (-0.5, 0.8, [15, 17, 19])])
def test_what_packets_say_may_be_wrong(tmp_path, monkeypatch, start, end, last):
    """A later end, as where the last ones are damaged, none, or an earlier one; a start after the first frame. Where
    it is before that, as that of a sound, times count from there."""
    monkeypatch.setattr(windows, "find_bounds", lambda path: (start, end, 1))
    found, sound = list(iter_windows(write_video(tmp_path / "a.mp4", EVEN), 0.3, 3, SQUARE)), max(0, -start)
    assert (found[0][0], found[-1][1]) == pytest.approx((sound, 0.8 + sound)) and frame_indices(found[-1][2]) == last


def test_a_clock_that_steps_is_refused_where_it_does(tmp_path):
    """Two transport streams in one file: the windows of the first come, then an error, not silence. Two frames a day
    later: no window for each second of the day."""
    first = write_video(tmp_path / "a.ts", [200 + t for t in EVEN]).read_bytes()
    (tmp_path / "c.ts").write_bytes(first + write_video(tmp_path / "b.ts", EVEN).read_bytes())
    found = iter_windows(tmp_path / "c.ts", 0.4, 2, SQUARE)
    assert frame_indices(next(found)[2]) == [2, 7]
    with refused("c.ts: its clock steps from 2.76 s to 0.00 s"):
        next(found)
    with refused("its clock steps from 0.12 s to 86400.00 s"):
        list(iter_windows(write_video(tmp_path / "a.mkv", [0, 4, 8, 12, 8_640_000, 8_640_004]), 1.0, 2, SQUARE))


def test_times_that_step_back(tmp_path):
    """As FFmpeg invents them for B-frames in AVI: a frame before a step back is not displayed."""
    path = write_video(tmp_path / "a.avi", range(20), codec="libx264", options={"bf": "2"})
    stored = [frame.time for frame in plain_decode(path)]
    times = np.maximum.accumulate(stored).tolist()
    found, expected = list(iter_windows(path, 0.06, 3, SQUARE)), expected_windows(times, 0.06, 3)
    assert stored != times
    for (_, _, frames, seconds), (_, _, indices) in zip(found, expected, strict=True):
        assert frame_indices(frames) == indices and seconds[:3] == pytest.approx([times[i] for i in indices])


def test_a_window_is_ready_before_the_next_is_decoded(tmp_path, monkeypatch):
    """However long the video is, not more of it is held than the windows that are open: one and a bit."""
    decoded = []

    def count(path, real=windows.video.decode_frames):
        for time, frame in real(path):
            decoded.append(time)
            yield time, frame

    monkeypatch.setattr(windows.video, "decode_frames", count)
    found = iter_windows(write_video(tmp_path / "a.mp4", EVEN), 0.2, 2, SQUARE)
    for k in range(3):
        next(found)
        assert decoded[-1] == pytest.approx(0.2 * (k + 1), abs=0.05)


def test_a_subtitle():
    """By hand: milliseconds are rounded; times over an hour."""
    assert format_srt(3, 59.9996, 3723.004, "two words") == "3\n00:01:00,000 --> 01:02:03,004\ntwo words\n\n"
