"""Every command of a program with one odd word after another: what a tired, hurried or hostile user may type."""

import ctypes
import io
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import click
import typer

PATHS = (
    *("", ".", "..", "-", " ", "~", "/dev/null", "/sys/none", "a\nb", "\udcff\udcfe.png", "x" * 300, "a/" * 2100 + "b"),
    *("NOISE", "NOISE.toml", "NOISE.zip", "NOISE.npz", "NOISE.safetensors", "NOISE.json", "EMPTY", "FOLDER", "LOOP"),
)
CLOSED = ("CLOSED", "CLOSEDFOLDER")
"""Of mode 000: each path is one of them once."""
TEXTS = (
    *PATHS,
    "🙂",
    "0",
    "-1",
    "9" * 5000,
    "\u00b2",
    "synthetic:\u00b2",
    "synthetic:public:" + "9" * 5000,
    "nan",
    "\x1b[31m",
    "--",
    "a,b",
    "a=b",
    ":",
    "onnx:",
    "synthetic:",
    "NOISE:3",
)
NUMBERS = ("", "x", "-1", "0", "1", "1.5", "1e999", "nan", "inf", "-inf", "9" * 5000, "0x10", "\u0663")
Words = tuple[str, ...]


def commands(app: typer.Typer) -> Iterator[tuple[Words, click.Command]]:
    """Each command of a program by its words."""

    def walk(command: click.Command, words: Words) -> Iterator[tuple[Words, click.Command]]:
        if isinstance(command, click.Group):
            for name, each in command.commands.items():
                yield from walk(each, (*words, name))
        else:
            yield words, command

    yield from walk(typer.main.get_command(app), ())


def odd_values(parameter: click.Parameter) -> Sequence[str]:
    """Odd values of one parameter; nothing for a switch."""
    if isinstance(parameter, click.Option) and parameter.is_flag:
        return ()
    kind = parameter.type.name
    return PATHS if kind == "path" else NUMBERS if kind.startswith(("integer", "float")) else TEXTS


def command_lines(
    words: Words, command: click.Command, usual: Mapping[str, str], most: int, rng: random.Random
) -> Iterator[list[str]]:
    """Command lines with one odd word each, all else as usual.

    Args:
        words: of the command.
        command: its parameters.
        usual: value of a parameter by `command --option`, `--option` or the argument's name; required ones need one.
        most: values tried of each parameter.
        rng: which ones.
    """

    def value(parameter: click.Parameter) -> str | None:
        name = parameter.opts[0]
        found = usual.get(f"{' '.join(words)} {name}", usual.get(name))
        return found if found is not None or not parameter.required else "nowhere"

    for odd in command.params:
        values = odd_values(odd)
        words_here = rng.sample(values, min(most, len(values)))
        if values is PATHS:
            words_here[0] = rng.choice(CLOSED)
        for word in words_here:
            line = list(words)
            for parameter in sorted(command.params, key=lambda each: isinstance(each, click.Argument)):
                chosen = word if parameter is odd else value(parameter)
                if chosen is None or (isinstance(parameter, click.Option) and parameter.is_flag):
                    continue
                line += [chosen] if isinstance(parameter, click.Argument) else [f"{parameter.opts[0]}={chosen}"]
            yield line


def make_odd_files(folder: Path) -> dict[str, str]:
    """Files that are something else than any command wants, by their names in `PATHS`."""
    rng, made = random.Random(3), {}
    for name in [each for each in PATHS if each.startswith("NOISE")]:
        content = rng.randbytes(200)
        (folder / name.lower()).write_bytes(b"PK\3\4" + content if name.endswith(("zip", "npz")) else content)
    (folder / "empty").touch()
    (folder / "folder").mkdir()
    (folder / "folder" / "meta.json").write_bytes(rng.randbytes(40))
    (folder / "loop").symlink_to("loop")
    (folder / "closed").touch(0o000)
    (folder / "closedfolder").mkdir(0o000)
    for name in (*PATHS, *CLOSED):
        if name.isupper() or name.startswith("NOISE"):
            made[name] = str(folder / name.lower())
    return made


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below a folder, with its size and time."""
    found: dict[str, tuple[int, int]] = {}
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            status = os.lstat(os.path.join(place, name))  # noqa: PTH118  # names that are no text
            found[os.path.join(place, name)] = (status.st_size, status.st_mtime_ns if name in files else 0)  # noqa: PTH118
    return found


def with_files(word: str, names: Mapping[str, str]) -> str:
    """A word, or an option's value, with the path of the odd file that it names."""
    option, equals, value = word.partition("=")
    if equals and option.startswith("--"):
        return f"{option}={names.get(value, value)}"
    return names.get(word, word)


def check_command(
    main: Callable[[], None],
    program: str,
    words: Words,
    command: click.Command,
    usual: Mapping[str, str],
    folder: Path,
    most: int = 3,
) -> None:
    """Give every parameter of a command odd words: one line and an exit code, no traceback, nothing new on disk.

    Args:
        main: the program's, which reads `sys.argv`.
        program: its name.
        words: of the command.
        command: its parameters.
        usual: as in `command_lines`.
        folder: an empty one; the command runs deep in it, so that `..` is still inside.
        most: values tried of each parameter, drawn by the command's name.
    """
    names = make_odd_files(folder)
    for line in command_lines(words, command, usual, most, random.Random(" ".join(words))):
        given = [with_files(word, names) for word in line]
        before = tree(folder)
        with root_is_anybody():
            code, told = run_program(main, program, given)
        assert code in (0, 1, 2, 3), (given, told)
        if code == 2:
            assert told.endswith("\n") and told.splitlines()[-1].startswith("error: "), (given, told)
            assert tree(folder) == before, given
    (folder / "closedfolder").chmod(0o700)


@contextmanager
def root_is_anybody() -> Iterator[None]:
    """Inside the block closed files are closed for root, too: what passes over permissions is given away (1 and 2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    version, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(version, sets)
    own = sets[0]
    sets[0] = own & ~0b110
    libc.capset(version, sets)
    try:
        yield
    finally:
        sets[0] = own
        libc.capset(version, sets)


def run_program(main: Callable[[], None], program: str, line: Sequence[str]) -> tuple[int, str]:
    """Exit code and standard error of a command line; what it raises beside its exit is a traceback, and passes on."""
    told, asked = io.StringIO(), (sys.argv, sys.stdin)
    sys.argv, sys.stdin = [program, *line], io.StringIO("")
    try:
        with redirect_stderr(told), redirect_stdout(io.StringIO()):
            main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None), told.getvalue()
    finally:
        sys.argv, sys.stdin = asked
    return 0, told.getvalue()
