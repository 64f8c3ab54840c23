"""The distribution, its lock files, the image and the compose file."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import paddlewheel
from paddlewheel.cli.root import root
from paddlewheel.embedded_etcd import find_etcd

ROOT = Path(__file__).parents[2]
OURS = ("registry", "loader", "router", "paddlewheel")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
IMPORT_NAMES = {
    "grpcio": "grpc", "protobuf": "google", "pyyaml": "yaml", "pillow": "PIL",
    "python-ulid": "ulid", "paddlepaddle": "paddle", "paddlepaddle-gpu": "paddle",
    "nvidia-ml-py": "pynvml", "pyjwt": "jwt",
}  # fmt: skip


@pytest.mark.parametrize("name", OURS)
def test_no_other_distribution_provides_our_packages(name: str) -> None:
    providers = importlib.metadata.packages_distributions().get(name, [])
    assert {canonicalize_name(provider) for provider in providers} <= {"paddlewheel"}
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin == str(ROOT / name / "__init__.py")
    for folder in sys.path:
        if folder and "packages" in folder:  # site-packages, dist-packages
            assert not (Path(folder) / name).exists()


def test_versions_agree() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == paddlewheel.__version__
    assert importlib.metadata.version("paddlewheel") == paddlewheel.__version__


# --- dependencies -------------------------------------------------------------------------------


def pins(lock: Path) -> dict[str, set[str]]:
    """The versions of each distribution in a lock file; markers may give several."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", lock.read_text(), re.MULTILINE):
        found.setdefault(canonicalize_name(name), set()).add(version)
    return found


def wanted(*extras: str) -> Iterable[Requirement]:
    project = PYPROJECT["project"]
    groups = [project["dependencies"], *(project["optional-dependencies"][e] for e in extras)]
    return [Requirement(text) for group in groups for text in group]


@pytest.mark.parametrize(
    ("lock", "extras"),
    [
        ("test.txt", ("cpu", "etcd", "dev")),
        ("demo.txt", ("cpu", "etcd")),
        ("image-cpu.txt", ("cpu",)),
        ("image-gpu.txt", ("gpu",)),
    ],
)
def test_locks_pin_what_the_project_asks_for(lock: str, extras: tuple[str, ...]) -> None:
    pinned = pins(ROOT / "requirements" / lock)
    for requirement in wanted(*extras):
        versions = pinned.get(canonicalize_name(requirement.name), set())
        assert versions, f"{lock} lacks {requirement.name}: run `make lock`"
        assert all(requirement.specifier.contains(version) for version in versions)


@pytest.mark.parametrize("lock", ["demo.txt", "image-cpu.txt"])
def test_smaller_locks_take_the_versions_that_are_tested(lock: str) -> None:
    tested = pins(ROOT / "requirements" / "test.txt")
    for name, versions in pins(ROOT / "requirements" / lock).items():
        assert versions <= tested[name], name


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_locks_have_hashes_and_name_no_index(lock: Path) -> None:
    text = lock.read_text()
    entries = re.split(r"^(?=\S)", text, flags=re.MULTILINE)[1:]
    assert entries
    assert all("--hash=sha256:" in entry for entry in entries)
    assert "://" not in text
    assert "index" not in re.sub(r"^\S+==.*$", "", text, flags=re.MULTILINE)


def test_every_runtime_dependency_is_used_and_has_its_reason() -> None:
    reasons = (ROOT / "docs" / "decisions" / "0002-runtime-dependencies.md").read_text()
    imported = imports_of_ours()
    for requirement in wanted():
        assert f"| {requirement.name} |" in reasons
        assert module_of(requirement) in imported, f"nothing imports {requirement.name}"


def test_everything_imported_is_declared() -> None:
    declared = {module_of(requirement) for requirement in wanted("cpu", "gpu", "etcd", "demo")}
    declared |= {"multidict", "pydantic_core"}  # parts of aiohttp's and pydantic's own interfaces
    assert imports_of_ours() - sys.stdlib_module_names - set(OURS) <= declared


def module_of(requirement: Requirement) -> str:
    return IMPORT_NAMES.get(requirement.name, requirement.name.replace("-", "_"))


def imports_of_ours() -> set[str]:
    return {
        name for package in OURS for path in (ROOT / package).rglob("*.py") for name in names(path)
    }


def names(path: Path) -> Iterable[str]:
    """The top-level packages that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


# --- image and compose file -----------------------------------------------------------------------


def test_the_image_copies_what_exists_and_is_not_ignored() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    sources = [
        source.rstrip("/")
        for line in re.findall(r"^COPY (.+) \S+$", dockerfile, re.MULTILINE)
        for source in line.split()
    ]
    ignored = (ROOT / ".dockerignore").read_text()
    assert set(OURS) < set(sources)
    for source in sources:
        assert (ROOT / source).exists()
        assert f"!{source}" in ignored
    assert re.search(r"^ARG DEVICE=cpu$", dockerfile, re.MULTILINE)


def test_compose_has_three_members_two_nodes_and_a_gpu_profile() -> None:
    services: dict[str, Any] = COMPOSE["services"]
    assert [name for name in services if name.startswith("etcd")] == ["etcd1", "etcd2", "etcd3"]
    assert [name for name in services if "profiles" not in services[name]][3:] == ["node1", "node2"]
    assert services["node-gpu"]["profiles"] == ["gpu"]
    assert services["node-gpu"]["build"]["args"]["DEVICE"] == "gpu"
    for service in services.values():
        volumes = [volume for volume in service["volumes"] if not volume.startswith("./")]
        assert all(volume.partition(":")[0] in COMPOSE["volumes"] for volume in volumes)


@pytest.mark.parametrize("name", ["node1", "node2", "node-gpu"])
def test_nodes_in_compose_are_started_with_flags_that_exist(name: str) -> None:
    words: list[str] = COMPOSE["services"][name]["command"]
    command = root.get_command(click.Context(root), words[0])
    assert command is not None
    context = command.make_context(words[0], words[1:])
    assert context.params["node_id"] == name
    members = context.params["etcd"].split(",")
    assert members == [f"http://etcd{n}:2379" for n in (1, 2, 3)]
    assert COMPOSE["services"][name]["stop_grace_period"] == "40s"
    assert context.params["drain_s"] < 40


@pytest.mark.parametrize("name", ["etcd1", "etcd2", "etcd3"])
def test_members_in_compose_are_started_with_flags_that_exist(name: str) -> None:
    asked = subprocess.run([find_etcd(), "--help"], capture_output=True, text=True, check=False)
    known = set(re.findall(r"--[a-z-]+", asked.stdout + asked.stderr))
    flags = dict(flag.split("=", 1) for flag in COMPOSE["services"][name]["command"])
    assert flags.keys() <= known
    assert flags["--name"] == name
    assert f"{name}={flags['--initial-advertise-peer-urls']}" in flags["--initial-cluster"]


def test_make_has_the_promised_targets_and_ci_runs_one() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test", "check", "bench", "clean"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
