"""Dashboard and alert rules: their shape, and every figure they name against what the code exports."""

import ast
import itertools
import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "containers" / "monitoring"
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
RULES = [rule for group in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]] + [rule["expr"] for rule in RULES]
COLLECTORS = ("server/federation/fleet/metrics.py", "client/operator/metrics.py", "deploy/alerts/expiry.py")
FROM_PROMETHEUS = {"up"}
LABELS = {"job", "run", "state", "direction", "stage", "metric", "site", "unit", "kind", "certificate"}
KINDS = {"stat": 0, "timeseries": 0, "bargauge": 0}
UNITS = {"short", "s", "d", "bytes", "Bps", "percentunit"}
"""Names of Grafana's."""


def exported() -> dict[str, str]:
    """Every figure that a collector yields, with its kind, read from the code itself."""
    found = {}
    for file in COLLECTORS:
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.Yield) and isinstance(node.value, ast.Tuple) and len(node.value.elts) == 5:
                name, kind = node.value.elts[:2]
                assert isinstance(name, ast.Constant) and isinstance(kind, ast.Constant), file
                found[name.value] = kind.value
    return found


def named(expression: str) -> set[str]:
    return set(re.findall(r"\bmaskfed_\w+", expression))


def test_every_figure_that_is_shown_or_watched_is_exported_and_every_exported_one_is_shown():
    known = exported()
    assert len(known) >= 15 and all(name.startswith("maskfed_") for name in known)
    used = set().union(*map(named, EXPRESSIONS))
    assert used <= known.keys(), used - known.keys()
    shown = set().union(*(named(target["expr"]) for panel in PANELS for target in panel["targets"]))
    assert shown == known.keys()


def test_names_end_as_their_kind_says_and_rates_are_of_counters():
    known = exported()
    assert {name for name in known if name.endswith("_total")} == {
        name for name, kind in known.items() if kind == "counter"
    }
    for expression in EXPRESSIONS:
        for inside in re.findall(r"(?:rate|increase)\((\w+)", expression):
            assert known[inside] == "counter", expression


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions_are_whole_and_their_labels_exist(expression: str):
    depth = list(itertools.accumulate({"(": 1, ")": -1}.get(sign, 0) for sign in expression))
    assert min(depth) >= 0 and depth[-1] == 0 and expression.count("{") == expression.count("}")
    labels = [name.strip() for names in re.findall(r"\bby \(([^)]*)\)", expression) for name in names.split(",")]
    labels += re.findall(r"(\w+)=~?\"", expression)
    assert set(labels) <= LABELS, expression
    functions = set(re.findall(r"(\w+) ?\(", expression)) - {"by"}
    assert functions <= {"sum", "max", "min", "rate", "increase", "by"}, functions
    assert named(expression) or set(re.findall(r"^\w+", expression)) <= FROM_PROMETHEUS


def test_outcomes_that_are_watched_are_those_of_a_round():
    from shared.storage.runlog import OUTCOMES

    states = {
        part for each in EXPRESSIONS for text in re.findall(r'state=~?"([^"]*)"', each) for part in text.split("|")
    }
    assert states == set(OUTCOMES) - {"answered"}


def test_rules_have_a_name_of_their_own_a_severity_and_a_summary():
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"Maskfed[A-Za-z]+", name) for name in names)
    for rule in RULES:
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("info", "warning", "critical") and rule["annotations"].keys() == {
            "summary"
        }
        assert re.fullmatch(r"\d+[mhd]", rule.get("for", "0m"))
        labels = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        kept = [set(names.replace(" ", "").split(",")) for names in re.findall(r"\bby \(([^)]*)\)", rule["expr"])]
        assert labels <= (set.intersection(*kept) if kept else LABELS), rule["alert"]


def test_the_dashboard_has_the_shape_that_grafana_reads():
    assert {"uid", "title", "schemaVersion", "panels", "time", "refresh", "templating"} <= DASHBOARD.keys()
    assert isinstance(DASHBOARD["schemaVersion"], int) and "id" not in DASHBOARD
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["w"] >= 1 and place["x"] + place["w"] <= 24
        cells = set(
            itertools.product(range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"]))
        )
        assert not cells & taken, panel["title"]
        taken |= cells
    for panel in PANELS:
        assert panel["type"] in KINDS and panel["title"] and panel["description"], panel
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS and panel["fieldConfig"]["overrides"] == []
        references = [target["refId"] for target in panel["targets"]]
        assert references == list("ABCDE"[: len(references)]) and references
        for each in (panel, *panel["targets"]):
            assert each["datasource"] == {"type": "prometheus", "uid": "maskfed-prometheus"}
        for target in panel["targets"]:
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= LABELS


def test_compose_provisions_what_the_files_say():
    compose = yaml.safe_load((FOLDER.parent / "compose.yaml").read_text())
    services = {name: each for name, each in compose["services"].items() if each.get("profiles") == ["monitoring"]}
    assert services.keys() == {"prometheus", "grafana"}
    mounted = {}
    for service in services.values():
        for volume in service["volumes"]:
            source, target, *mode = volume.split(":")
            if source.startswith("./"):
                assert mode == ["ro"] and (FOLDER.parent / source).is_file()
                mounted[target] = Path(source).name
            else:
                assert source in compose["volumes"]
    assert sorted(mounted.values()) == sorted(path.name for path in FOLDER.iterdir())
    (source,) = yaml.safe_load((FOLDER / "datasource.yml").read_text())["datasources"]
    assert (source["uid"], source["url"]) == (PANELS[0]["datasource"]["uid"], "http://server:9090")
    (provider,) = yaml.safe_load((FOLDER / "dashboards.yml").read_text())["providers"]
    assert mounted[f"{provider['options']['path']}/maskfed.json"] == "dashboard.json"
    prometheus = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    assert all(mounted[file] == "alerts.yml" for file in prometheus["rule_files"])
    ((target,),) = [each["targets"] for job in prometheus["scrape_configs"] for each in job["static_configs"]]
    assert compose["services"]["server"]["command"][-1] == target.rpartition(":")[2]
    assert services["prometheus"]["network_mode"] == "service:server"
    assert services["grafana"]["ports"] == ["127.0.0.1:3000:3000"]
