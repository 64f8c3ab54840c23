"""Documents out of files: split as they stand, every error with its line in the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from paddlewheel.cli.documents import find_files, parse_file, parse_files, split


def document(name: str, live: str = '"1"') -> str:
    return (
        "apiVersion: paddlewheel/v1\nkind: Model\n"
        f"metadata: {{name: {name}}}\n"
        f'spec:\n  live: {live}\n  versions: [{{version: "1", source: /m/1}}]\n'
    )


SPLITS: dict[str, tuple[str, list[tuple[int, str]]]] = {
    "one, as it stands": ("# note\n---\na: 1\n", [(1, "# note\n---\na: 1\n")]),
    "two": ("a: 1\n---\nb: 2\n", [(1, "a: 1\n"), (3, "b: 2\n")]),
    "a first marker too": ("---\na: 1\n---\nb: 2\n", [(2, "a: 1\n"), (4, "b: 2\n")]),
    "comments stay with what follows": (
        "a: 1\n--- # next\n# about b\nb: 2\n",
        [(1, "a: 1\n"), (3, "# about b\nb: 2\n")],
    ),
    "a document on the marker's line": (
        "a: 1\n--- {b: 2}\n",
        [(1, "a: 1\n"), (2, "--- {b: 2}\n")],
    ),
    "empty ones are none": ("---\n# nothing\n---\na: 1\n---\n", [(4, "a: 1\n")]),
    "a marker in a block scalar is text": (
        "a: |\n  x\n  ---\n  y\n",
        [(1, "a: |\n  x\n  ---\n  y\n")],
    ),
    "JSON": ('{"a": "---"}\n', [(1, '{"a": "---"}\n')]),
    "what YAML cannot even read into words is one": (
        "a: 1\n---\nb: 'x\n",
        [(1, "a: 1\n---\nb: 'x\n")],
    ),
    "a broken one does not hide the next": ("a: [\n---\nb: 1\n", [(1, "a: [\n"), (3, "b: 1\n")]),
    "nothing": ("\n  \n", []),
}


@pytest.mark.parametrize("case", SPLITS)
def test_split(case: str) -> None:
    text, wanted = SPLITS[case]
    assert [(part.first_line, part.text) for part in split("f", text)] == wanted


def test_errors_carry_the_line_in_the_file_not_in_the_document() -> None:
    text = document("a") + "---\n" + document("b", live='"9"') + "  nope: 1\n"
    found = parse_file("m.yaml", text.encode())
    assert [each.model for each in found.documents] == ["a"]
    first, second = map(str, found.problems)
    assert first.startswith("m.yaml:12: spec.live: ")
    assert second.startswith("m.yaml:14: spec.nope: ")


def test_the_same_model_twice_names_both_places() -> None:
    found = parse_files([("a.yaml", document("x").encode()), ("b.yaml", document("x").encode())])
    assert len(found.documents) == 1
    assert [str(p) for p in found.problems] == ["b.yaml:1: metadata.name: 'x' is also in a.yaml:1"]


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", "f: no document in it"),
        (b"a: \xff\n", "f:1: not UTF-8: byte 0xff"),
        (PermissionError(13, "Permission denied"), "f: Permission denied"),
    ],
)
def test_a_file_that_holds_nothing_readable(content: bytes | OSError, wanted: str) -> None:
    assert [str(problem) for problem in parse_file("f", content).problems] == [wanted]


def test_a_folder_is_read_whole_without_hidden_files_and_others(tmp_path: Path) -> None:
    for name in ("b.yml", "a/c.json", "a.yaml", ".git/d.yaml", "..data/e.yaml", "golden.npz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "k.yaml").symlink_to(tmp_path / "..data/e.yaml")  # as a ConfigMap is mounted
    assert [str(f.relative_to(tmp_path)) for f in find_files(tmp_path)] == [
        "a/c.json",
        "a.yaml",
        "b.yml",
        "k.yaml",
    ]


def test_models_beside_their_documents_are_not_read_as_documents(tmp_path: Path) -> None:
    for name, content in {
        "m.json": '{"apiVersion": "paddlewheel/v1"}',
        "m.pdiparams": "",
        "m/1/inference.json": '{"base_code": {}, "program": {}}',
        "m/1/inference.yml": "Global: {model_name: m}",
        "m/1/inference.pdiparams": "",
        "m/1/notes.yml": "left as it is",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert [str(f.relative_to(tmp_path)) for f in find_files(tmp_path)] == [
        "m/1/notes.yml",
        "m.json",
    ]


def test_bytes_are_kept_as_they_are() -> None:
    text = document("a").replace("\n", "\r\n") + "# 版本 \u2028# end"
    (found,) = parse_file("f", text.encode()).documents
    assert found.source.text == text
