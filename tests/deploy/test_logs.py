import json
import logging
import os
import subprocess
import sys

import pytest

from deploy.logs import JsonFormatter, scrub


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("/data/persons/anna/001.png cannot be read", "<path> cannot be read"),
        ("cannot read '001.png' of anna.zip", "cannot read '<file>' of <file>"),
        ("see ~/site/logs/supernode.log", "see <path>"),
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


@pytest.mark.parametrize("is_json", [False, True])
def test_the_environment_chooses_the_format(is_json: bool):
    code = (
        "import logging; from deploy.logs import set_up_logging; set_up_logging(); logging.getLogger('x').info('hello')"
    )
    environment = {**os.environ, "MASKFED_LOG_FORMAT": "json" if is_json else ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stderr.startswith("{") == is_json
    assert "hello" in done.stderr
