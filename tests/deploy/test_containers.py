"""Container files: the properties that keep a deployment safe, read from the files; no container engine is needed."""

import re
from pathlib import Path

import grpc
import pytest
import yaml
from grpc_health.v1 import health, health_pb2_grpc

from deploy.checks.probe import probe
from deploy.processes.process import free_ports

ROOT = Path(__file__).parents[2]
DOCKERFILES = [ROOT / "deploy" / "containers" / f"Dockerfile.{name}" for name in ("server", "client")]
COMPOSE = yaml.safe_load((ROOT / "deploy" / "containers" / "compose.yaml").read_text())
OWN = [name for name, service in COMPOSE["services"].items() if "build" in service]
"""Services of images that are built here."""


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_image_runs_as_an_ordinary_user_from_the_pinned_lock(path: Path):
    text = path.read_text()
    last_stage = text[text.rindex("\nFROM ") :]
    assert re.search(r"^USER \d{5}:\d{5}$", last_stage, re.MULTILINE)
    assert "--require-hashes requirements.lock" in text
    assert "pip install" not in last_stage


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_every_copied_file_exists_and_may_enter_the_build(path: Path):
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in re.findall(r"^COPY (?!--from)(.*)$", path.read_text(), re.MULTILINE):
        *sources, _ = line.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            assert source.split("/")[0] in allowed, source


def test_nothing_enters_a_build_unless_it_is_listed():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    # The last line that matches decides.
    assert {"**/*.key", "**/*.pem", "**/*.secret"} <= set(lines[max(map(lines.index, [*filter(is_kept, lines)])) :])


def is_kept(line: str) -> bool:
    return line.startswith("!")


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_service_is_read_only_without_capabilities_and_restarts_always(name: str):
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["restart"] == "always"
    own = "wget" if "monitoring" in service.get("profiles", ()) else "deploy.checks.probe"
    assert own in service["healthcheck"]["test"]


def test_only_the_door_is_published():
    published = {name: service["ports"] for name, service in COMPOSE["services"].items() if "ports" in service}
    assert published.pop("grafana")[0].startswith("127.0.0.1:") and published == {"server": ["443:443"]}


@pytest.mark.parametrize("name", OWN)
def test_memory_is_limited_and_the_processes_know_for_which_model(name: str):
    service = COMPOSE["services"][name]
    assert service["mem_limit"] == "${MASKFED_MEMORY:-8g}"
    assert service["environment"]["MASKFED_PARAMETERS"] == "${MASKFED_PARAMETERS:-}"


@pytest.mark.parametrize("name", ["site", "site-cpu"])
def test_images_are_mounted_read_only(name: str):
    (mount,) = (each for each in COMPOSE["services"][name]["volumes"] if "/images" in str(each))
    assert mount["target"] == "/images"
    assert mount["read_only"] is True


@pytest.mark.parametrize("name", ["site", "site-cpu"])
def test_sites_of_all_projects_share_one_registry(name: str):
    service = COMPOSE["services"][name]
    assert service["environment"]["MASKFED_REGISTRY"] == "/registry"
    assert "registry:/registry" in service["volumes"]
    assert COMPOSE["volumes"]["registry"] == {"name": "maskfed-registry"}


def test_no_variable_must_be_set_to_start_the_other_service():
    """Compose fills in the whole file, whichever service is started."""
    assert ":?" not in (ROOT / "deploy" / "containers" / "compose.yaml").read_text()


@pytest.mark.parametrize("name", OWN)
def test_every_volume_covers_a_folder_that_the_images_user_owns(name: str):
    """A new volume takes owner and mode from the image; without such a folder it belongs to root."""
    text = (ROOT / COMPOSE["services"][name]["build"]["dockerfile"]).read_text()
    volumes = [each.split(":") for each in COMPOSE["services"][name]["volumes"] if isinstance(each, str)]
    assert volumes
    for _volume, target in volumes:
        assert re.search(rf"(--home-dir|install -d .*-o maskfed.*) {target}\b", text), target
        assert re.search(rf"^VOLUME .*{target}\b", text, re.MULTILINE)


def test_probe_tells_a_serving_process_from_none():
    port = free_ports(1)[0]
    assert probe(f"127.0.0.1:{port}", seconds=0.5) in {"UNAVAILABLE", "DEADLINE_EXCEEDED"}
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        servicer = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        bound = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            assert probe(f"127.0.0.1:{bound}") == "SERVING"
        finally:
            server.stop(None).wait()
