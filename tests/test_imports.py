"""The import rule: client -> shared <- server, deploy apart, sub-packages in layers, heavy packages in few places."""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("server", "client", "shared", "deploy")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
ALLOWED = {"server": {"server", "shared"}, "client": {"client", "shared"}, "shared": {"shared"}, "deploy": {"deploy"}}
MAY_IMPORT_DEPLOY = ("server/cli/", "client/cli/", "server/simulation/demo/", "server/simulation/virtual_keys.py")
MAY_USE_FLOWERS_INTERNALS = (
    "deploy/guards/",
    "client/entry.py",
    "server/entry.py",
    "server/simulation/entry.py",
    "server/federation/fleet/superlink.py",
    "server/federation/fleet/code_bundle.py",
)
WITH_FLWR = ("training", "envelope", "sealing", "agreement/offer", "secure_sum/key_question", "secure_sum/unmask")
WITH_OPACUS = tuple(f"client/privacy/{name}.py" for name in ("accounting", "dp_sgd"))
INSIDE_FUNCTIONS_ONLY = {"torch_fidelity", "onnxruntime", "diffusers"}
WITHOUT_TORCH = (
    "client.answers.audit_request",
    "client.answers.statistics.mean_image",
    "client.answers.statistics.statistics_request",
    "client.app",
    "client.cli",
    "client.entry",
    "client.live",
    "client.offers",
    "client.operator",
    "client.policy",
    "client.records",
    "client.secure",
    "client.simulated",
    "client.training_request",
    "server.alignment",
    "server.app",
    "server.cli",
    "server.federation",
    "server.live",
    "server.planning",
    "server.release",
    "server.report",
    "server.runs",
    "server.simulation",
    "server.studies.page",
    "shared.data",
    "shared.experiment",
    "shared.messages",
    "shared.pages",
    "shared.secure_aggregation",
    "shared.seeding",
    "shared.storage",
    "shared.updates",
)
"""Modules, and sub-packages with all of theirs, that load without torch: it takes half a gigabyte of memory."""
LAYERS = {
    "shared": (
        {"shared.errors"},
        {
            "shared.experiment",
            "shared.help_screen",
            "shared.machine_refusals",
            "shared.paths",
            "shared.random_numbers",
            "shared.seeding",
            "shared.student",
        },
        {"shared.data.formats", "shared.data.portraits", "shared.diffusion", "shared.storage", "shared.updates"},
        {"shared.data", "shared.evaluation", "shared.planning", "shared.secure_aggregation"},
        {"shared.messages", "shared.training"},
        {
            "shared.audits",
            "shared.commandline",
            "shared.evidence",
            "shared.messages.agreement",
            "shared.messages.secure_sum",
            "shared.pages",
        },
    ),
    "client": (
        {"client.home", "client.limits", "client.private_files"},
        {"client.settings"},
        {"client.memory", "client.records"},
        {"client.data", "client.privacy.randomness"},
        {"client.policy", "client.privacy"},
        {"client.secure", "client.training"},
        {"client.answers.statistics", "client.offers", "client.operator"},
        {"client.answers", "client.live"},
        {"client.training_request"},
        {"client.app", "client.simulated"},
        {"client.cli", "client.entry"},
    ),
    "server": (
        {
            "server.evaluation.measures",
            "server.federation.fleet",
            "server.planning",
            "server.runs",
            "server.training.foreign",
        },
        {"server.federation.client_level", "server.federation.messaging", "server.report", "server.training"},
        {"server.federation.updates"},
        {"server.federation.acceptance", "server.federation.secure"},
        {"server.federation.rounds"},
        {"server.alignment", "server.evaluation", "server.evaluation.held_out", "server.federation", "server.release"},
        {"server.app", "server.live", "server.simulation", "server.studies"},
        {"server.simulation.demo", "server.studies.page", "server.studies.run"},
        {"server.cli.membership"},
        {"server.cli", "server.entry"},
    ),
    "deploy": (
        {"deploy.errors"},
        {"deploy.identity", "deploy.observe"},
        {"deploy.alerts", "deploy.checks"},
        {"deploy.processes"},
        {"deploy.guards.web"},
        {"deploy.coordinator", "deploy.guards"},
        {"deploy.doctor", "deploy.pages", "deploy.warm"},
    ),
}
"""Sub-packages from the bottom to the top; each may import those of lower lines only, late imports included."""
MAX_MODULES, MAX_LINES, MAX_CHAIN = 9, 250, 8
SAME_AT_BOTH_SIDES = {
    "alerts",  # what is told to a webhook, by a coordinator and by a site
    "app",  # Flower's entry points: the name is part of `server.app:app` and `client.app:app`
    "doctor",  # one command, of the site's own side and of what both sides have
    "entry",  # the process that Flower starts, of a run, of a simulated run and of a message
    "errors",  # deploy may not import shared
    "evidence",  # the signed file of a release, and that of a site
    "figures",  # what each side's live page adds up
    "main",  # the two programs
    "metrics",  # what each side exposes to Prometheus
    "rosters",  # the coordinator's question with whom to add up, and the site's check of it
    "status",  # the command `status` of each side
}
THING_AND_ITS_COMMANDS = {
    "audit",  # the message, and the operator's own audits
    "ledger",  # the record, and the commands that show it
    "release",  # the section of an experiment, and the commands that obey it
    "request_key",  # the certified key, and the file that it lies in
    "superlink",  # Flower's process behind our guard, and the coordinator's calls to it
    "unmask",  # the question for shares, and the site's one answer
}
EXCUSE = re.compile(r"^# Longer than 250 lines: \S.{20,}", re.MULTILINE)


@cache
def syntax(path: Path) -> ast.Module:
    """Each module is parsed once for all tests."""
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


CODE = {module_name(path): path for path in MODULES if path.name != "__init__.py"}


def home_of(module: str) -> str:
    """The sub-package of a module, or the module itself where it lies at the top of its package."""
    return module.rpartition(".")[0] if module.count(".") > 1 else module


def imported(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Full module names and whether the import stands at module level."""
    top = set(ast.iter_child_nodes(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node in top


def violations(path: Path) -> Iterator[str]:
    name = path.relative_to(ROOT).as_posix()
    package = name.split("/")[0]
    allowed = ALLOWED[package] | ({"deploy"} if name.startswith(MAY_IMPORT_DEPLOY) else set())
    for module, is_top in imported(syntax(path)):
        root = module.split(".")[0]
        if root in PACKAGES and root not in allowed:
            yield f"{name} imports {module}"
        if package == "shared" and (
            root == "opacus" or (root == "flwr" and name not in {f"shared/messages/{each}.py" for each in WITH_FLWR})
        ):
            yield f"{name} imports {module}"
        if root == "opacus" and name not in WITH_OPACUS:
            yield f"{name} imports {module}"
        if root in INSIDE_FUNCTIONS_ONLY and is_top:
            yield f"{name} imports {module} at module level"
        # Everything of flwr outside its public modules is internal and pinned.
        is_internal = root == "flwr" and module not in {"flwr.app", "flwr.serverapp", "flwr.clientapp"}
        if is_internal and not name.startswith(MAY_USE_FLOWERS_INTERNALS):
            yield f"{name} imports the internal {module}"
        if root in {"pickle", "dill", "cloudpickle"}:
            yield f"{name} imports {module}"


def test_modules_import_only_what_their_package_may():
    assert len(MODULES) > 400
    assert [each for path in MODULES for each in violations(path)] == []


def test_a_forbidden_import_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "shared").mkdir()
    bad = tmp_path / "shared" / "bad.py"
    bad.write_text("import opacus\nfrom client import ledger\nimport torch_fidelity\nfrom flwr.common import x\n")
    assert len(list(violations(bad))) == 6


def test_commands_rounds_and_refusals_never_load_torch():
    modules = [name for name in CODE if f"{name}.".startswith(tuple(f"{kept}." for kept in WITHOUT_TORCH))]
    assert len(modules) > len(WITHOUT_TORCH)
    code = f"import sys, importlib\nfor m in {modules}: importlib.import_module(m)\nsys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT, timeout=120)


@pytest.mark.parametrize("program", ["server", "client"])
def test_help_loads_what_it_prints_and_no_more(program):
    code = f"""
import sys
from {program}.cli.main import app
heavy = {{"torch", "numpy", "pydantic", "pywt", "flwr", "cryptography", "PIL", "opacus", "httpx", "grpc"}}
for option in ("--help", "-h", "--version"):
    try:
        app([option])
    except SystemExit as ended:
        assert ended.code == 0
    assert not heavy & sys.modules.keys(), (option, heavy & sys.modules.keys())
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT, timeout=120, capture_output=True, text=True
    )
    assert done.stdout.count("Usage:") == 2 and done.stdout.count("maskfed 0.") == 1


@pytest.mark.parametrize("module", ["server.federation.status", "client.operator.status"])
def test_status_is_told_without_flower(module):
    code = (
        f"import sys\nimport {module}\n"
        "heavy = {'torch', 'pywt', 'flwr', 'cryptography', 'opacus', 'httpx', 'grpc'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT, timeout=120)


@cache
def graph() -> dict[str, set[str]]:
    """Every module with the modules it imports, at its top or inside a function."""
    found = {}
    for name, path in CODE.items():
        names = set()
        for node in ast.walk(syntax(path)):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[name] = (names & CODE.keys()) - {name}
    return found


def longest_chain(edges: Mapping[str, set[str]], package: str) -> list[str]:
    """The longest way down from import to import inside a package."""
    chains: dict[str, list[str]] = {}
    for name in TopologicalSorter(edges).static_order():
        below = [chains[other] for other in edges[name] if other.startswith(f"{package}.")]
        chains[name] = [name, *max(below, key=len, default=[])]
    return max((chain for name, chain in chains.items() if name.startswith(f"{package}.")), key=len)


def test_every_sub_package_has_its_layer():
    homes = {home_of(name) for name in CODE}
    assert homes == {home for layers in LAYERS.values() for layer in layers for home in layer}


def test_imports_between_sub_packages_go_down_the_layers():
    height = {home: level for layers in LAYERS.values() for level, layer in enumerate(layers) for home in layer}
    wrong = [
        f"{name} imports {other}"
        for name, others in graph().items()
        for other in others
        if name.split(".")[0] == other.split(".")[0]
        and home_of(name) != home_of(other)
        and height[home_of(name)] <= height[home_of(other)]
    ]
    assert wrong == []


def test_no_module_imports_itself_by_a_detour():
    TopologicalSorter(graph()).prepare()
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


def test_the_longest_import_chain_of_the_coordinator_is_short():
    assert longest_chain({"a.x": {"a.y", "b.z"}, "a.y": set(), "b.z": {"b.w"}, "b.w": set()}, "a") == ["a.x", "a.y"]
    chain = longest_chain(graph(), "server")
    assert len(chain) <= MAX_CHAIN, " -> ".join(chain)


def test_no_folder_has_more_modules_than_one_sees_at_a_glance():
    folders = Counter(path.parent.relative_to(ROOT).as_posix() for path in CODE.values())
    assert {name: count for name, count in folders.items() if count > MAX_MODULES} == {}


def test_no_noun_names_two_things():
    """Who looks for a word finds one module and one class, but for the same thing in two places."""
    modules = Counter(path.stem for path in CODE.values())
    assert {name for name, count in modules.items() if count > 1} == SAME_AT_BOTH_SIDES | THING_AND_ITS_COMMANDS
    classes = Counter(
        node.name for path in CODE.values() for node in ast.walk(syntax(path)) if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in classes.items() if count > 1] == []


def test_long_modules_say_why():
    long = {path: path.read_text(encoding="utf-8") for path in (*MODULES, *(ROOT / "benchmarks").rglob("*.py"))}
    assert [
        f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines"
        for path, text in long.items()
        if text.count("\n") > MAX_LINES and not EXCUSE.search(text)
    ] == []
