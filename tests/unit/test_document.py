"""Text to a tree: lines, spellings, bounds."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest

from registry.document import read
from registry.document_tree import (
    MAX_BYTES,
    MAX_NODES,
    ConfigError,
    FieldError,
    show,
    show_path,
)

SCALARS: dict[str, Any] = {
    # YAML 1.2's core schema
    "~": None, "null": None, "": None, "true": True, "False": False, "0": 0, "-7": -7, "+3": 3,
    "0x1F": 31, "1.5": 1.5, "-.5": -0.5, "1e3": 1000.0, "1.0e-3": 0.001, "1.": 1.0,
    ".inf": math.inf, "-.INF": -math.inf, "1e999": math.inf,
    # text
    "abc": "abc", "v1": "v1", "1.4.0": "1.4.0", "1.4.0-canary.2": "1.4.0-canary.2", "y": "y",
    "2024-05": "2024-05", "12:ab": "12:ab", "file:///a": "file:///a", "1-2": "1-2", "-": "-",
    '"yes"': "yes", "'1_000'": "1_000", '"2024-05-21"': "2024-05-21", "!!str 1": "1", "! 2": "2",
    "+": "+", ".": ".", "é": "é", "😀": "😀", "64Mi": "64Mi", "5%": "5%", "a_b": "a_b",
}  # fmt: skip


@pytest.mark.parametrize("raw", [raw for raw in SCALARS if raw != "-"])
def test_plain_scalars(raw: str) -> None:
    document = read(f"a: {raw}\nb: 1\n")
    assert document.errors == ()
    assert document.value["a"] == SCALARS[raw]
    assert type(document.value["a"]) is type(SCALARS[raw])


AMBIGUOUS = {
    "yes": '"yes"', "No": '"No"', "ON": '"ON"', "off": '"off"',
    "1_000": "1000", "1_0.5": "10.5", "1:30": '"1:30"', "190:20:30": '"190:20:30"',
    "007": '"007"', "0o17": '"0o17"', "0b11": '"0b11"', "-012": '"-012"',
    "2024-05-21": '"2024-05-21"', "2024-5-1": '"2024-5-1"',
    "2024-05-21T10:00:00Z": '"2024-05-21T10:00:00Z"', "2024-05-21 10:00:00": '"2024-05-21 10:',
    "=": '"="',
}  # fmt: skip


@pytest.mark.parametrize("raw", AMBIGUOUS)
def test_what_readers_of_yaml_disagree_about_is_refused_with_the_way_to_write_it(raw: str) -> None:
    (error,) = read(f"x: 1\na: {raw}\n").errors
    assert (error.path, error.line) == ("a", 2)
    assert AMBIGUOUS[raw] in error.message


def test_field_names_are_text_however_they_look() -> None:
    value = read("on: 1\n2: 3\n1.10: 4\n2024-05-21: 5\nno: 6\n~: 7\n").value
    assert list(value) == ["on", "2", "1.10", "2024-05-21", "no", "~"]


TREE = """\
a:
  b:          # 2

    - c: 1    # 4
      d: x    # 5
    -
      - 7     # 7
e: |
  long
  text
f: {g: {h: 1,
        i: 2}}
j: &j {k: 1}
l: *j
"""
LINES = {
    (): 1, ("a",): 1, ("a", "b"): 2, ("a", "b", 0): 4, ("a", "b", 0, "c"): 4,
    ("a", "b", 0, "d"): 5, ("a", "b", 1, 0): 7, ("e",): 8, ("f", "g", "h"): 11,
    ("f", "g", "i"): 12, ("l",): 14, ("l", "k"): 13,
    ("a", "b", 0, "missing"): 4, ("a", "missing", "deeper"): 1, ("a", "b", 9): 2,
    ("a", "b", "c"): 2,
}  # fmt: skip


@pytest.mark.parametrize("path", LINES, ids=show_path)
def test_every_value_knows_its_line(path: tuple[str | int, ...]) -> None:
    assert read(TREE).line(path) == LINES[path]


@pytest.mark.parametrize("newline", ["\r\n", "\r"])
def test_other_line_ends_count_the_same(newline: str) -> None:
    document = read(TREE.replace("\n", newline))
    assert {path: document.line(path) for path in LINES} == LINES


def test_a_shown_path_leads_back_to_its_line() -> None:
    document = read(TREE)
    for path, line in LINES.items():
        if path and document.node(path) is not None:
            assert document.line_of(show_path(path)) == line
    assert document.line_of("") is None
    assert document.line_of("nowhere") is None


def test_aliases_are_followed() -> None:
    assert read("a: &x [1, {b: 2}]\nc: *x\n").value == {"a": (1, {"b": 2}), "c": (1, {"b": 2})}


JSON = """{
\t"a": [1, 2.5, -3e2, true, null,
\t\t"x\\ud83d\\ude00\\n"],

\t"b": {"c": {}}
}
"""


def test_json_is_read_as_json() -> None:
    document = read(JSON)
    assert document.errors == ()
    assert document.value == {"a": (1, 2.5, -300.0, True, None, "x😀\n"), "b": {"c": {}}}
    assert [document.line(path) for path in [("a", 0), ("a", 5), ("b",), ("b", "c")]] == [
        2,
        3,
        5,
        5,
    ]


@pytest.mark.parametrize(
    "text", ["{a: 1, b: [x]}", "{a: 1, 'b': ['x']}", '{"a": 1, b: [x]}', "{a: 1, b: [x], }"]
)
def test_yaml_in_braces_is_yaml(text: str) -> None:
    assert read(text).value == {"a": 1, "b": ("x",)}


def test_a_byte_order_mark_is_no_part_of_the_document() -> None:
    assert read(b"\xef\xbb\xbfa: 1\n").value == {"a": 1}
    assert read(b'\xef\xbb\xbf{"a": 1}').value == {"a": 1}


def test_a_single_document_may_have_its_markers() -> None:
    assert read("%YAML 1.2\n---\na: 1\n...\n").value == {"a": 1}


def test_repeated_keys_keep_the_first_and_are_all_reported() -> None:
    document = read("a: 1\nb: {c: 1, c: 2}\na: 2\na: 3\n")
    assert document.value == {"a": 1, "b": {"c": 1}}
    assert [(error.path, error.line) for error in document.errors] == [
        ("b.c", 2), ("a", 3), ("a", 4),
    ]  # fmt: skip


def test_an_alias_counts_as_all_that_it_stands_for() -> None:
    wide = "a: &a [" + "x, " * 500 + "]\n"
    assert len(read(wide + "b: [" + "*a, " * 30 + "]\n").value["b"]) == 30
    with pytest.raises(ConfigError, match="too large"):
        read(wide + "b: [" + "*a, " * 60 + "]\n")


def test_an_alias_is_as_deep_as_what_it_stands_for() -> None:
    def nested(levels: int) -> str:
        return "a0: &a0 [x]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}]\n" for n in range(levels))

    assert read(nested(28)).value["a28"]
    with pytest.raises(ConfigError, match="nested too deeply"):
        read(nested(40))


BOUNDED = {
    "aliases of aliases": "a0: &a0 [x, x]\n"
    + "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]\n" for n in range(30)),
    "aliases one inside the other": "a0: &a0 [x]\n"
    + "".join(f"a{n + 1}: &a{n + 1} [*a{n}]\n" for n in range(5000)),
    "flow nesting": "[" * (MAX_BYTES - 1),
    "flow mappings": "{a: " * (MAX_BYTES // 5),
    "block nesting": "- " * (MAX_BYTES // 2 - 1),
    "question marks": "? " * (MAX_BYTES // 2 - 1),
    "JSON nesting": '{"a":' * (MAX_BYTES // 6),
    "many values": "[" + "1," * (MAX_BYTES // 2 - 2) + "]",
    "many JSON values": "[" + "1," * (MAX_BYTES // 2 - 2) + "1]",
    "many keys": "".join(f"k{n}: 1\n" for n in range(60_000)),
    "one long number": "a: " + "9" * (MAX_BYTES - 20) + "\nb: [",
    "one long JSON number": '{"a": ' + "9" * (MAX_BYTES - 10),
    "one long date": "a: 2024-01-01 " + " 1" * 400_000 + "x\nb: [",
    "many colons": "a: " + "1:" * (MAX_BYTES // 2 - 9) + "x\nb: [",
    "anchors": "".join(f"- &a{n} x\n" for n in range(60_000)),
    "unclosed text": 'a: "' + "x\n " * (MAX_BYTES // 3 - 3),
    "tags": "!" * (MAX_BYTES - 9) + " a: [",
    "tabs": "\t" * (MAX_BYTES - 1) + "a",
}  # fmt: skip


@pytest.mark.parametrize("name", BOUNDED)
def test_hostile_text_is_refused_soon(name: str) -> None:
    text = BOUNDED[name]
    started = time.process_time()
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert len(str(caught.value)) < 400
    assert time.process_time() - started < 3.0


def test_one_large_value_is_fine() -> None:
    text = "a: " + "x" * (MAX_BYTES - 3)
    assert len(read(text).value["a"]) == MAX_BYTES - 3
    with pytest.raises(ConfigError, match="want at most 1048576 bytes"):
        read(text + "x")
    with pytest.raises(ConfigError, match="got 1048577"):
        read("é" * (MAX_BYTES // 2) + "x")


def test_as_many_values_as_allowed() -> None:
    items = ", ".join(["1"] * (MAX_NODES - 1))
    assert len(read(f"[{items}]").value) == MAX_NODES - 1
    with pytest.raises(ConfigError, match="more than 20000 values"):
        read(f"[{items}, 1]")


SHOWN = {
    ("spec", "canary", "rules", 0, "percent"): "spec.canary.rules[0].percent",
    ("spec", "sha256", "a.pdiparams"): 'spec.sha256["a.pdiparams"]',
    ("a-b",): '["a-b"]',
    (0, 1): "[0][1]",
    (): "",
    ("x" * 100,): '["' + "x" * 57 + '..."]',
    ("\ud800",): '["\\ud800"]',
}  # fmt: skip


@pytest.mark.parametrize(("path", "wanted"), SHOWN.items())
def test_paths_are_shown_as_a_reader_writes_them(path: Any, wanted: str) -> None:
    assert show_path(path) == wanted


def test_an_error_is_one_line_and_tells_how_many_follow() -> None:
    first = FieldError("spec.live", 5, "want text, got 1")
    error = ConfigError((first, FieldError("", None, "and so on")))
    assert str(error) == "spec.live (line 5): want text, got 1; and 1 more"
    assert str(ConfigError((FieldError("", None, "no"),))) == "document: no"
    assert show(read("a: " + "x" * 99).node(("a",))) == repr("x" * 57 + "...")
