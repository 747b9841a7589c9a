"""Small tables in METEOR's file formats."""

import gzip
import zipfile
from pathlib import Path

from metrics import meteor_data

PAIRS = [("a lot of", "many"), ("a lot of", "lots of"), ("kid", "youngster"), ("émigré", "exile")]
PAIRS += [("a b c d e f g", "alphabet")]


def write_tables(folder: Path, pairs=PAIRS) -> Path:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / meteor_data.JAR, "w") as archive:
        archive.writestr("function/english.words", "a\nthe\nof\n")
        archive.writestr("nonbreaking/english.prefixes", "# comment\nMr\nNo #NUMERIC_ONLY#\n")
        archive.writestr("synonym/english.synsets", "car\n00000001 00000002\nautomobile\n00000001\nrun\n00000003\n")
        archive.writestr("synonym/english.exceptions", "run\nran running\n")
    text = "".join(f"0.5\n{left}\n{right}\n" for left, right in pairs)
    (folder / meteor_data.PARAPHRASES).write_bytes(gzip.compress(text.encode("utf-8"), mtime=0))
    return folder
