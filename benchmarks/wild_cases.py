"""Odd archives, lists, checkpoints, networks, samples and words: the value of each, or the line that has to come."""

import codecs
import contextlib
import io
import random
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from benchmarks.wild_pictures import Case, pixels
from server.evaluation.other_tools import open_samples
from server.training.foreign.wrapped_files import read_foreign
from shared.data.identity_file import read_identities
from shared.data.images import list_images
from shared.evaluation.onnx_network import onnx_extractor


def archive(rng: random.Random) -> Case:
    """A zip in good order, or one in which readers see different members."""
    top = rng.choice(["", "", "../faces/"])
    names = [f"{top}p{number}/{number}.png" for number in range(rng.randrange(2, 6))]
    separator = rng.choice(["/", "\\"])
    harms = {"": "", "cut": "damaged|incomplete", "twice": "does not list", "locked": "encrypted"}
    harms |= {"junk": "bytes behind its end", "half": "its beginning is missing", "part": "split archive"}
    harm = rng.choice(["", "", "", *harms])
    line = harms[harm]

    def act(place: Path) -> object:
        with zipfile.ZipFile(place / "a.zip", "w") as file:
            for name in names:
                entry = zipfile.ZipInfo()
                entry.filename = name.replace("/", separator)
                file.writestr(entry, b"x" * 50)
        data = (place / "a.zip").read_bytes()
        central = data.index(b"PK\1\2")
        end = data.rindex(b"PK\5\6")
        changed = {
            "cut": data[: central - 5],
            "twice": data + data,
            "junk": data + b"junk" * 9,
            "half": data[central // 2 :],
            "part": data[: end + 4] + b"\1\0" + data[end + 6 :],
        }.get(harm, data)
        if harm == "locked":
            changed = data[: central + 8] + b"\1" + data[central + 9 :]
        (place / "a.zip").write_bytes(changed)
        found = list_images(place / "a.zip")
        return found.names, found.persons and tuple(found.persons)

    return Case("zips", act, (tuple(names), tuple(name.split("/")[-2] for name in names)), line)


def packed(rng: random.Random) -> Case:
    """A member that was damaged, by any way to compress: that one is unreadable, and no fault of the machine."""
    method = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    content, is_damaged = rng.randbytes(40) * 20, rng.random() < 0.7
    noise = rng.randbytes(24)

    def act(place: Path) -> object:
        with zipfile.ZipFile(place / "a.zip", "w", method) as file:
            file.writestr("p/1.png", content)
        data = bytearray((place / "a.zip").read_bytes())
        if is_damaged:
            start = data.index(b"p/1.png") + 7 + 14
            data[start : start + 24] = noise
        (place / "a.zip").write_bytes(data)
        return list_images(place / "a.zip").read("p/1.png")

    return Case("packed", act, content, "damaged in the archive" if is_damaged else "")


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
    known = ["module.", "_orig_mod.", "model.", "net.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."]
    known += ["state.", "trainer.", "checkpoint."]
    wrappers = [rng.choice(known) for _ in range(rng.randrange(4))]
    live = {f"{''.join(wrappers)}norm.weight": torch.arange(3.0)}
    data, expected = {rng.choice(["model", "state_dict", "nnet"]): live}, {"model": [0.0, 1.0, 2.0]}
    if rng.random() < 0.5:
        name, average = rng.choice(["norm.weight", "normweight", "modelnormweight"]), torch.full((3,), 7.0)
        data[rng.choice(["ema", "model_ema", "ema_0.999", "swa_model", "EMA", "shadow", "polyak"])] = {name: average}
        expected["ema"] = [7.0] * 3
    harm, line = rng.choice(
        [
            ({}, ""),
            ({"step": -1}, "step is -1"),
            ({"step": torch.ones((), device="meta")}, ""),
            ({"weights": {"norm.weight": torch.arange(3.0).to_sparse()}}, "two different model weights"),
            ({"shadow": [torch.ones(1)]}, "list of"),
            ({"optimizer": {"ema": [torch.ones(3)]}}, "average without names"),
            ({"callbacks": {"state": {"decay": 0.9}}}, ""),
        ]
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


def samples(rng: random.Random) -> Case:
    """An array of images as samplers write it, or numbers that are none."""
    shown = np.stack([pixels(rng) for _ in range(rng.randrange(2, 5))]).transpose(0, 3, 1, 2)
    bad, is_foreign = "give uint8 images|no array file|holds", rng.random() < 0.1
    arrays, line = rng.choice(
        [
            ({"arr_0": shown}, ""),
            ({"arr_0": shown.transpose(0, 2, 3, 1), "arr_1": np.arange(3)}, ""),
            ({"images": np.asfortranarray(shown)}, ""),
            ({"arr_0": shown.astype(rng.choice([np.float32, np.int64, ">u2", bool]))}, bad),
            ({"arr_0": shown[0]}, bad),
            ({"one": shown, "two": shown}, bad),
            ({"mu": np.zeros(2), "sigma": np.eye(2)}, bad),
            ({"arr_0": shown[:0]}, bad),
            ({}, bad),
        ]
    )

    def act(place: Path) -> object:
        np.savez(place / "a.npz", **arrays)
        if is_foreign:
            with zipfile.ZipFile(place / "a.npz", "w") as file:
                file.writestr("1.png", b"x")
        return open_samples(str(place / "a.npz")).batch(range(len(shown))).numpy().tobytes()

    return Case("samples", act, shown.tobytes(), bad if is_foreign else line)


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
