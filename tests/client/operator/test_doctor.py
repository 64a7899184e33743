import pytest

from client.operator import doctor
from client.operator.doctor import check_site, unused_card
from client.policy.approval import approve
from shared.storage.code_digest import installed_digest
from tests.client.conftest import MakeSite


def found(home, name):
    return next(check for check in check_site(home) if check.name == name)


def test_a_card_that_torch_cannot_use_is_named_with_the_cure(make_site: MakeSite, tmp_path, monkeypatch):
    home, settings = make_site()
    assert found(home, "device").is_ok  # device = "cpu"
    monkeypatch.setattr(doctor, "unused_card", lambda: "/dev/nvidia0")
    with pytest.raises(doctor.InputError, match=r"/dev/nvidia0 is here, but torch .*CUDA build"):
        doctor._device(settings.model_copy(update={"device": "auto"}))


@pytest.mark.parametrize(
    ("names", "card"), [((), ""), (("nvidia0", "nvidiactl"), "nvidia0"), (("kfd",), "kfd"), (("nvidiactl",), "")]
)
def test_a_card_is_what_the_kernel_shows(tmp_path, names, card):
    for name in names:
        (tmp_path / name).touch()
    assert unused_card(tmp_path).endswith(card) and bool(unused_card(tmp_path)) == bool(card)


def test_extras_that_files_or_policy_ask_for_are_named_with_the_command(make_site: MakeSite, tmp_path, monkeypatch):
    from PIL import Image

    (tmp_path / "mixed").mkdir()
    for number in range(4):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / "mixed" / f"{number}.png")
    home, settings = make_site(data=tmp_path / "mixed", extractors=("onnx:net.onnx",))
    approve(home, "code", installed_digest())
    monkeypatch.setattr(doctor, "find_spec", lambda _: object())
    assert doctor._extras(settings) == "nothing that is asked for is missing"
    monkeypatch.setattr(doctor, "find_spec", lambda _: None)
    with pytest.raises(doctor.InputError, match=r"ONNX network: `pip install 'maskfed\[onnx\]'`"):
        doctor._extras(settings)
