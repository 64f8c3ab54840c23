"""What a good document means: values, defaults, frozenness."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from registry.names import ModelName, Version
from registry.spec import (
    CanarySpec,
    ConfigError,
    HeaderRule,
    Limits,
    ModelDocument,
    PercentRule,
    Placement,
    RegionRule,
    UserRule,
    parse_model,
    rule_document,
)
from tests.bad_documents import GOOD

CONFIGS = Path(__file__).parents[2] / "configs"
EXAMPLES = sorted(path for path in CONFIGS.iterdir() if path.suffix in {".yaml", ".json"})
MINIMAL = (CONFIGS / "minimal.yaml").read_text()


def spec(extra: str = "", text: str = MINIMAL) -> Any:
    return parse_model(text + extra, name=None).spec


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_good(path: Path) -> None:
    document = parse_model(path.read_bytes(), name=ModelName(path.stem))
    assert document.name == path.stem
    assert document.spec.version(document.spec.live).version == document.spec.live


def test_there_are_examples() -> None:
    assert {path.stem for path in EXAMPLES} >= {
        "minimal", "ocr-rec", "canary", "strict-golden", "gpu", "recommendation",
    }  # fmt: skip


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_json_and_yaml_of_the_same_document_are_the_same(path: Path) -> None:
    as_yaml = parse_model(path.read_bytes(), name=None)
    plain = yaml.safe_load(path.read_bytes())
    assert parse_model(json.dumps(plain), name=None) == as_yaml
    assert parse_model(yaml.safe_dump(plain), name=None) == as_yaml


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_what_is_written_out_reads_as_the_same(path: Path) -> None:
    document = parse_model(path.read_bytes(), name=None)
    written = document.model_dump_json(by_alias=True)
    assert parse_model(written, name=None) == document


def test_the_defaults_are_those_of_the_contract() -> None:
    found = parse_model(MINIMAL, name=None)
    assert (found.api_version, found.kind, found.name) == ("paddlewheel/v1", "Model", "minimal")
    assert found.metadata.labels == {}
    one = found.spec
    assert one.canary is None
    assert (one.versions[0].sha256, one.versions[0].compatibility) == ({}, "none")
    placement = one.placement
    assert (placement.device, placement.replicas, placement.memory_mb) == ("cpu", 1, None)
    assert (placement.priority, placement.labels) == ("normal", {})
    assert one.predictor.model_dump() == {"threads": 1, "precision": "fp32", "options": {}}
    warmup = one.warmup
    assert (warmup.requests, warmup.shapes, warmup.golden) == (3, {}, None)
    assert (warmup.rtol, warmup.atol) == (1e-3, 1e-5)
    rollback = one.rollback
    assert rollback.codes == ("sticky", "memory", "unsupported")
    assert (rollback.consecutive, rollback.window_s, rollback.quorum) == (3, 30.0, 1)
    assert rollback.bake_s == 600.0
    limits = one.limits
    assert (limits.timeout_s, limits.hang_s, limits.queue) == (10.0, 5.0, 256)
    assert (limits.max_body_mb, limits.drain_s, limits.poison_s) == (64, 30.0, 600.0)


def test_the_contracts_full_example() -> None:
    found = parse_model((CONFIGS / "ocr-rec.yaml").read_bytes(), name=ModelName("ocr-rec")).spec
    assert [version.compatibility for version in found.versions] == ["strict", "none"]
    assert found.canary is not None
    assert found.canary.version == "20240610"
    assert found.canary.rules == (
        HeaderRule(name="X-Canary", equals="1"),
        UserRule(header="X-User-Id", percent=5),
        RegionRule(header="X-Region", regions=("cn-sh", "us-west"), percent=10),
        PercentRule(percent=2),
    )
    assert found.placement.memory_mb == 2048
    assert found.warmup.shapes == {"x": (1, 3, 48, 320)}
    assert found.rollback.codes == (2, 700, 719, -101, -102, -204)


def test_hang_is_half_of_the_timeout_unless_given() -> None:
    assert spec("  limits: {timeout_s: 3}\n").limits.hang_s == 1.5
    assert spec("  limits: {timeout_s: 3, hang_s: 2}\n").limits.hang_s == 2
    assert Limits(timeout_s=8).hang_s == 4


def test_a_region_rules_percent_is_100_unless_given() -> None:
    canary = spec('  canary: {version: "1", rules: [{region: {header: R, in: [a]}}]}\n').canary
    assert canary.rules == (RegionRule(header="R", regions=("a",), percent=100),)


GOOD_LINES = {
    "a canary without rules": '  canary: {version: "1"}\n',
    "nothing after canary": "  canary:\n",
    "no standby": "  rollback: {bake_s: 0}\n",
    "only dead workers count": "  rollback: {codes: []}\n",
    "percent at both ends": '  canary: {version: "1", rules: [{percent: 0}, {percent: 100}]}\n',
    "a percent of four digits": '  canary: {version: "1", rules: [{percent: 0.01}]}\n',
    "an empty header value": '  canary: {version: "1", rules: [{header: {name: A, equals: ""}}]}\n',
    "a scalar input": "  warmup: {shapes: {x: []}}\n",
    "options of all kinds": "  predictor: {options: {a: 1, b: x, c: true, d: 0.5, e: [p, q]}}\n",
    "any gpu": "  placement: {device: gpu}\n",
    "a gpu": '  placement: {device: "gpu:11"}\n',
    "a gpu without quotes": "  placement: {device: gpu:0}\n",
    "a float for a duration": "  limits: {timeout_s: 0.05}\n",
}


@pytest.mark.parametrize("case", GOOD_LINES)
def test_accepted(case: str) -> None:
    assert spec(GOOD_LINES[case]).live == "1"


@pytest.mark.parametrize(
    "version", ["20240521", "1.4.0", "1.4.0-canary.2", "v1", "1.0+cpu", "2024-05-21", "a" * 64, "7"]
)
def test_versions_as_people_write_them(version: str) -> None:
    found = spec("", MINIMAL.replace('"1"', f'"{version}"'))
    assert found.live == version
    assert found.version(Version(version)) is found.versions[0]


@pytest.mark.parametrize(
    "source",
    ["/models/m/1", "models/m/1", "file:///m", "s3://b/k", "zip://a::s3://b/c.zip", "C:/m"],
)
def test_a_source_is_a_path_or_a_url(source: str) -> None:
    assert (
        spec("", MINIMAL.replace("file:///models/minimal/1", source)).versions[0].source == source
    )


def test_a_version_that_is_not_listed() -> None:
    with pytest.raises(KeyError):
        spec().version(Version("9"))


def test_a_document_is_frozen_hashable_and_travels() -> None:
    document = parse_model(GOOD, name=ModelName("m"))
    with pytest.raises(ValidationError):
        document.spec.placement.replicas = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        document.metadata.labels["team"] = "x"  # type: ignore[index]
    with pytest.raises(TypeError):
        document.spec.warmup.shapes.clear()  # type: ignore[attr-defined]
    assert hash(document) == hash(parse_model(GOOD, name=None))
    for same in (
        pickle.loads(pickle.dumps(document)),
        copy.deepcopy(document),
        copy.copy(document),
    ):
        assert same == document
        with pytest.raises(TypeError):
            same.metadata.labels["team"] = "x"


def test_values_can_be_made_in_python_too() -> None:
    canary = CanarySpec(version=Version("1"), rules=(PercentRule(percent=3),))
    assert canary.rules[0].kind == "percent"
    assert Placement(memory_mb=3).model_dump(by_alias=True)["memoryMB"] == 3


def test_field_names_of_python_are_unknown_to_documents() -> None:
    text = GOOD.replace("in: [cn-sh]", "regions: [cn-sh]").replace("memoryMB", "memory_mb")
    with pytest.raises(ConfigError) as caught:
        parse_model(text.replace("apiVersion", "api_version"), name=None)
    assert {error.path for error in caught.value.errors} >= {
        "api_version", "spec.canary.rules[2].region.regions", "spec.placement.memory_mb",
    }  # fmt: skip


def test_rules_are_shown_as_they_are_written() -> None:
    document = parse_model((CONFIGS / "canary.yaml").read_bytes(), name=None)
    assert document.spec.canary is not None
    plain = yaml.safe_load((CONFIGS / "canary.yaml").read_bytes())
    written = plain["spec"]["canary"]["rules"]
    written[5]["region"]["percent"] = 100
    assert [rule_document(rule) for rule in document.spec.canary.rules] == written


def test_all_errors_come_at_once_in_the_order_of_the_text() -> None:
    text = (
        GOOD.replace('live: "1"', "live: 1")
        .replace("name: X-Canary", "name: X Canary")
        .replace("- percent: 2", "- percent: 200")
        .replace("replicas: 1", "replicas: none")
        .replace("requests: 3", "requests: 3, requests: 4")
        .replace("bake_s: 600", "bake_s: 1_000")
        .replace("queue: 256", "quue: 256")
    )
    with pytest.raises(ConfigError) as caught:
        parse_model(text, name=ModelName("other"))
    assert [(error.path, error.line) for error in caught.value.errors] == [
        ("metadata.name", 3),
        ("spec.live", 5),
        ("spec.canary.rules[0].header.name", 14),
        ("spec.canary.rules[3].percent", 17),
        ("spec.placement.replicas", 18),
        ("spec.warmup.requests", 20),
        ("spec.rollback.bake_s", 21),
        ("spec.limits.quue", 22),
    ]


def test_odd_text_in_one_field_does_not_spoil_the_error_of_another() -> None:
    odd = GOOD.replace('- version: "2"', f'- version: "{"v" * 3000} \\n"').replace(
        'live: "1"', 'live: "9"'
    )
    with pytest.raises(ConfigError) as caught:
        parse_model(odd, name=None)
    for error in caught.value.errors:
        assert "\n" not in error.message
        assert len(error.message) < 200


def test_more_errors_than_anybody_reads_are_cut() -> None:
    text = GOOD + "".join(f"unknown{n}: 1\n" for n in range(5000))
    with pytest.raises(ConfigError) as caught:
        parse_model(text, name=None)
    assert len(caught.value.errors) == 51
    assert caught.value.errors[-1].message == "and more errors"


def test_the_type_of_a_document_is_exact() -> None:
    document = parse_model(GOOD, name=None)
    assert isinstance(document, ModelDocument)
    assert type(document.spec.limits.timeout_s) is float
    assert type(document.spec.versions) is tuple
