from server.federation.round_facts import _epsilon, epsilon_text, round_facts, sites_text
from shared.storage.runlog import OUTCOMES


def test_every_epsilon_is_shown_with_what_it_protects():
    def shown(*entries, **fields):
        answered = [dict(zip(("epsilon", "unit", "dp_epsilon"), entry, strict=False)) for entry in entries]
        return epsilon_text(_epsilon({"answered": [*answered, {"site": "silent"}], **fields}))

    assert shown((9.25, "person"), (10.5, "person")) == "10.5 per person"
    assert shown((3.0, "image"), ("unbounded", None)) == "unbounded"
    assert shown(("unbounded", "image", 2.5), ("unbounded", "image", 3.25)) == "unbounded (DP part 3.25 per image)"
    assert shown() == ""
    assert shown(central_epsilon=2.0, central_unit="site") == "2 per site"


def test_numbers_are_numbers_and_sites_are_listed_by_outcome():
    lists = {state: [] for state in OUTCOMES} | {"refused": [{"site": "south"}]}
    answered = [{"site": "north", "epsilon": 4.99, "unit": "person", "scalars": {"loss": 0.5}}]
    costs = {"bytes_sent": 100, "bytes_received": 20, "update_norm": 1.5, "weights_changed": True}
    event = {"round": 3, **lists, "answered": answered, **costs, "seconds": {"train": 2.0, "total": 3.5}}
    line = round_facts(event | {"forged": {"count": 2}}, {"metrics": {"fid": 7.0}})
    assert (line["epsilon"], line["epsilon_unit"], line["is_unbounded"]) == (4.99, "person", False)
    assert (line["central_epsilon"], line["loss"], line["seconds"], line["metrics"]) == (None, 0.5, 3.5, {"fid": 7.0})
    assert (line["answered"], line["refused"], line["lost"]) == (["north"], ["south"], [])
    assert sites_text(line) == "1 answered, 1 refused, 2 forged" and line["doubted"] == []
    fewer = round_facts(event | {"doubted": {"west": {"round": 2, "share": 0.7}}}, None)
    assert fewer["doubted"] == ["west"] and sites_text(fewer) == "1 answered, 1 refused, 1 doubted"
