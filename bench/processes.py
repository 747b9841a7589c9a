"""Benchmarks of whole processes for `bench.py`: the scorers beside pycocoevalcap, and what loading weights takes.

Each measured process is a fresh Python that imports this file and what its work needs, so nothing heavy is imported at
the top. Its CPU seconds are those of the process with all of its children, Java among them.
"""

import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SIZES = (("MSVD size", 670, 41), ("MSR-VTT size", 2990, 20))  # videos, references a video
TOLERANCE = 1e-9

# --- captions -----------------------------------------------------------------------------------------------

# A scene is one entry of each; one caption of it takes any of the entry's words.
WHO = (
    "man,guy,person,gentleman,male/woman,lady,female,girl/boy,child,kid,little boy/girl,child,young girl"
    "/men,people,two men,guys/women,two girls,ladies/dog,puppy,brown dog,animal/cat,kitten,small cat,animal"
    "/chef,cook,man,person in a kitchen/band,group of musicians,rock band/player,athlete,soccer player,man"
    "/baby,infant,toddler,small child/panda,panda bear,bear/monkey,ape,small monkey/cyclist,biker,man,rider"
).split("/")
DOES = """cut/cuts/cutting slice/slices/slicing chop/chops/chopping;a tomato,vegetables,an onion,some food,the meat
play/plays/playing strum/strums/strumming;a guitar,the guitar,an instrument,music,an acoustic guitar
ride/rides/riding drive/drives/driving;a horse,a motorcycle,a bicycle,a bike,the car
eat/eats/eating chew/chews/chewing devour/devours/devouring;some food,a carrot,a banana,the meal,noodles
run/runs/running jog/jogs/jogging race/races/racing;quickly,with a ball,down the road,away,very fast
talk/talks/talking speak/speaks/speaking discuss/discusses/discussing;about a car,to the audience,on the phone,loudly
pour/pours/pouring put/puts/putting add/adds/adding;oil into a pan,water into the pot,some sauce,the ingredients
kick/kicks/kicking throw/throws/throwing hit/hits/hitting;a ball,the soccer ball,the ball into the net
sing/sings/singing perform/performs/performing;a song,on the stage,on stage,in a show,a musical number
jump/jumps/jumping leap/leaps/leaping;over a wall,into the water,off a cliff,on the bed,up and down
watch/watches/watching look/looks/looking;at the screen,a television,the game,at a computer
draw/draws/drawing paint/paints/painting;a picture,on a sheet of paper,a cartoon,an image""".split("\n")
WHERE = (
    "in the kitchen,in a room,at home,inside/in the park,outside,outdoors,on the grass/on a stage,at a concert"
    "/on the street,on the road,in the city/in a field,on a field,in the stadium/in the water,in a pool,at the beach"
    "/in the snow,in the woods,on a mountain/at a table,on the table,in a restaurant"
).split("/")
DOING = ["is {2}", "is {2}", "{1}", "was {2}", "can be seen to {0}"]
SIGNS = ["{}.", "{}.", "{}.", "{}!", '"{}"', "({})", "{}...", "{}, it seems", "{} - don't miss it"]


def captions(videos: int, references: int, seed: int) -> tuple[dict, dict]:
    """({id: [caption, ...]}, {id: caption}): scenes told in many ways, a rare word or punctuation here and there."""
    rng = random.Random(seed)
    rare = json.loads((HERE / "tests/golden/stem_golden.json").read_text(encoding="utf-8"))
    rare = [word for word in rare if word.isalpha()]

    def tell(who, verbs, what, where):
        doing = rng.choice(DOING).format(*rng.choice(verbs).split("/"))
        words = [rng.choice(("a", "a", "the", "some", "one")), rng.choice(who), doing, rng.choice(what)]
        if rng.random() < 0.4:
            words.append(rng.choice(where))
        if rng.random() < 0.25:
            words.insert(rng.randrange(1, len(words) + 1), rng.choice(rare))
        text = " ".join(words)
        if rng.random() < 0.1:
            text = rng.choice(SIGNS).format(text.capitalize())
        return text

    refs, hyps = {}, {}
    for i in range(videos):
        verbs, what = rng.choice(DOES).split(";")
        scene = rng.choice(WHO).split(","), verbs.split(" "), what.split(","), rng.choice(WHERE).split(",")
        *refs[f"v{i}"], hyps[f"v{i}"] = [tell(*scene) for _ in range(references + 1)]
    return refs, hyps


def real_captions(folder: Path) -> list[tuple[str, dict]]:
    """[(name, {id: [caption, ...]})] of MSVD's and MSR-VTT's test videos, from their published files."""
    msvd, msrvtt = {}, {}
    for line in (folder / "msvd/AllVideoDescriptions.txt").read_text(encoding="utf-8").splitlines():
        key, _, text = line.partition(" ")
        if text and not key.startswith("#"):
            msvd.setdefault(key, []).append(text)
    test = (folder / "msvd/test_list.txt").read_text(encoding="utf-8").split()
    for row in json.loads((folder / "msrvtt/test_videodatainfo.json").read_text(encoding="utf-8"))["sentences"]:
        msrvtt.setdefault(row["video_id"], []).append(row["caption"])
    return [("MSVD test", {key: msvd[key] for key in test}), ("MSR-VTT test", msrvtt)]


def corpora() -> list[tuple[str, dict, dict]]:
    """[(name, references, hypotheses)]: real captions where QADAPTER_REAL has them, else made ones of both sizes.

    The hypothesis of a real video is one of its captions, taken out by chance.
    """
    if not os.environ.get("QADAPTER_REAL"):
        return [(f"{name}, {n} x {k}", *captions(n, k, seed=n)) for name, n, k in SIZES]
    rng, found = random.Random(0), []
    for name, groups in real_captions(Path(os.environ["QADAPTER_REAL"])):
        references = {key: list(group) for key, group in groups.items()}
        hypotheses = {key: group.pop(rng.randrange(len(group))) for key, group in references.items()}
        found.append((f"{name}, {len(references)} real videos", references, hypotheses))
    return found


# --- processes ----------------------------------------------------------------------------------------------


def work(name: str, given: str, out: str) -> None:
    """What a measured process does: calls this file's function `name` and writes its result and memory."""
    result = globals()[name](given)
    pages = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    figures = {"MB": int(pages.group(1)) / 1024, "child MB": children / 1024}
    Path(out).write_text(json.dumps([result, figures]), encoding="utf-8")


def measured(name: str, given: Path, **environment: str) -> tuple[object, dict]:
    """Runs a function of this file in a fresh Python: (its result, its figures).

    Figures: CPU and wall seconds of the process with all its children; peak resident memory in MiB of the process
    ("MB") and of its largest child ("child MB").
    """
    with tempfile.TemporaryDirectory() as folder:
        out, printed, begun = Path(folder, "out"), Path(folder, "printed"), time.perf_counter()
        with open(printed, "wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-c", "import sys, bench_processes as b; b.work(*sys.argv[1:])", name, given, out],
                cwd=HERE, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, stdout=file, stderr=file,
            )  # fmt: skip
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"error: {name}: the measured process failed:\n{printed.read_text(errors='replace')[-2000:]}")
        result, memory = json.loads(out.read_text(encoding="utf-8"))
    seconds = {"CPU s": usage.ru_utime + usage.ru_stime, "wall s": time.perf_counter() - begun}
    return result, seconds | memory


def median(runs: list[dict]) -> dict:
    """The median of each figure, and how many runs it is of."""
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]} | {"runs": len(runs)}


# --- metrics ------------------------------------------------------------------------------------------------


def ours(given: str) -> dict:
    """{metric: [corpus score, score a video, ...]} of a file of captions, as `metrics` computes it."""
    import metrics

    scores = metrics.score(*json.loads(Path(given).read_text(encoding="utf-8")), strict=True)
    return {name: [total, *(row[name] for row in scores.per_video.values())] for name, total in scores.corpus.items()}


def pycocoevalcap(given: str) -> dict:
    """The same, as pycocoevalcap computes it with Java."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    references, hypotheses = json.loads(Path(given).read_text(encoding="utf-8"))
    refs = PTBTokenizer().tokenize({key: [{"caption": text} for text in refs] for key, refs in references.items()})
    hyps = PTBTokenizer().tokenize({key: [{"caption": text}] for key, text in hypotheses.items()})
    totals, rows = Bleu(4).compute_score(refs, hyps)
    found = {f"Bleu_{n}": [totals[n - 1], *rows[n - 1]] for n in range(1, 5)}
    for name, kind in ("METEOR", Meteor), ("ROUGE_L", Rouge), ("CIDEr", Cider):
        scorer = kind()
        total, row = scorer.compute_score(refs, hyps)
        found[name] = [total, *row]
        del scorer  # METEOR's ends its Java process, which counts only then
    return {name: [float(value) for value in values] for name, values in found.items()}


def compare_metrics(repeats: int) -> list[dict]:
    """The caption metrics beside pycocoevalcap's, cold (the paraphrases not compiled yet) and warm."""
    rows = []
    for corpus, references, hypotheses in corpora():
        with tempfile.TemporaryDirectory() as folder:
            given = Path(folder, "captions.json")
            given.write_text(json.dumps([references, hypotheses]), encoding="utf-8")
            expected, theirs = measured("pycocoevalcap", given)
            runs = [measured("ours", given, XDG_CACHE_HOME=folder) for _ in range(repeats + 1)]
        for found, _ in runs:
            assert found.keys() == expected.keys()
            for name, values in expected.items():
                far = max(abs(a - b) for a, b in zip(values, found[name], strict=True))
                assert far <= TOLERANCE, f"{corpus}: {name} differs by {far}"
        rows.append({"what": f"{corpus}: pycocoevalcap"} | median([theirs]))
        for label, group in ("cold", runs[:1]), ("warm", runs[1:]):
            row = median([figures for _, figures in group])
            rows.append({"what": f"{corpus}: ours, {label}"} | row | {"ratio": theirs["CPU s"] / row["CPU s"]})
    return rows


# --- loading ------------------------------------------------------------------------------------------------


def load(folder: str) -> float:
    """Loads a model and adds up every weight; of "nothing" it only imports what that needs."""
    from lm import CausalLM

    return 0.0 if folder == "nothing" else sum(p.sum().item() for p in CausalLM.from_pretrained(folder).parameters())


def compare_loading(repeats: int) -> list[dict]:
    """Peak memory of a fresh process that loads a checkpoint of about 1 GB, less that of one that loads nothing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(hidden_size=1024, num_hidden_layers=14, num_attention_heads=16, num_key_value_heads=16)
    model, rows = LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=3072)), []
    expected, (_, nothing) = sum(p.sum().item() for p in model.parameters()), measured("load", "nothing")
    for label, shard in (("one file", "9GB"), ("shards of 300 MB", "300MB")):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, max_shard_size=shard)
            size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) / 2**20
            found, loaded = measured("load", folder)
        assert abs(found - expected) < 1e-4 * abs(expected), f"{label}: the weights add up to {found}, not {expected}"
        taken = loaded["MB"] - nothing["MB"]
        rows.append({"what": f"loading {size:.0f} MB, {label}", "MB": taken, "of its size": taken / size})
    return rows
