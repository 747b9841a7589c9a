"""What is published of the real datasets, where, and how to lay it out; `--download` fetches it.

Nothing of it is ours, and no address here could be tried where this was written: addresses and sizes are those that
other programs and pages state.
"""

import lzma
import os
import tarfile
import zipfile
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

from download import check_room, fetch
from weights import InputError

# Each an archive that is unpacked, or a file. Unverified: see above.
ADDRESSES = {
    "msvd": ["https://www.cs.utexas.edu/users/ml/clamp/videoDescription/AllVideoDescriptions.txt",
             "https://www.cs.utexas.edu/users/ml/clamp/videoDescription/YouTubeClips.tar"],
    "msrvtt": ["https://github.com/ArrowLuo/CLIP4Clip/releases/download/v0.0/msrvtt_data.zip",
               "https://www.robots.ox.ac.uk/~maxbain/frozen-in-time/data/MSRVTT.zip"],
}  # fmt: skip


# What Python's modules raise for archives that are damaged, encrypted or of a kind they do not know.
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, RuntimeError)


def download(dataset: str, root: Path, report=print) -> None:
    """Fetches what there is of a dataset into `root`, goes on after a break, and unpacks it; what is there stays.

    Raises InputError in one line for all that may go wrong.
    """
    if dataset not in ADDRESSES:
        raise InputError(f"--download: nothing is published of {dataset!r}, only of {', '.join(ADDRESSES)}")
    for url in ADDRESSES[dataset]:
        path = root / Path(urlsplit(url).path).name
        done = path.with_name(f".{path.name}.unpacked")
        if done.exists():
            continue
        report(f"fetching {url} into {root}")
        fetch(url, path, size=None, sha256=None, report=report)
        if path.suffix in (".tar", ".zip"):
            unpack(path, root, report)
            done.touch()
            path.unlink()


def unpack(archive: Path, root: Path, report=print) -> None:
    """Moves what is in an archive into `root`, when all of it is out; what is there already stays. No file of it comes
    to lie elsewhere."""
    try:
        with TemporaryDirectory(dir=root, prefix=".unpacking") as folder:
            if archive.suffix == ".tar":
                with tarfile.open(archive) as file:
                    check_room(root, sum(member.size for member in file), str(archive))
                    file.extractall(folder, filter="data")
            else:
                with zipfile.ZipFile(archive) as file:
                    check_room(root, sum(member.file_size for member in file.infolist()), str(archive))
                    file.extractall(folder)  # which takes .. and / out of names itself
            for path in sorted(Path(folder).iterdir()):
                if (root / path.name).exists():  # the user's, or from a try that was cut short here
                    report(f"{path.name} is in {root} already and stays as it is")
                    continue
                os.rename(path, root / path.name)
    except DAMAGED as error:
        raise InputError(f"{archive}: cannot be unpacked: {error}; delete it to fetch it again") from error


HELP = {
    "msvd": """\
MSVD (Microsoft Research Video Description Corpus): 1,970 short clips. Put into the folder that --data names:

    YouTubeClips/                   the clips, ID.avi (or .mp4; vidN.avi with youtube_mapping.txt), 1.7 GB
    AllVideoDescriptions.txt        the captions; raw-captions.pkl or MSR_Video_Description_Corpus.csv will do as well
    youtube_mapping.txt             or train_list.txt, val_list.txt, test_list.txt; with captions of all clips neither
                                    is needed

Folders below are looked through too. The clips and AllVideoDescriptions.txt are published by their authors at
    https://www.cs.utexas.edu/users/ml/clamp/videoDescription/
raw-captions.pkl and the lists are in msvd_data.zip of
    https://github.com/ArrowLuo/CLIP4Clip/releases/tag/v0.0
--download fetches the former two, from an address that could not be tried. The clips are of YouTube and come without a
licence: for research.""",
    "msrvtt": """\
MSR-VTT: 10,000 clips, 20 captions each. Put into the folder that --data names:

    TrainValVideo/, TestVideo/      the clips, videoN.mp4, in these folders or in one, 6 GB
    MSRVTT_data.json                captions and splits; or train_val_videodatainfo.json and test_videodatainfo.json

Folders below are looked through too. The page of Microsoft that published it is gone; copies that people use:
    clips       https://www.robots.ox.ac.uk/~maxbain/frozen-in-time/data/MSRVTT.zip
    captions    msrvtt_data.zip of https://github.com/ArrowLuo/CLIP4Clip/releases/tag/v0.0
With --download they are fetched from there, from addresses that could not be tried. The clips are of YouTube and come
without a licence: for research.""",
    "folder": """\
Your own clips: put into the folder that --data names a file captions.json,

    {"train": {"a.mp4": ["a man opens a door", "someone comes in"], "more/b.mov": ["a dog barks"]},
     "val": {"c.mp4": ["a cat sleeps"]},
     "test": {"d.mp4": ["a child paints"]}}

with the videos' names as seen from there. val chooses the best weights, test is scored once, at the end.""",
}
