"""Pipeline documents: what is good, and every error of a bad one at its place."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from registry.document_tree import ConfigError
from registry.names import ModelName
from registry.pipeline_spec import DATATYPES, PipelineDocument, parse_pipeline
from registry.schema import pipeline_schema
from registry.schema_reference import pipeline_reference
from router.pipeline.plan import plan_of
from router.tensors import DTYPE_OF
from tests.unit.test_spec_bad_documents import JARGON

ROOT = Path(__file__).parent.parent.parent
GOOD = """\
apiVersion: paddlewheel/v1
kind: Pipeline
metadata: {name: p}
spec:
  inputs:
    - {name: image}
    - {name: size, datatype: INT64, shape: [-1]}
  outputs:
    - {name: texts, from: read.texts}
    - {name: far, from: far.0, datatype: FP32, shape: [-1, 4]}
  steps:
    - {name: read, transform: read, inputs: {x: rec.0}}
    - {name: prepare, transform: prepare, inputs: {image: request.image}}
    - {name: rec, model: rec, label: stable, inputs: {x: prepare.x}, timeout_s: 2}
    - name: far
      model: sizes
      version: "1.0"
      endpoint: https://gateway.example:8600/
      inputs: {size: request.size, x: rec.softmax_0.tmp_0}
  limits: {timeout_s: 5, max_body_mb: 8}
"""
NAME = ModelName("p")


def parse(text: str = GOOD) -> PipelineDocument:
    return parse_pipeline(text, name=NAME)


def test_a_good_one() -> None:
    spec = parse().spec
    assert [step.name for step in spec.steps] == ["read", "prepare", "rec", "far"]
    far = spec.steps[3]
    assert far.endpoint == "https://gateway.example:8600"
    assert far.references()["x"] == ("rec", "softmax_0.tmp_0"), "a tensor's name may hold dots"
    assert spec.outputs[1].reference == ("far", "0")
    assert spec.limits.timeout_s == 5


def test_what_is_ready_waits_for_what_it_takes() -> None:
    plan = plan_of(parse(), 7)  # type: ignore[arg-type]
    assert [step.name for step in plan.ready(set(), set())] == ["prepare"]
    assert [s.name for s in plan.ready({"prepare"}, {"prepare"})] == ["rec"]
    beside = plan.ready({"prepare", "rec"}, {"prepare", "rec"})
    assert {step.name for step in beside} == {"read", "far"}
    assert plan.models == {"rec"}, "a model elsewhere need not be here"
    assert plan.transforms == {"read", "prepare"}


READ = "    - {name: read, transform: read, inputs: {x: rec.0}}\n"
BAD: dict[str, tuple[str, str, str, int, str]] = {
    "kind": ("kind: Pipeline", "kind: Model", "kind", 2, "want Pipeline"),
    "name of the key": ("{name: p}", "{name: q}", "metadata.name", 3, "want 'p'"),
    "unknown field": ("timeout_s: 2", "timeout: 2", "spec.steps[2].timeout", 14, "timeout_s?"),
    "both kinds of step": (
        "transform: prepare,", "transform: prepare, model: m,", "spec.steps[1]", 13, "model and",
    ),
    "no kind of step": ("transform: prepare, ", "", "spec.steps[1]", 13, "got neither"),
    "version and label": (
        "label: stable", "label: stable, version: '1'", "spec.steps[2].label", 14, "got both",
    ),
    "label elsewhere": (
        'version: "1.0"', "label: canary", "spec.steps[3].label", 17, "this fleet",
    ),
    "version of a transform": (
        "transform: read,", "transform: read, version: '1',", "spec.steps[0].version", 12, "models",
    ),
    "unknown step": ("x: prepare.x", "x: prepair.x", "spec.steps[2].inputs.x", 14, "none of"),
    "unknown input": (
        "image: request.image", "image: request.img", "spec.steps[1].inputs.image", 13, "none of",
    ),
    "no reference": ("x: prepare.x", "x: prepare", "spec.steps[2].inputs.x", 14, "<step>.<output>"),
    "unknown step in outputs": ("read.texts", "red.x", "spec.outputs[0].from", 9, "red"),
    "output from the request": (
        "from: read.texts", "from: request.image", "spec.outputs[0].from", 9, "of a step",
    ),
    "itself": (
        "x: prepare.x", "x: rec.0", "spec.steps[2].inputs.x", 14, "each other: rec <- rec",
    ),
    "circle": (
        "image: request.image", "image: read.texts", "spec.steps[1].inputs.image", 13,
        "each other: read <- rec <- prepare <- read",
    ),
    "nothing taken": ("{x: prepare.x}", "{}", "spec.steps[2].inputs", 14, "nothing"),
    "step named request": ("name: prepare,", "name: request,", "spec.steps[1].name", 13, "stands"),
    "same name twice": ("name: read,", "name: rec,", "spec.steps[2].name", 14, "taken already"),
    "unused input": ("  outputs:", "    - {name: z}\n  outputs:", "spec.inputs[2].name", 8, "no"),
    "unused step": (
        READ, READ + READ.replace("name: read", "name: unused"), "spec.steps[1].name", 13, "uses",
    ),
    "untyped input for elsewhere": (
        ", datatype: INT64, shape: [-1]", "", "spec.inputs[1]", 7, "is missing",
    ),
    "untyped output from elsewhere": (", datatype: FP32", "", "spec.outputs[1]", 10, "datatype"),
    "endpoint with a password": (
        "https://gateway", "https://me:pw@gateway", "spec.steps[3].endpoint", 18, "want a URL",
    ),
    "endpoint of another kind": ("https://", "ftp://", "spec.steps[3].endpoint", 18, "want a URL"),
    "endpoint's port": (":8600", ":99999", "spec.steps[3].endpoint", 18, "want a URL"),
    "step's name with a dot": ("name: far\n", "name: f.r\n", "spec.steps[3].name", 15, "letters"),
    "datatype": ("INT64", "int64", "spec.inputs[1].datatype", 7, "one of BOOL"),
    "shape": ("[-1]", "[-2]", "spec.inputs[1].shape[0]", 7, "a size"),
    "no time": ("timeout_s: 5", "timeout_s: 0", "spec.limits.timeout_s", 20, "more than 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refused_where_it_is_wrong(case: str) -> None:
    old, new, path, line, message = BAD[case]
    assert GOOD.count(old) >= 1
    with pytest.raises(ConfigError) as caught:
        parse(GOOD.replace(old, new, 1))
    errors = caught.value.errors
    meant = [error for error in errors if error.path == path and message in error.message]
    assert meant, [str(error) for error in errors]
    assert meant[0].line == line
    for error in errors:
        assert not JARGON.search(error.message), error.message


def test_all_at_once() -> None:
    text = GOOD.replace("kind: Pipeline", "kind: Pipe").replace("x: rec.0", "x: wreck.0")
    text = text.replace("timeout_s: 5", "timeout_s: soon")
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert {error.path for error in caught.value.errors} >= {
        "kind", "spec.steps[0].inputs.x", "spec.limits.timeout_s",
    }  # fmt: skip


def test_datatypes_are_the_protocols() -> None:
    assert set(DATATYPES) == set(DTYPE_OF)


def test_the_schema_takes_what_parses() -> None:
    schema = pipeline_schema()
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    example = (ROOT / "examples/ocr_pipeline/ocr_pipeline/pipeline.yaml").read_text()
    for text in (GOOD, example):
        assert not list(validator.iter_errors(yaml.safe_load(text)))
    assert list(validator.iter_errors(yaml.safe_load(GOOD.replace("timeout_s: 2", "timeout: 2"))))


def test_the_example_is_good() -> None:
    parse_pipeline(
        (ROOT / "examples/ocr_pipeline/ocr_pipeline/pipeline.yaml").read_bytes(), name=None
    )


def test_the_reference_is_the_schemas() -> None:
    page = (ROOT / "docs" / "pipelines.md").read_text()
    assert pipeline_reference() in page, "print it: python -m registry.schema_reference pipeline"


WORDS = st.sampled_from(
    ["request", "a", "b", "c", "request.x", "a.0", "b.0", "c.y", "a", ".", "x", "", "1", "null"]
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"name": WORDS, "inputs": st.dictionaries(WORDS, WORDS, max_size=3)},
            optional={"model": WORDS, "transform": WORDS, "endpoint": WORDS, "label": WORDS},
        ),
        max_size=5,
    ),
    st.lists(st.fixed_dictionaries({"name": WORDS, "from": WORDS}), max_size=2),
)
def test_whatever_is_written_is_parsed_or_refused(steps: object, outputs: object) -> None:
    spec = {"inputs": [{"name": "x"}], "outputs": outputs, "steps": steps}
    head = {"apiVersion": "paddlewheel/v1", "kind": "Pipeline", "metadata": {"name": "p"}}
    try:
        document = parse(yaml.safe_dump({**head, "spec": spec}))
    except ConfigError:
        return
    plan = plan_of(document, 1)  # type: ignore[arg-type]
    done: set[str] = set()
    while ready := plan.ready(done, done):
        done |= {step.name for step in ready}
    assert done == set(plan.steps), "what is accepted comes to an end"
