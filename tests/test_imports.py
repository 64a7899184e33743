"""The import rule: client -> shared <- server, deploy apart, and heavy packages only where they belong."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("server", "client", "shared", "deploy")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
ALLOWED = {"server": {"server", "shared"}, "client": {"client", "shared"}, "shared": {"shared"}, "deploy": {"deploy"}}
MAY_IMPORT_DEPLOY = {
    "server/cli/main.py",
    "server/cli/sites.py",
    "server/simulation/demo.py",
    "server/simulation/virtual_keys.py",
    "client/cli/main.py",
    "client/cli/join.py",
}
WITH_FLWR = ("training", "envelope", "sealing")
INSIDE_FUNCTIONS_ONLY = {"torch_fidelity", "onnxruntime", "diffusers"}
WITHOUT_TORCH = [
    "shared.experiment.config",
    "shared.messages.training",
    "shared.messages.packing",
    "shared.messages.sealing",
    "shared.messages.envelope",
    "shared.storage.runlog",
    "shared.storage.checkpoint",
    "shared.seeding",
    "server.app",
    "server.release.audit_sites",
    "server.federation.rounds.loop",
    "server.federation.rounds.aggregation",
    "server.federation.fleet.superlink",
    "server.federation.fleet.registry",
    "server.runs.run_directory",
    "server.cli.main",
    "client.app",
    "client.answers.audit_request",
    "client.entry",
    "client.policy.rules",
    "client.records.ledger",
    "client.records.journal",
    "client.cli.main",
]


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
    allowed = ALLOWED[package] | ({"deploy"} if name in MAY_IMPORT_DEPLOY else set())
    for module, is_top in imported(ast.parse(path.read_text(encoding="utf-8"))):
        root = module.split(".")[0]
        if root in PACKAGES and root not in allowed:
            yield f"{name} imports {module}"
        if package == "shared" and (
            root == "opacus" or (root == "flwr" and name not in {f"shared/messages/{each}.py" for each in WITH_FLWR})
        ):
            yield f"{name} imports {module}"
        if root == "opacus" and name not in ("client/privacy/dp_sgd.py", "client/privacy/accounting.py"):
            yield f"{name} imports {module}"
        if root in INSIDE_FUNCTIONS_ONLY and is_top:
            yield f"{name} imports {module} at module level"
        # Everything of flwr outside its public modules is internal and pinned.
        is_internal = root == "flwr" and module not in {"flwr.app", "flwr.serverapp", "flwr.clientapp"}
        if is_internal and name not in {"server/federation/fleet/superlink.py", "client/entry.py"}:
            yield f"{name} imports the internal {module}"
        if root in {"pickle", "dill", "cloudpickle"}:
            yield f"{name} imports {module}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_module_imports_only_what_its_package_may(path: Path):
    assert list(violations(path)) == []


def test_a_forbidden_import_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "shared").mkdir()
    bad = tmp_path / "shared" / "bad.py"
    bad.write_text("import opacus\nfrom client import ledger\nimport torch_fidelity\nfrom flwr.common import x\n")
    assert len(list(violations(bad))) == 6


def test_commands_rounds_and_refusals_never_load_torch():
    code = (
        f"import sys, importlib\nfor m in {WITHOUT_TORCH}: importlib.import_module(m)\nsys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT, timeout=120)
