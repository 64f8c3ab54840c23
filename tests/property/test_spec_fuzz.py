"""Whatever the text: a document or a `ConfigError`, soon, and never anything else."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from registry.document import read
from registry.document_tree import MAX_ERRORS, ConfigError, FieldError
from registry.names import ModelName
from registry.spec import ModelDocument, parse_model
from tests.bad_documents import CASES, GOOD

LIMIT_S = 2.0
MANY = settings(max_examples=200, suppress_health_check=list(HealthCheck), deadline=None)
PATH = re.compile(
    r'([A-Za-z_][A-Za-z0-9_]*|\["[^\n]*"\]|\[\d+\])(\.[A-Za-z_]\w*|\["[^\n]*"\]|\[\d+\])*'
)

GOOD_VALUE: dict[str, Any] = yaml.safe_load(GOOD)


def parse(text: bytes | str) -> ModelDocument | None:
    """Parse, and check everything that is promised of a refusal."""
    started = time.process_time()
    document: ModelDocument | None = None
    refused: tuple[FieldError, ...] = ()
    try:
        document = parse_model(text, name=ModelName("m"))
    except ConfigError as exc:
        refused = exc.errors
    if document is None:
        lines = (text if isinstance(text, str) else text.decode("utf-8", "replace")).count("\n")
        returns = text.count("\r") if isinstance(text, str) else text.count(b"\r")
        assert 0 < len(refused) <= MAX_ERRORS + 1
        for error in refused:
            assert error.path == "" or PATH.fullmatch(error.path), error
            # NEL, LS and PS end a line in YAML, so lines are bounded by characters, not exactly.
            assert error.line is None or 1 <= error.line <= lines + returns + 2 + _odd(text), error
            assert 0 < len(error.message) < 700
            assert "\n" not in str(error)
            str(error).encode("utf-8")
    assert time.process_time() - started < LIMIT_S
    if document is not None:
        assert parse_model(document.model_dump_json(by_alias=True), name=None) == document
    return document


def _odd(text: bytes | str) -> int:
    shown = text if isinstance(text, str) else text.decode("utf-8", "replace")
    return sum(shown.count(end) for end in "\x85\u2028\u2029")


@MANY
@given(st.binary(max_size=400))
def test_any_bytes(raw: bytes) -> None:
    assert parse(raw) is None


@MANY
@given(st.text(max_size=400))
def test_any_text(text: str) -> None:
    assert parse(text) is None


YAML_PIECES = st.sampled_from(
    [
        *(
            "a: ",
            "- ",
            "\n",
            "  ",
            "\t",
            "{",
            "}",
            "[",
            "]",
            ",",
            ":",
            "? ",
            "| ",
            "> ",
            "#",
            '"',
            "'",
        ),
        *(
            "&a ",
            "*a ",
            "!!str ",
            "!x ",
            "<<: ",
            "---\n",
            "...\n",
            "%YAML 1.1\n",
            "~",
            "@",
            "`",
            "\\",
        ),
        *("1", "x", "é", "\u2028", "\x85", "0x", ".inf", "1_0", "12:30", "2024-01-02", "yes"),
    ]
)


@MANY
@given(st.lists(YAML_PIECES, max_size=60).map("".join))
def test_any_heap_of_yaml(text: str) -> None:
    assert parse(text) is None


@MANY
@given(st.data())
def test_a_good_document_with_bytes_changed(data: st.DataObject) -> None:
    raw = bytearray(data.draw(st.sampled_from([GOOD.encode(), json.dumps(GOOD_VALUE).encode()])))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(raw) - 1))
        match data.draw(st.sampled_from(["replace", "delete", "insert", "repeat", "cut"])):
            case "replace":
                raw[at] = data.draw(st.integers(0, 255))
            case "delete":
                del raw[at : at + data.draw(st.integers(1, 30))]
            case "insert":
                raw[at:at] = data.draw(YAML_PIECES).encode()
            case "repeat":
                raw[at:at] = raw[at : at + 50] * data.draw(st.integers(1, 4))
            case _:
                del raw[max(at, 1) :]
        if not raw:
            break
    parse(bytes(raw))


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["1", "2", "m", "cpu", "strict", "sticky", "X-A", "100", 50, 0, -1, 700, 0.5])
)
NAMES = st.sampled_from(
    [
        *(
            "apiVersion",
            "kind",
            "metadata",
            "spec",
            "name",
            "labels",
            "live",
            "versions",
            "version",
        ),
        *("source", "sha256", "compatibility", "canary", "rules", "header", "user", "region"),
        *("percent", "equals", "in", "placement", "memoryMB", "predictor", "options", "warmup"),
        *("shapes", "rollback", "codes", "limits", "timeout_s"),
        *("__class__", "model_config", "[key]", "", "a.b", "a\nb", "\x1f", "é"),
    ]
)
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(NAMES | st.text(max_size=5), inner, max_size=5)
    ),
    max_leaves=20,
)


@MANY
@given(tree=TREES, as_json=st.booleans())
def test_any_tree(tree: Any, as_json: bool) -> None:
    assert parse(json.dumps(tree) if as_json else yaml.safe_dump(tree)) is None


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, below in items:
        found += _places(below, (*path, key))
    return found


PLACES = _places(GOOD_VALUE)[1:]


@MANY
@given(place=st.sampled_from(PLACES), tree=TREES, as_json=st.booleans())
def test_a_good_document_with_one_value_replaced(
    place: tuple[Any, ...], tree: Any, as_json: bool
) -> None:
    value = json.loads(json.dumps(GOOD_VALUE))
    parent = value
    for part in place[:-1]:
        parent = parent[part]
    parent[place[-1]] = tree
    parse(json.dumps(value, indent=1) if as_json else yaml.safe_dump(value))


@MANY
@given(place=st.sampled_from(PLACES), name=NAMES, value=st.none() | st.integers() | st.just({}))
def test_an_unknown_field_anywhere_is_named(place: tuple[Any, ...], name: str, value: Any) -> None:
    document = json.loads(json.dumps(GOOD_VALUE))
    parent = document
    for part in place:
        parent = parent[part]
    open_mappings = {("metadata", "labels"), ("spec", "placement", "labels"),
                     ("spec", "predictor", "options"), ("spec", "warmup", "shapes")}  # fmt: skip
    if not isinstance(parent, dict) or place in open_mappings:
        return
    parent["zz" + name] = value
    with pytest.raises(ConfigError) as caught:
        parse_model(json.dumps(document), name=ModelName("m"))
    (error,) = caught.value.errors
    assert "zz" in error.path
    assert error.message.startswith("unknown field") or name == "\x1f"


@MANY
@given(st.sampled_from(CASES), st.sampled_from(CASES))
def test_bad_documents_one_after_the_other_leave_nothing_behind(first: Any, second: Any) -> None:
    assert parse(first.raw) is None
    assert parse(second.raw) is None
    assert parse(GOOD) is not None


@MANY
@given(TREES)
def test_json_text_means_what_the_standard_decoder_says(tree: Any) -> None:
    text = json.dumps([tree], ensure_ascii=False)
    try:
        document = read(text)
    except ConfigError:
        return
    if not document.errors:
        ours = json.dumps(_lists(document.value), sort_keys=True)
        assert ours == json.dumps(json.loads(text), sort_keys=True)


def _lists(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_lists(one) for one in value]
    return {key: _lists(one) for key, one in value.items()} if isinstance(value, dict) else value
