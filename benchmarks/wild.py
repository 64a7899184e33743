"""Odd inputs as people have them: pictures, zips, trees, identity files, checkpoints, networks and arguments.

Each case has the right value, computed here and not by the code that is asked, or the line that has to come. A
traceback, a wrong value or a silent loss is a failure. `--seed N` draws other cases, `--cases N` more or fewer.
"""

import argparse
import codecs
import contextlib
import io
import random
import re
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import verdict
from server.training.foreign_files import read_foreign
from shared.data.identity_file import read_identities
from shared.data.images import list_images
from shared.data.pixels import UnreadableImageError, decode
from shared.errors import InputError
from shared.evaluation.onnx_network import onnx_extractor

SEED, CASES = 0, 300
SIDE, OUTCOMES = 8, ("value", "line", "wrong", "traceback")


@dataclass(frozen=True)
class Case:
    """One input: `act` gets a folder of its own; its result must equal `value`, or its error match `line`."""

    kind: str
    act: Callable[[Path], object]
    value: object = None
    line: str = ""


def main(arguments: list[str] | None = None) -> int:
    """Print a table by kind and every failure; 0 when there is none."""
    parser = argparse.ArgumentParser(prog="wild", description=__doc__)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--cases", type=int, default=CASES)
    chosen = parser.parse_args(arguments if arguments is not None else [])
    counts: Counter[tuple[str, str]] = Counter()
    for number, case in enumerate(draw(random.Random(chosen.seed), chosen.cases)):
        with tempfile.TemporaryDirectory() as folder:
            outcome, told = run(case, Path(folder))
        counts[case.kind, outcome] += 1
        if outcome in ("traceback", "wrong"):
            print(f"{outcome}: case {number}, {case.kind}: {told}")
    print(f"{'kind':<12}" + "".join(f"{name:>10}" for name in OUTCOMES))
    for kind in sorted({kind for kind, _ in counts}):
        print(f"{kind:<12}" + "".join(f"{counts[kind, name]:>10}" for name in OUTCOMES))
    bad = sum(count for (_, outcome), count in counts.items() if outcome in ("wrong", "traceback"))
    right = sum(counts.values()) - bad
    return verdict("odd inputs", f"{right} of {right + bad} right (seed {chosen.seed})", reached=not bad)


def run(case: Case, place: Path) -> tuple[str, str]:
    """What came of a case: `value` or `line` where that is right, else `wrong` or `traceback`, and why."""
    try:
        found = case.act(place)
    except (InputError, UnreadableImageError) as error:
        told = str(error)
        is_right = bool(case.line) and re.search(case.line, told) is not None and "\n" not in told
        return "line" if is_right else "wrong", told
    except Exception as error:  # every other class is what a user would see as a traceback
        return "traceback", f"{type(error).__name__}: {error}"
    if case.line:
        return "wrong", f"taken, though {case.line!r} should be said"
    return ("value", "") if found == case.value else ("wrong", f"{found!r} instead of {case.value!r}"[:300])


def draw(rng: random.Random, count: int) -> Iterator[Case]:
    """Cases of all kinds in turn."""
    makers = (picture, deep_picture, damaged_picture, archive, tree, identities, checkpoint, network, argument)
    yield from (makers[number % len(makers)](rng) for number in range(count))


def picture(rng: random.Random) -> Case:
    """A lossless file of some mode; Pillow's own conversion is the reference."""
    mode = rng.choice(["RGB", "L", "1", "P", "RGBA", "LA", "CMYK"])
    kind = "TIFF" if mode == "CMYK" else rng.choice(["PNG", "TIFF"])
    shown = Image.fromarray(pixels(rng)).convert("RGB" if mode in ("RGBA", "LA") else mode)
    if mode in ("RGBA", "LA"):
        shown = shown.convert(mode)
        shown.putalpha(rng.choice([0, 255]))
    flat = shown.convert("RGBA")
    expected = Image.alpha_composite(Image.new("RGBA", flat.size, (0, 0, 0, 255)), flat).convert("RGB")
    data = encoded(shown, kind)
    return Case("pictures", lambda _: decode(data, SIDE).tobytes(), np.asarray(expected).transpose(2, 0, 1).tobytes())


def deep_picture(rng: random.Random) -> Case:
    """8, 12 or 16 bits in wider samples, or a range that nothing tells."""
    bits = rng.choice([8, 12, 16])
    wide = np.array([[rng.randrange(2**bits) for _ in range(SIDE)] for _ in range(SIDE)])
    wide[0, 0] = 2**bits - 1
    store = rng.choice([np.uint16, np.int32, np.float32])
    data = encoded(Image.fromarray(wide.astype(store)), "TIFF")
    bad = rng.random() < 0.3
    if bad:
        data = encoded(Image.fromarray((wide - rng.choice([300_000, 2**bits])).astype(np.int32)), "TIFF")
    expected = np.broadcast_to(wide >> (bits - 8), (3, SIDE, SIDE)).astype(np.uint8).tobytes()
    return Case("deep", lambda _: decode(data, SIDE).tobytes(), expected, "no known range" if bad else "")


def damaged_picture(rng: random.Random) -> Case:
    """A file that is cut off, or is something else."""
    kind = rng.choice(["PNG", "JPEG", "BMP", "GIF"])
    whole = encoded(Image.fromarray(pixels(rng, 64)), kind)
    data = rng.choice([whole[: rng.randrange(len(whole) // 2)], b"", b"<html>" * 9, rng.randbytes(200)])
    return Case("damaged", lambda _: decode(data, SIDE).tobytes(), line=".")


def archive(rng: random.Random) -> Case:
    """A zip in good order, or one in which readers see different members."""
    names = [f"p{number}/{number}.png" for number in range(rng.randrange(2, 6))]
    separator = rng.choice(["/", "\\"])
    harms = {"": "", "cut": "damaged|incomplete", "twice": "does not list", "locked": "encrypted"}
    harm, line = rng.choice(list(harms.items()))

    def act(place: Path) -> object:
        with zipfile.ZipFile(place / "a.zip", "w") as file:
            for name in names:
                entry = zipfile.ZipInfo()
                entry.filename = name.replace("/", separator)
                file.writestr(entry, b"x" * 50)
        data = (place / "a.zip").read_bytes()
        central = data.index(b"PK\1\2")
        changed = {"cut": data[: central - 5], "twice": data + data}.get(harm, data)
        if harm == "locked":
            changed = data[: central + 8] + b"\1" + data[central + 9 :]
        (place / "a.zip").write_bytes(changed)
        found = list_images(place / "a.zip")
        return found.names, found.persons and tuple(found.persons)

    return Case("zips", act, (tuple(names), tuple(name.partition("/")[0] for name in names)), line)


def tree(rng: random.Random) -> Case:
    """A folder with files of other kinds, whose numbers must be told."""
    others = Counter(rng.choice([".raw", ".xcf", ".txt", ".psd"]) for _ in range(rng.randrange(9)))

    def act(place: Path) -> object:
        (place / "self.jpg").symlink_to("self.jpg")
        for suffix, count in (*others.items(), (rng.choice([".jfif", ".JPE", ".pgm"]), 2)):
            for number in range(count):
                (place / f"{number}{suffix}").write_bytes(b"x")
        found = list_images(place)
        return len(found.names), dict(found.ignored)

    return Case("trees", act, (2, {**others, "broken links": 1}))


def identities(rng: random.Random) -> Case:
    """Who is who, as some program or person wrote it."""
    names = tuple(f"{folder}/{number}.png" for folder in "ab" for number in range(3))
    persons = tuple(str(rng.randrange(5)) for _ in names)
    separator, end = rng.choice([" ", "\t", ",", ";"]), rng.choice(["\n", "\r\n", "\r"])
    change = rng.choice([str, lambda name: name.replace("/", "\\"), lambda name: f"./{name}", str.upper])
    rows = [f"{change(name)}{separator}{person}" for name, person in zip(names, persons, strict=True)]
    rng.shuffle(rows)
    missing = rng.random() < 0.3
    text = end.join(rows[1:] if missing else rows) + end
    mark, encoding = rng.choice([(b"", "utf-8"), (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le")])

    def act(place: Path) -> object:
        (place / "who.txt").write_bytes(mark + text.encode(encoding))
        return read_identities(place / "who.txt", names)

    return Case("identities", act, persons, "no line for 1 of 6 images" if missing else "")


def checkpoint(rng: random.Random) -> Case:
    """A state dict below some wrappers, with or without an average, or one that no network can use."""
    wrappers = [rng.choice(["module.", "_orig_mod.", "model.", "net."]) for _ in range(rng.randrange(4))]
    live = {f"{''.join(wrappers)}norm.weight": torch.arange(3.0)}
    data, expected = {rng.choice(["model", "state_dict", "nnet"]): live}, {"model": [0.0, 1.0, 2.0]}
    if rng.random() < 0.5:
        data[rng.choice(["ema", "model_ema", "ema_0.999", "swa_model"])] = {"norm.weight": torch.full((3,), 7.0)}
        expected["ema"] = [7.0] * 3
    harm, line = rng.choice(
        [({}, ""), ({}, ""), ({"step": -1}, "step is -1"), ({"shadow": [torch.ones(1)]}, "list of")]
    )

    def act(place: Path) -> object:
        torch.save({**data, **harm}, place / "file.pt")
        return {group: state["norm.weight"].tolist() for group, state in read_foreign(place / "file.pt").groups.items()}

    return Case("checkpoints", act, expected, line)


def network(rng: random.Random) -> Case:
    """Bytes that are no network."""
    data = rng.choice([b"", rng.randbytes(99), b"\x3a\x7f" + rng.randbytes(40), b"\x18\0\0\0ORTM" + bytes(9)])

    def act(place: Path) -> object:
        (place / "a.onnx").write_bytes(data)
        return onnx_extractor(place / "a.onnx")

    return Case("networks", act, line="not a readable ONNX|own format|takes|gives")


def argument(rng: random.Random) -> Case:
    """A word of a command line that nothing can be done with: one line, exit code 2."""
    odd = rng.choice(["/", "", "x" * 300, "/dev/null", "a\nb", "\udcff", "nowhere", "/proc/self/status"])
    words = rng.choice(
        [["check", odd], ["report", odd], ["export", odd, "--out", "x.pt"], ["experiments", "show", odd]]
    )

    def act(_: Path) -> object:
        from server.cli.main import main as command

        told, before = io.StringIO(), sys.argv
        sys.argv = ["maskfed-server", *words]
        try:
            with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
                command()
        except SystemExit as ended:
            return ended.code, told.getvalue().count("\n")
        finally:
            sys.argv = before
        raise AssertionError("the command line always exits")

    return Case("arguments", act, (2, 1))


def pixels(rng: random.Random, side: int = SIDE) -> np.ndarray:
    """Noise, uint8 (side, side, 3)."""
    return np.frombuffer(rng.randbytes(side * side * 3), np.uint8).reshape(side, side, 3)


def encoded(picture: Image.Image, kind: str) -> bytes:
    """The picture as a file."""
    picture.save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
