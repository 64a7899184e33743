"""The commands that the documents give, line by line; nothing of them is repeated here."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"```bash\n(.*?)```", re.DOTALL)


def commands(document: str, marker: str) -> list[list[str]]:
    """The project's own commands in the first block after `marker`, comments and other programs left out.

    Raises:
        ValueError: the document has no such block any more.
    """
    text = (ROOT / document).read_text(encoding="utf-8")
    before, _, after = text.partition(marker)
    block = _BLOCK.search(after)
    if before == text or block is None:
        raise ValueError(f"{document}: no commands after {marker!r}")
    lines = [shlex.split(line, comments=True) for line in block.group(1).splitlines()]
    return [line for line in lines if line and line[0].startswith("maskfed-")]


def named(line: list[str]) -> str:
    """What a command is called: `finetune`, `sites add`, `data scan`; the dry run is another one than the run."""
    words = [word for word in line[1:3] if re.fullmatch(r"[a-z]+", word)]
    groups = ("sites", "data", "approve", "experiments")
    name = " ".join(words[: 2 if words[0] in groups else 1])
    return f"{name} --dry-run" if "--dry-run" in line else name
