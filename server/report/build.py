"""`maskfed-server report`: one self-contained HTML page per run, or one that compares several."""

from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from server.report.formatting import (
    breakable,
    format_bytes,
    format_interval,
    format_number,
    format_seconds,
    reference_label,
)
from server.report.page import SYMBOLS, build_page
from server.report.run_charts import comparison
from server.report.tensorboard import write_curves
from server.runs.history import read_run, spent_text
from server.runs.run_directory import RunDir
from shared.errors import InputError
from shared.pages.assets import style
from shared.storage.files import write_atomically
from shared.storage.versions import installed_versions

_MADE_BY = "– maskfed</title>".encode()
OPEN_ROWS = 12
"""Tables with more lines than this are folded; the charts above tell the same."""


def report(runs: list[Path], out: Path | None = None) -> Path:
    """Write the page, and the same figures for TensorBoard.

    Args:
        runs: run directories; several are compared.
        out: the HTML file; default: `report.html` in the run, or `comparison.html` beside the first of several.

    Returns:
        The file.

    Raises:
        InputError: a path that is no run directory, a damaged result, or an `out` that is another file.
    """
    if out is not None and out.is_file() and _MADE_BY not in out.read_bytes()[:4096]:
        raise InputError(f"--out {out} is no page that `report` made: name a new file")
    pages = [build_page(read_run(path)) for path in runs]
    for page in pages:
        write_curves(page.data)
    target = out or (RunDir(runs[0]).report if len(runs) == 1 else runs[0].resolve().parent / "comparison.html")
    compared = comparison([(page.data, [row.evaluation for row in page.rows]) for page in pages])
    html = (
        _templates()
        .get_template("report.html")
        .render(
            pages=pages,
            comparison=compared if len(pages) > 1 else "",
            symbols=SYMBOLS,
            trends={"better": "down", "worse": "up", "not told apart": ""},
            open_rows=OPEN_ROWS,
            written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            versions=installed_versions(),
            style=Markup(style()),  # ours
        )
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, html)
    return target


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("server.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": format_number,
        "bytes": format_bytes,
        "seconds": format_seconds,
        "interval": format_interval,
        "label": reference_label,
        "breakable": breakable,
        "spent": spent_text,
    }
    return environment
