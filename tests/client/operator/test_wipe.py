from client.operator.wipe import STAYS, what_stays, wipe
from client.records.journal import Journal
from tests.client.conftest import MakeSite


def test_pictures_and_what_was_made_of_them_are_removed_and_the_record_stays(make_site: MakeSite, photos):
    home, settings = make_site()
    Journal(home.journal).write("approval", what="code", digest="ab")
    for folder in (home.path / "audits", home.replies, home.mean_images, home.logs):
        folder.mkdir(exist_ok=True)
        (folder / "closest.png").write_bytes(b"face")
    kept = {each.name for each in STAYS if (home.path / each.name).exists()}
    before = {path.name: path.read_bytes() for path in photos.rglob("*.png")}
    told = wipe(home)
    assert {"removed cache/", "removed audits/", "removed last_reply/", "removed logs/"} <= set(told)
    assert {path.name for path in home.path.iterdir()} >= kept >= {"ledger.jsonl", "journal.jsonl", "data.key"}
    assert not [path for path in home.path.rglob("*") if path.suffix in (".png", ".u8", ".npy")]
    assert {path.name: path.read_bytes() for path in photos.rglob("*.png")} == before
    lines = what_stays(home, settings.head_file, settings.data)
    assert all(any(line.startswith(f"stays {name}: ") for line in lines) for name in kept)
    assert any(settings.head_file in line for line in lines) and wipe(home) == []


def test_a_link_is_removed_and_what_it_points_to_is_not(make_site: MakeSite, tmp_path):
    home, _ = make_site()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("kept")
    (home.path / "audits").symlink_to(elsewhere)
    (told,) = [line for line in wipe(home) if "audits" in line]
    assert "was a link" in told and (elsewhere / "precious").read_text() == "kept"
    assert not (home.path / "audits").exists()
