import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.observe.logs import JsonFormatter, PlainFormatter, cap_logs, check_room, scrub, tell


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("/data/persons/anna/001.png cannot be read", "<path> cannot be read"),
        ("cannot read '001.png' of anna.zip", "cannot read '<file>' of <file>"),
        ("see ~/site/logs/supernode.log", "see <path>"),
        ("/data/Anna Muster/2019/1.png: bad; see /var/log/x", "<path>: bad; see <path>"),
        ("IMG_1.HEIC, 2.jfif, 3.avif, 4.jp2, 5.pgm, who.csv", ", ".join(["<file>"] * 6)),
        ("supernode started (pid 17)", "supernode started (pid 17)"),
        (
            "round 3 of 4 at 12 MB/s, https://fleet.example:443/health",
            "round 3 of 4 at 12 MB/s, https://fleet.example:443/health",
        ),
    ],
)
def test_paths_and_file_names_are_taken_out_and_nothing_else(text: str, kept: str):
    assert scrub(text) == kept


def test_a_record_is_one_json_line_without_the_text_of_exceptions():
    try:
        raise OSError("/secret/place.png")
    except OSError:
        record = logging.LogRecord("x", logging.WARNING, "f", 1, "look at %s", ("/secret/a.png",), sys.exc_info())
    line = JsonFormatter().format(record)
    assert "secret" not in line
    assert "\n" not in line
    entry = json.loads(line)
    assert (entry["level"], entry["message"], entry["exception"]) == ("WARNING", "look at <path>", "OSError")


@pytest.mark.parametrize(
    "name", ["Anna Muster/first day.heic", "Zo\u00eb (2).jpg", "\u6731\u8389\u5b89/a b.TIFF", "a:b'c.zip"]
)
def test_the_name_of_a_file_is_taken_out_as_a_whole_whatever_is_in_it(name: str):
    record = logging.LogRecord("x", logging.WARNING, "f", 1, "unreadable image %s: %s", (name, "cut off"), None)
    assert json.loads(JsonFormatter().format(record))["message"] == "unreadable image <file>: cut off"
    for message, arguments in ("%(a)s of %(b)d", ({"a": "one", "b": 2},)), ("100 %", ()), ("%d files", (3,)):
        record = logging.LogRecord("x", logging.INFO, "f", 1, message, arguments, None)
        assert json.loads(JsonFormatter().format(record))["message"] == record.getMessage()


@pytest.mark.parametrize("is_json", [False, True])
def test_the_environment_chooses_the_format(is_json: bool):
    code = (
        "import logging; from deploy.observe.logs import set_up_logging;"
        "set_up_logging(); logging.getLogger('x').info('hello')"
    )
    environment = {**os.environ, "MASKFED_LOG_FORMAT": "json" if is_json else ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stderr.startswith("{") == is_json
    assert "hello" in done.stderr


def test_a_log_that_is_too_large_begins_again_while_its_writer_goes_on(tmp_path: Path):
    with (tmp_path / "a.log").open("ab", buffering=0) as writer:
        writer.write(b"x" * 101)
        (tmp_path / "b.log").write_bytes(b"small")
        cap_logs(tmp_path, largest_bytes=100)
        writer.write(b"next")
    assert (tmp_path / "a.log").read_bytes() == b"next"
    assert (tmp_path / "a.log.1").read_bytes() == b"x" * 101
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.log", "a.log.1", "b.log"]


def test_a_full_disk_gets_the_room_of_a_log_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The lines cannot be kept; a part of them would take the last free bytes."""

    def partly(_: Path, target: Path) -> None:
        assert not target.exists()  # what was kept before has given its room for the copy
        target.write_bytes(b"x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "a.log").write_bytes(b"x" * 101)
    (tmp_path / "a.log.1").write_bytes(b"older")
    monkeypatch.setattr("deploy.observe.logs.shutil.copyfile", partly)
    cap_logs(tmp_path, largest_bytes=100)
    assert [(path.name, path.stat().st_size) for path in tmp_path.iterdir()] == [("a.log", 0)]


@pytest.mark.parametrize(("form", "out", "logged"), [("json", "", ["ready"]), ("", "ready\n", [])])
def test_what_a_command_tells_is_json_where_logs_are(
    form: str,
    out: str,
    logged: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setenv("MASKFED_LOG_FORMAT", form)
    caplog.set_level(logging.INFO)
    tell("ready")
    assert capsys.readouterr().out == out
    assert caplog.messages == logged


def test_a_disk_that_is_full_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    check_room(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=4096)
    monkeypatch.setattr("deploy.observe.logs.shutil.disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="No space left") as caught:
        check_room(tmp_path)
    assert caught.value.filename == str(tmp_path)


def test_warnings_of_libraries_are_not_told_to_users():
    code = (
        "import warnings; from deploy.observe.logs import set_up_logging; set_up_logging()\n"
        "warnings.warn('tag 7 is damaged', UserWarning)"
    )
    for option, is_told in ((), False), (("-W", "default"), True):
        done = subprocess.run([sys.executable, *option, "-c", code], check=True, capture_output=True, timeout=60)
        assert (b"tag 7 is damaged" in done.stderr) == is_told


def test_a_record_is_one_line_whatever_a_file_is_called():
    record = logging.LogRecord("x", logging.WARNING, "f", 1, "unreadable image %s", ("a\nb\x1b[2J\u202e.png",), None)
    line = PlainFormatter().format(record)
    assert line.endswith(" unreadable image a\\nb\\x1b[2J\\u202e.png") and line.isprintable()
