"""What is computed once and kept on disk: the frames of clips, and what the frozen ViT makes of them.

Either is a file of rows of one shape. Each row has a key, a hash of all that the row depends on, and is good as long
as that is the key asked for. Filling a file takes hours for a large dataset, so it goes on where it was stopped.

    PATH         the rows and nothing else; there only when all are good, and never written to: others may map it
    PATH.part    the rows until then, with holes where there is none yet
    PATH.keys    32 bytes a row, zeros for none; they tell of PATH where that is there, else of PATH.part
    PATH.lock    beside them, held by the one process that writes

A key must tell the truth whenever the program is killed or the machine stops [1]. So the order of writes is:

    1. PATH, where some of its rows are good, is copied to PATH.part; then it is removed.
    2. Keys of other rows become zeros, before a byte of these rows is written.
    3. Rows are written to PATH.part; now and then it is flushed to the disk, and only then come those rows' keys.
    4. With the last key on the disk, PATH.part is renamed to PATH.

Where no row is good, PATH.keys goes first and all else after it. Frames are decoded by worker processes, but only
the process with the lock writes; a worker that outlives it can spoil nothing.

Letters: M candidate frames kept of a clip, S side in pixels.

[1] T. Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014.
"""

import hashlib
import json
import math
import os
import shutil
import signal
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic
from typing import BinaryIO

import numpy as np
import torch

from cli import clock
from corpora import Clip
from download import amount, check_room
from pixels import Pixels
from video import plain_view, read_frames
from weights import InputError, sync_folder

READING = 2  # raised when `read_frames` picks or makes frames in another way than before
FLUSH = 1.0  # seconds between flushes; so much work at most is done again after a kill
Made = Iterator[tuple[int, np.ndarray]]  # rows with their numbers, in any order


# ------------------------------------------------------------------------------------ rows and keys


def _write(file: BinaryIO, offset: int, data: bytes | memoryview) -> None:
    """All of `data` into an unbuffered file, which may take less at a time."""
    file.seek(offset)
    data = memoryview(data)
    while data:
        data = data[file.write(data) :]


@contextmanager
def _alone(lock: Path, report) -> Iterator[None]:
    """Keeps other processes out; the system lets go of the lock whatever ends us."""
    import fcntl  # which Windows lacks; a whole file can be used without it

    with open(lock, "ab") as file:
        try:  # lockf: forked workers would share a flock, and keep it when we are killed
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # POSIX allows either
            report(f"{lock.with_suffix('')}: waiting for another process that makes it")
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _progress(before: int, rows: int, what: str, report) -> Callable[[int], None]:
    """A function to call with the rows made so far; it tells the time left every 5 s, then more and more seldom."""
    begun = last = monotonic()
    pause = 5.0

    def tell(made: int) -> None:
        nonlocal last, pause
        now = monotonic()
        if now - last >= pause:
            left = (now - begun) / made * (rows - before - made)
            report(f"{what}: {before + made}/{rows} clips, {clock(left)} left")
            last, pause = now, pause * 1.5

    return tell


class _Rows:
    """Rows of one shape and dtype in the file `path`; row i is good if it was made with keys[i]."""

    def __init__(self, path: Path, keys: list[str], shape: tuple[int, ...], dtype: type):
        path = Path(os.path.realpath(path))  # a link stays a link
        self.path, self.part, self.index = path, *(path.with_name(path.name + end) for end in (".part", ".keys"))
        self.shape, self.dtype = (len(keys), *shape), np.dtype(dtype)
        self.row_bytes = math.prod(shape) * self.dtype.itemsize
        digests = [hashlib.sha256(json.dumps([key, shape, self.dtype.str]).encode()).digest() for key in keys]
        self.keys = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)

    def whole(self) -> np.memmap | None:
        """All rows, mapped; None unless all are good. Needs no lock."""
        with suppress(FileNotFoundError), open(self.path, "rb") as file:
            state = os.fstat(file.fileno())
            good = state.st_size == len(self.keys) * self.row_bytes and self.index.read_bytes() == self.keys.tobytes()
            if good and os.path.samestat(state, os.stat(self.path)):  # else the keys may tell of the next file already
                return np.memmap(file, self.dtype, "r", shape=self.shape)
        return None

    def _good(self, file: Path) -> np.ndarray:
        """Which rows of the file are good, bool (rows,)."""
        with suppress(FileNotFoundError):
            found = np.fromfile(self.index, np.uint8)
            if found.size == self.keys.size and file.stat().st_size == len(self.keys) * self.row_bytes:
                return (found.reshape(-1, 32) == self.keys).all(1)
        return np.zeros(len(self.keys), bool)

    def _begin(self, what: str) -> np.ndarray:
        """Makes the part ready for rows, steps 1 and 2; -> which are good already, bool (rows,). Raises InputError."""
        whole = self.path.exists()
        good = self._good(self.path if whole else self.part)
        again = not good.any()
        needed = len(good) if whole or again else int((~good).sum())
        check_room(self.path.parent, needed * self.row_bytes, f"{self.path}, {what}")
        if again:
            self.index.unlink(missing_ok=True)
            sync_folder(self.path.parent)
            self.path.unlink(missing_ok=True)
            self.part.unlink(missing_ok=True)
            with open(self.part, "xb") as file:
                file.truncate(len(good) * self.row_bytes)
        elif whole:
            shutil.copyfile(self.path, self.part)
            with open(self.part, "rb+") as file:
                os.fsync(file.fileno())
            self.path.unlink()
        sync_folder(self.path.parent)  # before the keys change: they must not meet the old file again
        with open(self.index, "wb" if again else "rb+", 0) as file:
            _write(file, 0, np.where(good[:, None], self.keys, np.uint8(0)).tobytes())
            os.fsync(file.fileno())
        return good

    def _confirm(self, part: BinaryIO, index: BinaryIO, numbers: list[int]) -> None:
        """Notes the keys of rows that were written. The list is emptied."""
        if numbers:
            os.fsync(part.fileno())
        for number in numbers:
            _write(index, 32 * number, self.keys[number].tobytes())
        numbers.clear()

    def _fill(self, make: Callable[[list[int]], Made], what: str, report) -> None:
        """Writes the rows that are missing, steps 3 and 4."""
        good, begun = self._begin(what), monotonic()
        tell, flushed, written = _progress(int(good.sum()), len(good), what, report), begun, []
        with (
            open(self.part, "rb+", 0) as part,
            open(self.index, "rb+", 0) as index,
            closing(make(np.flatnonzero(~good).tolist())) as rows,
        ):
            try:
                for made, (number, row) in enumerate(rows, start=1):
                    assert (row.shape, row.dtype) == (self.shape[1:], self.dtype)
                    _write(part, number * self.row_bytes, np.ascontiguousarray(row).reshape(-1).view(np.uint8))
                    written.append(number)
                    if monotonic() - flushed >= FLUSH:
                        self._confirm(part, index, written)
                        flushed = monotonic()
                    tell(made)
            finally:  # whatever went wrong, a bad clip or Ctrl-C: these rows are good
                self._confirm(part, index, written)
            os.fsync(index.fileno())
        os.replace(self.part, self.path)
        sync_folder(self.path.parent)
        report(f"{what}: {len(good)}/{len(good)} clips in {self.path}, {clock(monotonic() - begun)}")

    def get(self, make: Callable[[list[int]], Made], what: str, report) -> np.memmap:
        """All rows, mapped; `make` is given the numbers of those that are missing and yields them.

        Raises InputError for want of room, and what `make` raises; rows made until then stay for the next time.
        """
        if (rows := self.whole()) is None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with _alone(self.path.with_name(self.path.name + ".lock"), report):
                    if (rows := self.whole()) is None:  # another process may have made it meanwhile
                        self._fill(make, what, report)
                        rows = self.whole()
            except OSError as error:
                raise InputError(f"cannot write {self.path}: {error.strerror or error}") from error
        assert rows is not None
        return rows


# ------------------------------------------------------------------------------------------- frames


def _decode(pipe: Connection, parents_end: Connection, count: int, view: Pixels) -> None:
    """A worker: paths come in, their frames (M, 3, S, S) or the InputError go out, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parents_end.close()  # a forked copy, with which the pipe would never break
    with suppress(EOFError, ConnectionError):
        while True:
            path = pipe.recv()
            try:
                answer = read_frames(path, count, view).numpy()
            except InputError as error:
                answer = error
            pipe.send(answer)


@contextmanager
def _workers(number: int, *args) -> Iterator[list[Connection]]:
    """So many processes that decode, each at the other end of a pipe; they are killed when the block ends."""
    pipes, processes = [], []
    # Ctrl-C is for us alone, who then kill them. What is blocked stays so in forked ones, until they ignore it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        try:
            for _ in range(number):
                ours, theirs = Pipe()
                process = Process(target=_decode, args=(theirs, ours, *args), daemon=True)
                process.start()
                theirs.close()
                pipes.append(ours)
                processes.append(process)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield pipes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def _decoded(paths: list[Path], numbers: list[int], count: int, view: Pixels, workers: int) -> Made:
    """Frames of the clips with these numbers, as they come. Raises InputError for one that cannot be decoded.

    A worker has two clips to do at a time, so that it need not wait for the next; no more frames than that pile up.
    """
    if not numbers:
        return
    todo = iter(numbers)
    with _workers(min(workers or os.cpu_count() or 1, len(numbers)), count, view) as pipes:
        doing = {pipe: deque() for pipe in pipes}

        def give(pipe: Connection) -> None:
            if (number := next(todo, None)) is not None:
                doing[pipe].append(number)
                with suppress(ConnectionError):  # a dead worker is found out below
                    pipe.send(paths[number])

        for pipe in 2 * pipes:
            give(pipe)
        while busy := [pipe for pipe in pipes if doing[pipe]]:
            for pipe in wait(busy):
                number = doing[pipe].popleft()
                try:
                    answer = pipe.recv()
                except (EOFError, OSError) as error:
                    raise InputError(f"{paths[number]}: the process that decoded it died") from error
                if isinstance(answer, InputError):
                    raise answer
                give(pipe)
                yield number, answer


def frame_keys(clips: list[Clip], count: int, view: int | Pixels) -> list[str]:
    """What the frames kept of each clip depend on: its file, their count and the view."""
    view, keys = plain_view(view), []
    for clip in clips:
        state = clip.path.stat()
        file = clip.id, state.st_size, state.st_mtime_ns
        keys.append(json.dumps([READING, *file, count, view.size, view.resize, view.squash, view.interpolation]))
    return keys


def cached_frames(clips: list[Clip], path: Path, count: int, view: int | Pixels, workers: int,
                  report=print) -> np.ndarray:  # fmt: skip
    """Decodes each clip once: M = `count` segment centres of each, uint8 (clips, M, 3, S, S), memory-mapped.

    Clips whose frames `path` or what was begun of it holds already, of the same file, count and view, are not decoded
    again, as long as they are as many clips in the same order. Raises InputError for a clip that cannot be decoded and
    for want of room; what is done by then is kept.
    """
    view, paths = plain_view(view), [clip.path for clip in clips]
    rows = _Rows(path, frame_keys(clips, count, view), (count, 3, view.size, view.size), np.uint8)
    return rows.get(lambda missing: _decoded(paths, missing, count, view, workers), "frames", report)


# ----------------------------------------------------------------------------------------- features


def cached_features(frames: np.ndarray, path: Path, key: str | list[str], encode, images: int,
                    report=print) -> np.ndarray:  # fmt: skip
    """What the frozen ViT makes of cached frames (clips, M, 3, S, S), kept once: memory-mapped bf16 (clips, M, ...).

    numpy knows no bf16, so the array's type is that of its bits, uint16; `data.Examples` makes tensors of it.

    encode: uint8 tensor (B, M, 3, S, S) -> bf16 tensor (B, M, ...); it is given about so many images at a time. `key`,
    one for all clips or one for each, has to name all that a clip's features depend on: with the same key they are
    not computed again. Raises InputError for want of room; what is done by then is kept.
    """
    shape = tuple(encode(torch.from_numpy(np.array(frames[:1]))).shape[1:])
    rows = _Rows(path, [key] * len(frames) if isinstance(key, str) else key, shape, np.uint16)
    batch = max(1, images // frames.shape[1])

    def encoded(missing: list[int]) -> Made:
        report(f"features: {amount(len(missing) * rows.row_bytes)} go into {path}")
        for i in range(0, len(missing), batch):
            numbers, begun = missing[i : i + batch], monotonic()
            features = encode(torch.from_numpy(np.asarray(frames[numbers]))).view(torch.uint16).numpy()
            if i == batch:  # the first one takes longer
                left = (monotonic() - begun) / len(numbers) * (len(missing) - i - len(numbers))
                report(f"features: about {clock(left)} to go")
            yield from zip(numbers, features, strict=True)

    return rows.get(encoded, "features", report)
