"""Every bad document is refused at the right place, in words a user can act on."""

from __future__ import annotations

import re

import pytest

from registry.names import ModelName
from registry.spec import ConfigError, parse_model
from tests.bad_documents import CASES, GOOD, MODEL, BadDocument

JARGON = re.compile(
    r"pydantic|validat|input should|extra inputs|valid (string|integer|dict|tuple|number)"
    r"|NoneType|str_|int_|dict|tuple|literal|instance|union|regex|pattern|object at",
    re.IGNORECASE,
)


def test_the_document_they_all_start_from_is_good() -> None:
    assert parse_model(GOOD, name=ModelName(MODEL)).name == MODEL


def test_there_are_enough_of_them_and_each_has_its_own_name() -> None:
    assert len(CASES) >= 100
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused_where_it_is_wrong(case: BadDocument) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_model(case.raw, name=ModelName(MODEL))
    errors = caught.value.errors
    meant = [error for error in errors if error.path == case.path and case.message in error.message]
    assert meant, [str(error) for error in errors]
    assert meant[0].line == case.line
    assert len(errors) == case.errors, [str(error) for error in errors]
    for error in errors:
        assert not JARGON.search(error.message), error.message
        assert len(str(error)) < 600
        assert "\n" not in str(error)
    assert "\n" not in str(caught.value), "a status and a log want one line"
    assert len(str(caught.value)) < 700
