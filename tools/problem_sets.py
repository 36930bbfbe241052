"""Six problem sets. What is handed in is an adapter: the page `book/problem_sets.md`.

    python tools/problem_sets.py variant ID
    python tools/problem_sets.py check FOLDER --id ID --set N
    python tools/problem_sets.py grade HANDINS --secret FILE --out grades.csv

`variant` prints which languages or classes a student gets: they follow from the ID.
`check` is for students: the limits, whether the adapter loads, its score on public
records of the dev split. `grade` is for the instructor: every folder HANDINS/ID/setN,
on hidden records of the test split, drawn with the secret in FILE.

A hand-in is data, never code: a folder with `adapter_config.json` and
`adapter_model.safetensors`, as `peft_files.save` or peft's `save_pretrained` writes it.
Nothing of it is run or unpickled. This file needs nothing but peftlab.
"""

import argparse
import copy
import csv
import json
import os
import re
import sys
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load_file

from peftlab import peft_files, surgery
from peftlab.adapter_folder import CONFIG, WEIGHTS
from peftlab.kit import base_models, data, icd, measure, tasks

LANGUAGES = tuple("de fi pl tr sw cs hr lv cy uz vi".split())
CLASSES = 6  # of the 18 chapters of ICD-10-CM, in an order of the student's own
LARGEST = 1_000_000  # bytes of a folder, all its files together
LONGEST_PROMPT = 100  # virtual tokens
OLD = {"base dates": "dates", "refusals": "refuse"}  # what the base can do: its kind
BLOCK = 32  # weights of set 5 that share a scale
RECORDS = 200  # in each part of a score
ANOTHER = 0.5  # the share of another variant's records from which we name it
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
EXPRESSIONS = ("target_modules", "exclude_modules", "feedforward_modules")
SECRET = 16  # characters at least
COLUMNS = ("id", "set", "variant", "score", "points", "of", "parts", "note")


@dataclass(frozen=True)
class ProblemSet:
    """One of the six: its base, its limit, and {lowest score: points}."""

    title: str
    points: dict
    languages: int = 1  # in a variant; 0 for set 4
    base: str = "tiny-decoder"
    parameters: int | None = None  # in the file, at most
    rounded: bool = False  # the base's linear layers have three values a block
    also: tuple = ()  # parts that count beside the languages


SETS = {
    1: ProblemSet("A language", {0.5: 3, 0.7: 6, 0.85: 10}),
    2: ProblemSet(
        "An eighth of the file", {0.3: 3, 0.5: 6, 0.7: 10}, parameters=10_000
    ),
    3: ProblemSet("Learn and retain", {0.4: 3, 0.6: 6, 0.75: 10}, also=tuple(OLD)),
    4: ProblemSet(
        "Six classes", {0.35: 3, 0.5: 6, 0.6: 10}, languages=0, base="MiniLM"
    ),
    5: ProblemSet(
        "A broken base", {0.4: 3, 0.6: 6, 0.75: 10}, rounded=True, also=("base dates",)
    ),
    6: ProblemSet("Two in one", {0.4: 3, 0.6: 6, 0.75: 10}, languages=2),
}


class Refused(ValueError):
    """A hand-in that is not scored; the message is a sentence for the student."""


# Variants


def check_id(student):
    """ValueError for what is no ID: 1 to 64 letters, digits, and . _ - inside."""
    if not isinstance(student, str) or not re.fullmatch(
        r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?", student
    ):
        raise ValueError(
            f"an ID has 1 to 64 letters, digits and . _ - inside, not {student!r:.80}"
        )


def check_number(number):
    """ValueError for what is no problem set."""
    if type(number) is not int or number not in SETS:
        raise ValueError(f"there are the sets 1 to {len(SETS)}, not {number!r:.40}")


def _hash(*words):
    return sha256(" ".join(map(str, words)).encode()).hexdigest()


def variant(student, number):
    """What a student gets: names of languages, or for set 4 of classes in their order.

    Args:
        student: the ID. Small and capital letters are the same.
        number: of the set, 1 to 6.

    Returns:
        A tuple of strings.

    Raises:
        ValueError: for what is no ID or no set.
    """
    check_id(student)
    check_number(number)
    count = SETS[number].languages
    names = LANGUAGES if count else icd.CHAPTERS
    who = student.lower()
    drawn = sorted(names, key=lambda name: _hash("peftlab", who, number, name))
    return tuple(drawn[: count or CLASSES])


def seed(student, number):
    """A seed of the student's own, so that no two hand-ins are equal by chance."""
    check_id(student)
    check_number(number)
    return int(_hash("seed", student.lower(), number)[:6], 16)


# Bases and records


def base(number):
    """The model that a set starts from, and its tokenizer.

    For set 4 a classifier of six classes whose head is new, drawn with seed 0. For set
    5 every linear layer but the output head is rounded to three values a block.

    Args:
        number: of the set.

    Returns:
        (model, tokenizer), on the CPU, in float32 and in eval mode.
    """
    check_number(number)
    if SETS[number].base != "tiny-decoder":
        encoder, tokenizer = base_models.load_minilm(device="cpu")
        config = copy.deepcopy(encoder.config)
        config.num_labels = CLASSES
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = icd.MeanClassifier(config)
        encoder.pooler = None
        model.bert.load_state_dict(encoder.state_dict())
        return model.eval(), tokenizer

    model, tokenizer = base_models.load("tiny-decoder", device="cpu")
    if SETS[number].rounded:
        for layer in surgery.select(model, "all-linear"):
            layer.weight.data.copy_(three_values(layer.weight.data))
    return model, tokenizer


def three_values(weight):
    """A matrix rounded to -a, 0 and a, where a is the largest size in each block.

    Args:
        weight: (out, in), whose weights are a multiple of `BLOCK`.
    """
    if weight.numel() % BLOCK:
        raise ValueError(f"{weight.numel()} weights are no whole blocks of {BLOCK}")
    blocks = weight.reshape(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True).clamp_min(1e-12)  # (blocks, 1)
    return (torch.round(blocks / largest) * largest).view_as(weight)


def spelled(language, n, split, seed=0):
    """n dates of a language, the month in words: 4.3.2031 needs no learning."""
    for more in (2, 4, 8):
        drawn = data.records("dates", language, more * n, split, seed)
        found = [r for r in drawn if any(c.isalpha() for c in r.text)]
        if len(found) >= n:
            return found[:n]
    raise ValueError(f"{language} has too few dates in words")


def records(number, names, split="dev", seed=0, n=RECORDS):
    """What a variant is scored on.

    Args:
        number: of the set.
        names: the variant.
        split: "dev" is public; hidden records are of "test".
        seed: of the draw.
        n: records in each part, at least 20.

    Returns:
        {part: a list of `data.Record`}, for set 4 of (phrase, place of its class in the
        variant).

    Raises:
        ValueError: for a variant that the set does not have, and what `data.records`
            refuses.
    """
    check_number(number)
    known = LANGUAGES if SETS[number].languages else icd.CHAPTERS
    count = SETS[number].languages or CLASSES
    if len(names) != count or not set(names) <= set(known):
        raise ValueError(f"{names!r:.160} is no variant of set {number}")
    if number == 4:
        places = {icd.CHAPTERS.index(name): k for k, name in enumerate(names)}
        pairs = icd.diagnoses(split, max(1, n // CLASSES), seed)
        return {"phrases": [(t, places[c]) for t, c in pairs if c in places]}

    parts = {language: spelled(language, n, split, seed) for language in names}
    each = n // len(data.BASE_LANGUAGES)
    for part in SETS[number].also:
        parts[part] = [
            record
            for language in data.BASE_LANGUAGES
            for record in data.records(OLD[part], language, each, split, seed)
        ]
    return parts


def share(model, tokenizer, part):
    """The share of a part's records that a model answers right, to the letter."""
    if isinstance(part[0], data.Record):
        return measure.exact_match(model, tokenizer, part)

    given = tasks.classes(model, tokenizer, part)
    right = [a == place for a, (_, place) in zip(given, part, strict=True)]
    return sum(right) / len(right)


def points(number, score):
    """The points of a score: those of the highest threshold that it reaches."""
    check_number(number)
    return max([p for at, p in SETS[number].points.items() if score >= at], default=0)


# One hand-in


def load(folder, number, start=None):
    """A hand-in on its base, or `Refused` with a sentence.

    Args:
        folder: the hand-in's.
        number: of the set.
        start: a base of this set that may be changed; by default a new one.

    Returns:
        The model.

    Raises:
        Refused: for what breaks a limit, is not safetensors, or does not fit the base.
    """
    check_number(number)
    folder = _path(folder)
    config, tensors = _read(folder)
    _check_config(config, number)
    _check_tensors(tensors, number)
    model = base(number)[0] if start is None else start
    try:
        return peft_files.load(model, folder).eval()
    except ValueError as error:
        raise Refused(f"the adapter does not load: {error!s:.300}") from None


def _path(folder):
    if not isinstance(folder, str | os.PathLike):
        raise ValueError(f"name a folder, not {folder!r:.80}")
    return Path(folder)


def _read(folder):
    """The config and the tensors of a folder whose files keep the limits."""
    if folder.is_symlink() or not folder.is_dir():
        raise Refused("there is no such folder, or it is a link")
    size = 0
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_file():
            raise Refused(f"{path.name!r:.80} is no plain file: hand in files alone")
        if path.suffix.lower() in PICKLES:
            raise Refused(
                f"{path.name!r:.80} is a pickle, which can run code: only safetensors"
                " are read"
            )
        size += path.stat().st_size
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise Refused(f"{name} is missing: save the adapter, not the model")
    if size > LARGEST:
        raise Refused(f"it is too large: {size:,} bytes, where {LARGEST:,} are allowed")

    try:
        config = json.loads((folder / CONFIG).read_text("utf8"))
    except (ValueError, RecursionError):
        raise Refused(f"{CONFIG} is not valid JSON") from None
    if not isinstance(config, dict):
        raise Refused(f"{CONFIG} is JSON, but no object with settings")
    try:
        return config, load_file(folder / WEIGHTS)
    except Exception:  # there is no end to what damage brings about
        raise Refused(f"{WEIGHTS} is no whole file of safetensors") from None


def _check_config(config, number):
    """Refused for another base, and for settings that would take for ever to load."""
    named = config.get("base_model_name_or_path") or ""
    last = re.split(r"[/\\]", str(named).rstrip("/\\"))[-1]
    ours = SETS[number].base
    shipped = ("tiny-decoder", "tiny-seq2seq")
    if last and (last != ours if ours in shipped else last in shipped):
        raise Refused(f"it is for the base {last!r:.80}: set {number} has {ours}")
    for name in EXPRESSIONS:
        value = config.get(name)
        if isinstance(value, str) and value != "all-linear":
            raise Refused(f"{name} is an expression: write the layers' names as a list")
    tokens = config.get("num_virtual_tokens") or 0
    if not isinstance(tokens, int) or tokens > LONGEST_PROMPT:
        raise Refused(f"more than {LONGEST_PROMPT} virtual tokens are too many")


def _check_tensors(tensors, number):
    """Refused for an empty file, a full one, and NaN or infinity in it."""
    count, most = sum(t.numel() for t in tensors.values()), SETS[number].parameters
    if not count:
        raise Refused(f"{WEIGHTS} is empty: no tensor is in it")
    if most and count > most:
        raise Refused(
            f"the file holds {count:,} parameters, where {most:,} are allowed"
        )
    for name, t in tensors.items():
        if not torch.isfinite(t.float()).all():
            raise Refused(f"{name!r:.120} holds NaN or infinity")


def score(model, tokenizer, parts):
    """The lowest share of all parts, and {part: share}."""
    if not parts or not all(parts.values()):
        raise ValueError("there are no records to score on")
    shares = {name: share(model, tokenizer, part) for name, part in parts.items()}
    return min(shares.values()), shares


def whose(model, tokenizer, names):
    """A language of another variant that a model has learned, and its share, or None.

    Args:
        model: one on tiny-decoder.
        tokenizer: the model's.
        names: of the student's own languages.
    """
    others = {
        other: share(model, tokenizer, spelled(other, 20, "dev"))
        for other in LANGUAGES
        if other not in names
    }
    best = max(others, key=others.get)
    return (best, others[best]) if others[best] >= ANOTHER else None


def why_low(number, names, score, found):
    """A sentence on a score that gives no points."""
    if score >= min(SETS[number].points):
        return ""
    if number == 4:
        return "low: are these the classes of this variant, in their order?"
    if found:
        other, part = found
        return f"low: it answers {part:.2f} of {other}, another variant's language"
    return f"low: it has hardly learned {' and '.join(names)}"


def fingerprint(folder):
    """A hash of the tensors, whatever the file's metadata and the config say."""
    tensors = sorted(load_file(Path(folder) / WEIGHTS).items())
    digest = sha256()
    for name, t in tensors:
        digest.update(f"{name} {t.dtype} {tuple(t.shape)} ".encode())
        digest.update(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def judged(folder, student, number, start, parts):
    """The row of one hand-in, and the hash of its tensors or None.

    Args:
        folder: HANDINS/ID/setN.
        student: the ID.
        number: of the set.
        start: (model, tokenizer) of the set; the model is copied.
        parts: the records to score on.
    """
    names = variant(student, number)
    row = _row(student, number)
    model, tokenizer = start
    try:
        model = load(folder, number, copy.deepcopy(model))
        lowest, shares = score(model, tokenizer, parts)
        found = None
        if number != 4 and lowest < min(SETS[number].points):
            found = whose(model, tokenizer, names)
    except Refused as refused:
        return row | dict(note=f"refused: {refused}"), None
    except Exception as error:  # one odd hand-in must not stop the others
        kind = type(error).__name__
        return row | dict(note=f"refused: answering failed with {kind}"), None

    row |= dict(score=f"{lowest:.3f}", points=points(number, lowest))
    row["parts"] = ", ".join(f"{name} {part:.3f}" for name, part in shares.items())
    row["note"] = why_low(number, names, lowest, found)
    return row, fingerprint(folder)


def _row(student, number):
    of = max(SETS[number].points.values())
    names = " ".join(variant(student, number))
    row = dict(id=student, set=number, variant=names, score="", points=0, of=of)
    return row | dict(parts="", note="not handed in")


def check(folder, student, number):
    """What a student runs: the row of a hand-in on public records."""
    parts = records(number, variant(student, number))
    return judged(folder, student, number, base(number), parts)[0]


# All hand-ins


def read_secret(file=None):
    """The secret in a file, or in the environment variable PEFTLAB_SECRET.

    Raises:
        ValueError: there is none, or it is shorter than 16 characters.
    """
    if file is None:
        secret = os.environ.get("PEFTLAB_SECRET", "")
        if not secret:
            raise ValueError("name a file with --secret, or set PEFTLAB_SECRET")
    else:
        try:
            secret = Path(file).read_text("utf8")
        except (OSError, UnicodeDecodeError):
            raise ValueError(f"the secret {str(file)!r} cannot be read") from None
    secret = secret.strip()
    if len(secret) < SECRET:
        raise ValueError(f"a secret has at least {SECRET} characters")
    return secret


def hand_ins(folder):
    """{(ID, number): path} of all hand-ins, and a sentence for what else lies there."""
    folder = _path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r} of hand-ins")
    found, strange = {}, []
    for student in sorted(folder.iterdir()):
        try:
            check_id(student.name)
        except ValueError:
            strange.append(f"{student.name!r:.80} is no ID")
            continue
        if student.is_symlink() or not student.is_dir():
            strange.append(f"{student.name!r:.80} is no folder")
            continue
        for path in sorted(student.iterdir()):
            match = re.fullmatch(r"set([1-9])", path.name)
            if match and int(match[1]) in SETS:
                found[student.name, int(match[1])] = path
            else:
                strange.append(f"{student.name}/{path.name!r:.80} is no set1 to set6")
    if not found:
        raise ValueError(f"{str(folder)!r} holds no hand-in such as ID/set1")
    return found, strange


def grade(folder, secret, n=RECORDS, progress=None):
    """Score every hand-in on hidden records.

    Args:
        folder: HANDINS; the hand-ins are HANDINS/ID/setN.
        secret: what the hidden records are drawn with, at least 16 characters.
        n: records in each part.
        progress: a function that is called with each row.

    Returns:
        A row for each student and each set that anybody has handed in: a dict with the
        keys `COLUMNS`. Then a list of sentences on what else lies there.

    Raises:
        ValueError: for no folder, no hand-in, and a secret that is too short.
    """
    if not isinstance(secret, str) or len(secret) < SECRET:
        raise ValueError(f"a secret has at least {SECRET} characters")
    found, strange = hand_ins(folder)
    students = sorted({student for student, _ in found})
    rows, owners = [], {}
    for number in sorted({number for _, number in found}):
        start, hidden = base(number), {}
        for student in students:
            if (student, number) not in found:
                rows.append(_row(student, number))
                continue
            names = variant(student, number)
            if names not in hidden:
                drawn = _hash("hidden", secret, number)
                hidden[names] = records(number, names, "test", drawn, n)
            path = found[student, number]
            row, same = judged(path, student, number, start, hidden[names])
            rows.append(row)
            if same:
                owners.setdefault(same, []).append(row)
            if progress:
                progress(row)

    for equal in owners.values():
        for row in equal if len(equal) > 1 else ():
            others = [f"{o['id']}/set{o['set']}" for o in equal if o is not row]
            note = f"equal, number for number, to {', '.join(others)}"
            row["note"] = "; ".join(filter(None, [row["note"], note]))
    return sorted(rows, key=lambda row: (row["id"], row["set"])), strange


def write(rows, path):
    """Write the rows as CSV: the whole file, or none."""
    path = Path(path)
    fresh = path.with_name(f".{path.name}.new")
    try:
        with open(fresh, "w", encoding="utf8", newline="") as file:
            table = csv.DictWriter(file, COLUMNS)
            table.writeheader()
            table.writerows(rows)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


# The command line


def show(row):
    """A row as one line for the terminal."""
    if row["score"] == "":
        return f"{row['id']}/set{row['set']}: {row['note']}"
    text = f"{row['id']}/set{row['set']}: {row['score']} ({row['parts']}), "
    text += f"{row['points']} of {row['of']} points"
    return f"{text}; {row['note']}" if row["note"] else text


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("variant", help="print what a student gets")
    command.add_argument("id")
    command = commands.add_parser("check", help="score a hand-in on public records")
    command.add_argument("folder", type=Path)
    command.add_argument("--id", required=True)
    command.add_argument("--set", type=int, required=True)
    command = commands.add_parser("grade", help="score all hand-ins on hidden records")
    command.add_argument("handins", type=Path)
    command.add_argument("--secret", type=Path, help="a file; or set PEFTLAB_SECRET")
    command.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        _run(options)
    except (ValueError, OSError) as error:
        sys.exit(str(error))


def _run(options):
    if options.command == "variant":
        for number, one in SETS.items():
            names = ", ".join(variant(options.id, number))
            own = seed(options.id, number)
            print(f"set {number}, {one.title}: {names} (seed {own})")
    elif options.command == "check":
        row = check(options.folder, options.id, options.set)
        print(show(row))
        if row["score"] == "":
            sys.exit(1)
        print("On public records. The hidden ones are others, of the same kind.")
    else:
        secret = read_secret(options.secret)
        if not options.out.parent.is_dir():
            raise ValueError(f"there is no folder {str(options.out.parent)!r}")
        rows, strange = grade(
            options.handins, secret, progress=lambda row: print(show(row), flush=True)
        )
        write(rows, options.out)
        for sentence in strange:
            print(f"not graded: {sentence}")
        print(f"{len(rows)} rows are in {options.out}")


if __name__ == "__main__":
    main()
