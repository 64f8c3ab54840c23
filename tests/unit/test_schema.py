"""The JSON Schema agrees with the parser, as far as a schema can."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from registry.document import read
from registry.schema import DIALECT, fields, model_schema
from registry.schema_reference import reference
from registry.spec import ConfigError, parse_model
from tests.bad_documents import CASES, GOOD, UNREADABLE, BadDocument

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path for path in (ROOT / "configs").iterdir() if path.is_file())
VALIDATOR = jsonschema.Draft202012Validator(model_schema())
JUDGED = [case for case in CASES if case.name not in UNREADABLE]


def plain(text: bytes | str) -> Any:
    """As a JSON tool sees it: lists, not tuples."""
    return json.loads(json.dumps(read(text).value))


def test_it_is_a_schema_of_its_dialect() -> None:
    assert model_schema()["$schema"] == DIALECT
    jsonschema.Draft202012Validator.check_schema(model_schema())


def test_each_caller_has_a_copy() -> None:
    model_schema()["$defs"].clear()
    assert model_schema()["$defs"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_fits(path: Path) -> None:
    VALIDATOR.validate(plain(path.read_bytes()))
    VALIDATOR.validate(yaml.safe_load(path.read_bytes()))


def test_the_good_document_fits() -> None:
    VALIDATOR.validate(plain(GOOD))


@pytest.mark.parametrize("case", JUDGED, ids=lambda case: case.name)
def test_it_refuses_what_a_schema_can(case: BadDocument) -> None:
    assert VALIDATOR.is_valid(plain(case.raw)) is not case.schema_refuses


def test_it_refuses_most_of_them() -> None:
    refused = [case for case in JUDGED if case.schema_refuses]
    assert len(refused) / len(JUDGED) > 0.75


def test_every_field_says_what_it_is_for() -> None:
    for field in fields():
        assert len(field.description) > 4, field
        assert field.kind != "any", field


def test_nothing_of_the_machinery_shows() -> None:
    text = json.dumps(model_schema())
    for word in (
        "RuleShape",
        "FrozenDict",
        "api_version",
        "memory_mb",
        "regions",
        "``",
        "pydantic",
    ):
        assert f'"{word}"' not in text
        assert word in {"regions", "memory_mb"} or word not in text, word


CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text()


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", CONFIGURATION, re.MULTILINE | re.DOTALL)


def test_the_configuration_reference_is_the_schemas() -> None:
    wanted = reference()
    assert wanted in CONFIGURATION, "print it with: python -m registry.schema_reference"


def test_documents_in_the_configuration_page_are_what_it_says() -> None:
    for text in blocks("yaml"):
        parse_model(text, name=None)
    (refused,), (shown,) = blocks("yaml refused"), blocks("text")
    with pytest.raises(ConfigError) as caught:
        parse_model(refused, name=None)
    assert "".join(f"{error}\n" for error in caught.value.errors) == shown
