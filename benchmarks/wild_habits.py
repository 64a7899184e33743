"""What systems, spreadsheets and trainers add of their own: the value of each, or the line that has to come."""

import json
import random
import unicodedata
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks.wild_pictures import SIDE, Case, pixels
from server.evaluation.other_tools import read_arrays, statistics_of_moments
from server.training.foreign.wrapped_files import read_foreign
from shared.data.identity_file import read_identities
from shared.data.images import list_images
from shared.data.pixels import decode
from shared.evaluation.feature_statistics import INCEPTION_2015_SHA256, FeatureSpace
from shared.experiment.config import parse_experiment

NAMES = ("José", "Zoë", "Ångström", "Łukasz", "Đặng", "Anna")


def persons(rng: random.Random) -> Case:
    """One person's folders as two systems spell them, or a line of a list whose identity a program has lost."""
    name = rng.choice(NAMES)
    spelled = [name, unicodedata.normalize("NFD", name), f"{name}\u200b", f"{name}\u00a0"]
    words = ["#N/A", "#REF!", "#SPILL!", "#WERT!", "nan", "None", "<NA>", "NA", "null", "(null)"]
    lost = rng.choice(["1.23E+15", "9,8E+12", "1234567890123450", *words])
    if rng.random() < 0.5:
        ways = rng.sample(range(4), 2)

        def act(place: Path) -> object:
            for number, way in enumerate(ways):
                (place / spelled[way]).mkdir(exist_ok=True)
                (place / spelled[way] / f"{number}.png").write_bytes(b"x")
            (place / "somebody else").mkdir()
            (place / "somebody else" / "9.png").write_bytes(b"x")
            return sorted(list_images(place).owners)

        return Case("persons", act, sorted([name, name, "somebody else"]))
    is_lost, header = rng.random() < 0.6, rng.choice(["", "sep=;\r\n", "file;person\r\n", "sep=;\r\nfile;person\r\n"])
    rows = [f"a.png;{name}", f"b.png;{lost if is_lost else spelled[1]}"]

    def read(place: Path) -> object:
        (place / "who.csv").write_bytes((header + "\r\n".join(rows)).encode())
        return read_identities(place / "who.csv", ("a.png", "b.png"))

    line = f"line {header.count('sep') + header.count('file') + 2}: .*(shortened|found no identity|rounded)"
    line = line if is_lost else ""
    return Case("persons", read, (name, name), line)


def places(rng: random.Random) -> Case:
    """Folders that a server keeps for itself, and folders that links reach a second time."""
    own = rng.sample(["@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"], 2)
    links = rng.sample(["000", "aa", "mm", "zz", "~"], rng.randrange(1, 4))

    def act(place: Path) -> object:
        for folder in ("people/ann", "people/bob", f"people/ann/{own[0]}", own[1]):
            (place / folder).mkdir(parents=True, exist_ok=True)
            (place / folder / "1.png").write_bytes(b"x")
        for link in links:
            (place / link).symlink_to(rng.choice(["people", "people/ann"]))
        found = list_images(place)
        return found.names, dict(found.ignored)

    ignored = {"folders of the system": 2, "folders met before": len(links)}
    return Case("places", act, (("people/ann/1.png", "people/bob/1.png"), ignored))


def pages(rng: random.Random) -> Case:
    """A scan of one page or of several, with a preview or without."""
    shown, count = pixels(rng), rng.randrange(1, 4)
    more = [Image.fromarray(pixels(rng)) for _ in range(count - 1)]
    if rng.random() < 0.5:
        more.append(Image.fromarray(pixels(rng, SIDE // 2)))

    def act(place: Path) -> object:
        Image.fromarray(shown).save(place / "a.tif", save_all=True, append_images=more)
        return decode((place / "a.tif").read_bytes(), SIDE).tobytes()

    return Case("pages", act, shown.transpose(2, 0, 1).tobytes(), f"{count} pages of one size" if count > 1 else "")


def turned(rng: random.Random) -> Case:
    """A picture whose orientation only its tag tells, as cameras write it; the corners say whether it was turned."""
    side, orientation = 8 * SIDE, rng.randrange(1, 9)
    corners = np.zeros((side, side, 3), np.uint8)
    half = side // 2
    for number, (down, right) in enumerate([(0, 0), (0, half), (half, 0), (half, half)]):
        corners[down : down + half, right : right + half] = 60 * (number + 1)
    # Where the stored top left, top right, bottom left and bottom right come to lie (EXIF 2.3, tag 0x112).
    order = {1: "1234", 2: "2143", 3: "4321", 4: "3412", 5: "1324", 6: "3142", 7: "4231", 8: "2413"}[orientation]
    exif = Image.Exif()
    exif[0x112] = orientation
    kind = rng.choice([{"format": "PNG"}, {"format": "JPEG", "progressive": rng.random() < 0.5, "quality": 95}])

    def act(place: Path) -> object:
        Image.fromarray(corners).save(place / "a", exif=exif, **kind)
        shown = decode((place / "a").read_bytes(), SIDE)[0]
        quarter = SIDE // 4
        ends = [(quarter, quarter), (quarter, -quarter), (-quarter, quarter), (-quarter, -quarter)]
        return "".join(str(round(int(shown[place]) / 60)) for place in ends)

    return Case("turned", act, order)


def parts(rng: random.Random) -> Case:
    """A checkpoint in several files with an index, whole or not, or one that is called by its digest."""
    count = rng.randrange(2, 4)
    names = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
    harms = {"": "", "gone": "No such file", "part": "one part", "elsewhere": "beside it", "digest": "", "old": ""}
    harms["more"] = "does not list"
    harm = rng.choice(sorted(harms))

    def act(place: Path) -> object:
        for number, name in enumerate(names):
            save_file({f"norm.{number}": torch.full((2,), float(number))}, place / name)
        held = {f"norm.{number}": name for number, name in enumerate(names)}
        source = place / "model.safetensors.index.json"
        match harm:
            case "gone":
                (place / names[-1]).unlink()
            case "old" | "more":
                left = {"norm.0" if harm == "old" else "norm.9": torch.full((2,), -1.0)}
                save_file({f"norm.{count - 1}": torch.full((2,), count - 1.0), **left}, place / names[-1])
            case "part":
                source = place / names[0]
            case "elsewhere":
                held["norm.0"] = f"../{place.name}/{names[0]}"
            case "digest":
                source = place / f"{rng.randrange(2**128):032x}"
                save_file({f"norm.{number}": torch.full((2,), float(number)) for number in range(count)}, source)
        (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": held}))
        return {name: tensor.tolist() for name, tensor in read_foreign(source).groups["model"].items()}

    return Case("parts", act, {f"norm.{number}": [float(number)] * 2 for number in range(count)}, harms[harm])


def moments(rng: random.Random) -> Case:
    """Mean and covariance of another tool, or numbers that are neither."""
    mean, root = np.array([rng.gauss(0, 1) for _ in range(3)]), np.array([[rng.gauss(0, 1)] * 3 for _ in range(3)])
    good = {"mu": mean, "sigma": root @ root.T + np.eye(3)}
    bad = "floating-point|no covariance|not finite"
    change, line = rng.choice(
        [
            ({}, ""),
            ({"mu_s": mean, "sigma_s": np.eye(3)}, ""),
            ({"mu": mean.astype(np.float32), "sigma": np.asfortranarray(good["sigma"])}, ""),
            ({"mu": np.array(["a", "b", "c"])}, bad),
            ({"sigma": good["sigma"].astype(complex)}, bad),
            ({"sigma": good["sigma"] - 99 * np.eye(3)}, bad),
            ({"sigma": np.array([[1.0, 2, 0], [2, 1, 0], [0, 0, 1]])}, bad),
            ({"mu": np.array([np.nan, 0, 0])}, bad),
        ]
    )

    def act(place: Path) -> object:
        np.savez(place / "a.npz", **{**good, **change})
        space = FeatureSpace("inception-v3-compat", "2048", INCEPTION_2015_SHA256)
        arrays = read_arrays(place / "a.npz")
        found = statistics_of_moments(place / "a.npz", arrays, 50, space, 3)
        found_mean, found_covariance = found.moments()
        return np.allclose(found_mean, arrays["mu"]) and np.allclose(found_covariance, arrays["sigma"])

    return Case("moments", act, True, line)


def numbers(rng: random.Random) -> Case:
    """A setting as people type it, in the file or on the command line."""
    long = "9" * rng.randrange(4301, 6000)
    text, line = rng.choice(
        [
            ("0.003", ""),
            ("3e-3", ""),
            (" 0.003 ", ""),
            ('"0.003"', ""),
            ("0,003", "optim.lr = '0,003'"),
            ("inf", "finite"),
            ("1e999", "finite"),
            ("nan", "finite|nan"),
            (long, "optim.lr"),
            ("2024-01-01", "optim.lr"),
            ("[0.003]", "optim.lr"),
            ("", "optim.lr"),
            ("\u0660.\u0663", "optim.lr"),
        ]
    )
    in_file = bool(line) and text == long and rng.random() < 0.5

    def act(_: Path) -> object:
        if in_file:
            return parse_experiment(f"[optim]\nlr = {text}\n").optim.lr
        return parse_experiment("", [f"optim.lr={text}"]).optim.lr

    return Case("numbers", act, 0.003, "not valid TOML" if in_file else line)
