"""The page for the data-protection officer says what was recorded, no more, and stands alone."""

import re
import zipfile
from dataclasses import replace

import pytest

from client.cli.records import evidence
from client.operator.evidence import gather
from client.operator.processing_record import record_page
from client.records.journal import Journal
from client.training_request import handle
from shared.errors import InputError
from tests.browser import browser
from tests.client.conftest import DP, MakeSite, experiment, request_for


def steps(history, _delta):
    return 0.75 * sum(each.steps for each in history)


def text_of(page):
    body = page[page.index("<main>") :]
    return " ".join(re.sub(r"<[^>]+>", " ", body).replace("&#39;", "'").split())


def test_it_tells_purpose_data_recipients_numbers_and_spending(make_site: MakeSite):
    home, settings = make_site(require_dp=True, unit="image")
    handle(request_for(experiment(privacy=DP), server_round=1).to_record(), home)
    text = text_of(record_page(settings, gather(home, settings, "run", steps)))
    assert "run run" in text and "1 charged computation, 1 answer that left, 0 requests refused" in text
    assert "coordinator, 127.0.0.1:1" in text and "16 × 16 pixels" in text
    assert "train, round 1 update, num_examples" in text
    assert "1.500 10.0 1e-05 image" in text and "at most a factor of 4.48" in text  # e to the 1.5
    assert "No audit of this run's models by this site is on record" in text
    for title in ("Legal basis", "Controller, and joint controllers", "Date, name, signature", "Opinion 28/2024"):
        assert title in text


def test_a_release_without_dp_is_called_what_it_is(make_site: MakeSite):
    home, settings = make_site()
    handle(request_for(experiment()).to_record(), home)
    text = text_of(record_page(settings, gather(home, settings, "run", steps)))
    assert "nothing bounds what it tells about a single person" in text and "at most a factor" not in text


def test_that_the_number_of_images_stays_is_said_only_where_it_does(make_site: MakeSite):
    said = "nor does the exact number of images"
    home, settings = make_site()
    handle(request_for(experiment(privacy=DP)).to_record(), home)
    record = gather(home, settings, "run", steps)
    assert said in text_of(record_page(settings, record))
    told = settings.model_copy(update={"policy": settings.policy.model_copy(update={"image_count": "exact"})})
    assert said not in text_of(record_page(told, record))
    totals = {name: total | {"is_unbounded": True} for name, total in record.totals.items()}
    assert said not in text_of(record_page(settings, replace(record, totals=totals)))


def test_it_names_no_folder_and_no_number_of_images(make_site: MakeSite, photos):
    home, settings = make_site()
    handle(request_for(experiment(privacy=DP)).to_record(), home)
    page = record_page(settings, gather(home, settings, "run", steps))
    assert str(home.path) not in page and str(photos) not in page and settings.head_file not in page


def test_what_the_coordinator_chose_is_text_and_not_markup(make_site: MakeSite):
    home, settings = make_site()
    hostile = "<script>alert(1)</script>"
    journal = Journal(home.journal)
    journal.write("request", task=hostile, run=hostile, server_round=hostile, request_digest="x")
    journal.write("release", request_digest="x", numbers=[hostile], bytes=1, epsilon=None, is_unbounded=False)
    page = record_page(settings, gather(home, settings, hostile, steps))
    assert "<script" not in page and page.count("&lt;script&gt;") >= 4


def test_it_lies_in_the_evidence_and_beside_it(make_site: MakeSite, tmp_path):
    home, _ = make_site(epsilon_cap=50.0)
    handle(request_for(experiment(privacy=DP)).to_record(), home)
    out, record = tmp_path / "run.zip", tmp_path / "run.html"
    record.write_text("mine")
    with pytest.raises(InputError, match=r"--record .* exists"):
        evidence("run", out, home.path, record)
    assert not out.exists() and record.read_text() == "mine"
    record.unlink()
    evidence("run", out, home.path, record)
    with zipfile.ZipFile(out) as archive:
        assert archive.read("processing_record.html") == record.read_bytes()
    links = re.findall(r"""(?:src|href)=["']([^"']+)["']""", record.read_text())
    assert links == ["data:,"]


def test_it_prints_on_few_pages_without_running_over(make_site: MakeSite, tmp_path):
    home, settings = make_site()
    for number in range(12):
        journal = Journal(home.journal)
        journal.write("request", task="train", run="run", server_round=number, request_digest=f"d{number}")
        numbers = ["update", "num_examples", "epsilon", "delta", "is_unbounded", "epsilon_cap", "unit", "ledger head"]
        journal.write(
            "release",
            request_digest=f"d{number}",
            numbers=numbers,
            bytes=40_400_000,
            epsilon=number / 4,
            is_unbounded=False,
        )
    file = tmp_path / "record.html"
    file.write_text(record_page(settings, gather(home, settings, "run", steps)), encoding="utf-8")
    with browser(tmp_path / "profile") as window:
        for width in (400, 1400):
            window.open(file.as_uri(), width)
            window.wait("document.querySelectorAll('h2').length === 9 && document.readyState === 'complete'")
            assert window.run("document.documentElement.scrollWidth") == width
        window.printed(tmp_path / "record.pdf")
        assert window.console == []
    pages = len(re.findall(rb"/Type\s*/Page[^s]", (tmp_path / "record.pdf").read_bytes()))
    assert 3 <= pages <= 6
