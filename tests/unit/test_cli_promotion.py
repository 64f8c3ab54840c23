"""Promoting a canary in the user's own text: order, comments and quoting survive."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from paddlewheel.promotion import NothingToPromote, promote_text

BLOCK = """\
# owned by vision
apiVersion: paddlewheel/v1
kind: Model
metadata: {name: ocr}   # keep me
spec:
  live: "20240521"      # since May
  versions:
    - version: "20240521"
      source: /m/1
    - {version: '20240610', source: /m/2}
  # a try-out of the bfloat16 weights
  canary:               # goes
    version: '20240610'
    rules:
      - header: {name: X-Canary, equals: "1"}
      # five percent of users
      - percent: 2
    # last word of the canary

  # how long the old one stays
  rollback: {bake_s: 60}
"""

BLOCK_PROMOTED = """\
# owned by vision
apiVersion: paddlewheel/v1
kind: Model
metadata: {name: ocr}   # keep me
spec:
  live: '20240610'      # since May
  versions:
    - version: "20240521"
      source: /m/1
    - {version: '20240610', source: /m/2}
  # a try-out of the bfloat16 weights

  # how long the old one stays
  rollback: {bake_s: 60}
"""


def test_the_users_layout_survives() -> None:
    promoted = promote_text(BLOCK)
    assert promoted.text == BLOCK_PROMOTED
    assert (promoted.version, promoted.was_live, promoted.redumped) == (
        "20240610",
        "20240521",
        False,
    )


CASES: dict[str, tuple[str, str]] = {
    "canary first": (
        'spec:\n  canary:\n    version: "2"\n    rules: [{percent: 1}]\n  live: "1"\n',
        'spec:\n  live: "2"\n',
    ),
    "canary last without a newline": (
        'spec:\n  live: "1"\n  canary:\n    version: "2"',
        'spec:\n  live: "2"\n',
    ),
    "canary in flow style": (
        'spec:\n  live: "1"\n  canary: {version: "2", rules: []}  # gone\n  a: b\n',
        'spec:\n  live: "2"\n  a: b\n',
    ),
    "all in flow style": (
        'spec: {live: "1", canary: {version: "2"}, a: b}\n',
        'spec: {live: "2", a: b}\n',
    ),
    "flow style, canary first": (
        'spec: {canary: {version: "2"}, live: "1"}\n',
        'spec: {live: "2"}\n',
    ),
    "JSON": (
        '{\n  "spec": {\n    "live": "1",\n    "canary": {"version": "2"}\n  }\n}\n',
        '{\n  "spec": {\n    "live": "2"\n  }\n}\n',
    ),
    "a sequence at the key's own indentation": (
        "spec:\n  live: v1\n  canary:\n    version: v2\n    rules:\n    - percent: 1\n  z: 1\n",
        "spec:\n  live: v2\n  z: 1\n",
    ),
    "a block scalar inside": (
        "spec:\n  live: v1\n  canary:\n    version: v2\n    note: |\n      a\n      b\n  z: 1\n",
        "spec:\n  live: v2\n  z: 1\n",
    ),
    "Windows line ends": (
        'spec:\r\n  live: "1"\r\n  canary:\r\n    version: "2"\r\n  a: b\r\n',
        'spec:\r\n  live: "2"\r\n  a: b\r\n',
    ),
    "text beyond ASCII before it": (
        'note: 版本😀\nspec:\n  live: "1"\n  canary: {version: "2"}\n',
        'note: 版本😀\nspec:\n  live: "2"\n',
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_edited_in_place(case: str) -> None:
    given_text, wanted = CASES[case]
    promoted = promote_text(given_text)
    assert promoted.text == wanted
    assert not promoted.redumped


ANCHORED: dict[str, tuple[str, object]] = {
    "the canary's version": (
        'spec:\n  live: "1"\n  canary:\n    version: &v "2"\n  other: *v\n',
        "2",
    ),
    "something else in the canary": (
        'spec:\n  live: "1"\n  canary:\n    rules: &r [1]\n    version: "2"\n  other: *r\n',
        [1],
    ),
    "the live version": (
        'spec:\n  live: &v "1"\n  canary: {version: "2"}\n  other: *v\n',
        "1",
    ),
}


@pytest.mark.parametrize("case", ANCHORED)
def test_anchored_elsewhere_is_dumped_anew_and_said(case: str) -> None:
    text, other = ANCHORED[case]
    promoted = promote_text(text)
    assert promoted.redumped
    assert yaml.safe_load(promoted.text) == {"spec": {"live": "2", "other": other}}


@pytest.mark.parametrize(
    "text", ["", "a: b", "spec: {live: '1'}", "spec: {canary: null}", "[1", "spec: {canary: {}}"]
)
def test_nothing_to_promote(text: str) -> None:
    with pytest.raises(NothingToPromote):
        promote_text(text)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    before=st.dictionaries(st.text(max_size=5), VALUES, max_size=3),
    rules=VALUES,
    after=st.dictionaries(st.text(max_size=5), VALUES, max_size=3),
    flow=st.sampled_from([None, True, False]),
    as_json=st.booleans(),
)
def test_any_document_means_what_was_wanted(
    before: dict[str, object],
    rules: object,
    after: dict[str, object],
    flow: bool | None,
    as_json: bool,
) -> None:
    taken = {"live", "canary"}
    head = {k: v for k, v in before.items() if k not in taken}
    tail = {k: v for k, v in after.items() if k not in taken | set(head)}
    spec = {**head, "live": "v1", "canary": {"rules": rules, "version": "v2"}, **tail}
    document = {"spec": spec, "z": 1}
    text = (
        json.dumps(document, indent=2, ensure_ascii=True)
        if as_json
        else yaml.safe_dump(document, sort_keys=False, default_flow_style=flow)
    )
    document = yaml.safe_load(text)
    spec = document["spec"]
    promoted = promote_text(text)
    wanted = {k: v for k, v in spec.items() if k != "canary"} | {"live": "v2"}
    assert yaml.safe_load(promoted.text) == {**document, "spec": wanted}
