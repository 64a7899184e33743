# ruff: noqa: N803
"""Generated pictures say that they are: a mark that programs can read, written into each PNG. No torch here.

The mark is the property DigitalSourceType of the IPTC Photo Metadata Standard, with a term of IPTC's vocabulary
(https://cv.iptc.org/newscodes/digitalsourcetype/), in an XMP packet, where image programs and platforms look for it.
The EU's AI Act, Article 50(2), asks for such a mark. Text entries name the model and the seeds. No pixel changes.
"""

import io
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from shared.errors import InputError
from shared.storage.files import file_digest, write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
    from PIL.PngImagePlugin import PngInfo

SourceType = Literal["trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"]
VOCABULARY = "http://cv.iptc.org/newscodes/digitalsourcetype/"
XMP_KEYWORD = "XML:com.adobe.xmp"
MODEL_KEYWORD, SEEDS_KEYWORD = "maskfed:model", "maskfed:seeds"
ARRAY_SUFFIX = ".npy"
_MAX_XMP = 1 << 20
_SOURCE_TYPE = re.compile(
    r"DigitalSourceType\s*(?:=\s*[\"']|>\s*)(?:https?://cv\.iptc\.org/newscodes/digitalsourcetype/)?"
    r"(trainedAlgorithmicMedia|compositeWithTrainedAlgorithmicMedia)\b"
)
# What our own writer writes; anything else in these entries is another's and is not repeated on a terminal.
_MODELS, _SEEDS = re.compile(r"[0-9a-f]{64}(, [0-9a-f]{64})*"), re.compile(r"\d{1,20}( to \d{1,20})?")


@dataclass(frozen=True)
class SyntheticMark:
    """What a generated picture tells of itself."""

    model: str = ""
    """Hex digest of the checkpoint that drew it, several separated by commas; empty: not recorded."""
    seeds: str = ""
    """As `seed_range` writes it; empty: not recorded."""
    source_type: SourceType = "trainedAlgorithmicMedia"
    """`compositeWithTrainedAlgorithmicMedia` where photographs stand beside generated pictures."""

    def __str__(self) -> str:
        """One line for people."""
        model = f"model {self.model}" if self.model else "model not recorded"
        return f"generated ({self.source_type}), {model}, {f'seed {self.seeds}' if self.seeds else 'seed not recorded'}"


def seed_range(first: int, count: int) -> str:
    """The seeds first ... first + count - 1 as text."""
    return str(first) if count == 1 else f"{first} to {first + count - 1}"


def png_entries(mark: SyntheticMark) -> "PngInfo":
    """The mark as Pillow writes it into a PNG."""
    from PIL.PngImagePlugin import PngInfo

    entries = PngInfo()
    entries.add_itxt(XMP_KEYWORD, _packet(mark))
    entries.add_text("Software", "maskfed")
    for keyword, value in ((MODEL_KEYWORD, mark.model), (SEEDS_KEYWORD, mark.seeds)):
        if value:
            entries.add_text(keyword, value)
    return entries


def marked_png(pixels_HWC: "NDArray[np.uint8] | Picture", mark: SyntheticMark) -> bytes:
    """PNG of one picture with its mark.

    Args:
        pixels_HWC: uint8 (H, W, 3), or a picture of Pillow.
        mark: what it tells.

    Returns:
        The file; its pixels are the given ones.
    """
    # Networks are measured and trained where there is no Pillow.
    from PIL import Image

    picture = pixels_HWC if isinstance(pixels_HWC, Image.Image) else Image.fromarray(pixels_HWC)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True, pnginfo=png_entries(mark))
    return buffer.getvalue()


def read_mark(path: Path) -> SyntheticMark | None:
    """The mark of a picture, whoever wrote it, or of an array by the file beside it; None without one.

    Raises:
        InputError: no such file, not a picture, or an array that is not the one its file describes.
    """
    if path.suffix.lower() == ARRAY_SUFFIX:
        return _array_mark(path)
    from PIL import Image

    try:
        with Image.open(path) as picture:
            found = _mark_of(picture.info)
            if found is None and picture.format == "PNG":
                # Entries behind the pixels are read with them.
                picture.load()
                found = _mark_of(picture.info)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not a picture that can be read"
        raise InputError(f"{path}: {reason}; give a PNG, JPEG, WebP, TIFF or .npy file") from error
    return found


def write_array_mark(array: Path, mark: SyntheticMark) -> Path:
    """Write the mark of a `.npy` file, which has no room for one, beside it as `<name>.npy.json`."""
    target = _beside(array)
    facts = {"digital_source_type": VOCABULARY + mark.source_type, "sha256": file_digest(array), **asdict(mark)}
    write_atomically(target, json.dumps(facts, indent=2) + "\n")
    return target


def _beside(array: Path) -> Path:
    return array.with_name(f"{array.name}.json")


def _array_mark(array: Path) -> SyntheticMark | None:
    if not array.is_file():
        raise InputError(f"{array}: no such file; give a picture or a .npy file")
    try:
        facts = json.loads(_beside(array).read_text(encoding="utf-8"))
        source_type = str(facts["digital_source_type"]).removeprefix(VOCABULARY)
        expected = facts["sha256"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{_beside(array)}: not the mark of an array; delete it or restore it from a copy") from error
    if expected != file_digest(array):
        raise InputError(f"{array}: {_beside(array).name} belongs to another content of this file; delete one of them")
    return _trusted(f"DigitalSourceType>{source_type}", str(facts.get("model")), str(facts.get("seeds")))


def _mark_of(info: dict[str | tuple[int, int], object]) -> SyntheticMark | None:
    packet = info.get(XMP_KEYWORD) or info.get("xmp") or b""
    text = packet.decode("utf-8", "replace") if isinstance(packet, bytes) else str(packet)
    return _trusted(text[:_MAX_XMP], str(info.get(MODEL_KEYWORD, "")), str(info.get(SEEDS_KEYWORD, "")))


def _trusted(packet: str, model: str, seeds: str) -> SyntheticMark | None:
    match = _SOURCE_TYPE.search(packet)
    if match is None:
        return None
    source_type: SourceType = (
        "trainedAlgorithmicMedia" if match[1] == "trainedAlgorithmicMedia" else "compositeWithTrainedAlgorithmicMedia"
    )
    return SyntheticMark(
        model if _MODELS.fullmatch(model) else "", seeds if _SEEDS.fullmatch(seeds) else "", source_type
    )


def _packet(mark: SyntheticMark) -> str:
    """XMP packet (ISO 16684-1) with one property."""
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
        'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
        f"<Iptc4xmpExt:DigitalSourceType>{VOCABULARY}{mark.source_type}</Iptc4xmpExt:DigitalSourceType>"
        '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
    )
