"""What tests of pages share."""

from collections.abc import Iterator

import pytest

_DRAWN: dict[str, str] = {}


@pytest.fixture(scope="module")
def charts_drawn_once() -> Iterator[None]:
    """Pages take a chart that was drawn before from the same figures: drawing is what a page mostly costs."""
    from server.report import run_charts, svg_charts
    from server.studies.page import results_page

    def line_chart(*arguments: object, **options: object) -> str:
        key = repr((arguments, sorted(options.items())))
        if key not in _DRAWN:
            _DRAWN[key] = svg_charts.line_chart(*arguments, **options)  # type: ignore[arg-type]
        return _DRAWN[key]

    with pytest.MonkeyPatch.context() as patch:
        for module in (run_charts, results_page):
            patch.setattr(module, "line_chart", line_chart)
        yield
