"""Images in, texts out, as PP-OCR has it."""

from __future__ import annotations

import numpy as np
import orjson
import pytest

from paddlewheel.bench.load import Verify
from paddlewheel.bench.samples import Result, Sample
from paddlewheel.demo import models, ocr, traffic
from paddlewheel.demo.documents import document
from paddlewheel.demo.play import Edit, canary_problems
from registry.inference import Array
from registry.names import ModelName
from registry.spec import ConfigError, parse_model

ALPHABET = ("", "a", "b", " ")


def scores_for(classes: list[int]) -> Array:
    return np.eye(len(ALPHABET), dtype=np.float32)[classes][np.newaxis]


@pytest.mark.parametrize(
    ("classes", "text"),
    [
        ([0, 0, 0], ""),
        ([1, 1, 1], "a"),
        ([1, 0, 1], "aa"),
        ([0, 1, 1, 2, 0, 2, 0], "abb"),
        ([3, 1, 0, 3, 2], " a b"),
    ],
)
def test_repeats_are_merged_and_blanks_dropped(classes: list[int], text: str) -> None:
    assert ocr.decode_text(scores_for(classes), ALPHABET) == text


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 3, 5), (3, 4)])
def test_scores_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="want scores"):
        ocr.decode_text(np.zeros(shape, np.float32), ALPHABET)


def test_images_become_tensors_of_the_models_sizes() -> None:
    image = ocr.render("rollback")
    assert ocr.rec_input(image).shape == (1, 3, 48, 320)
    assert ocr.cls_input(image).shape == (1, 3, 48, 192)
    wide = ocr.rec_input(ocr.render("a line that is wider than most"))
    assert wide.shape[3] > 320
    for tensor in (ocr.rec_input(image), wide):
        assert tensor.dtype == np.float32
        assert tensor.flags.c_contiguous
        assert (tensor.min(), tensor.max()) == (-1.0, 1.0)


def test_padding_is_zero_and_on_the_right() -> None:
    tensor = ocr.rec_input(ocr.render("etcd"))
    assert not tensor[..., -20:].any()
    assert (tensor[..., 0] == 1.0).all()  # white


def test_turned_is_upside_down() -> None:
    upright, turned = ocr.render("etcd"), ocr.render("etcd", turned=True)
    assert np.array_equal(np.asarray(turned), np.asarray(upright)[::-1, ::-1])


@pytest.mark.parametrize(
    ("degrees", "scores", "wanted"),
    [
        ("0", [0.9, 0.1], None),
        ("180", [0.2, 0.8], None),
        ("0", [0.2, 0.8], "read 180 degrees, not 0"),
    ],
)
def test_the_judge_reads_the_answer(degrees: str, scores: list[float], wanted: str | None) -> None:
    judge: Verify = traffic.direction_judge(degrees=degrees)
    tensor = {"name": "s", "shape": [1, 2], "datatype": "FP32", "data": scores}
    assert judge(200, {}, orjson.dumps({"outputs": [tensor]})) == wanted
    assert (judge(503, {}, b"full") or "").startswith("status 503")


def test_a_wrong_text_is_a_failure() -> None:
    path = models.find_published().alphabet
    alphabet = ocr.read_alphabet(path)
    judge = traffic.text_judge(text="a", alphabet=str(path))
    for character, wanted in (("a", None), ("b", "read 'b', not 'a'")):
        scores = np.zeros((1, 2, len(alphabet)), np.float32)
        scores[0, 1, alphabet.index(character)] = 1
        head = orjson.dumps({"outputs": [{
            "name": "s", "shape": scores.shape, "datatype": "FP32",
            "parameters": {"binary_data_size": scores.nbytes}}]})  # fmt: skip
        headers = {"inference-header-content-length": str(len(head))}
        assert judge(200, headers, head + scores.tobytes()) == wanted


def test_the_documents_are_valid_and_the_broken_one_is_not() -> None:
    folders = {"1": models.find_published().recognition, "2": models.find_published().direction}
    name = ModelName(traffic.REC_MODEL)
    good = document(traffic.REC_MODEL, "1", folders, canary="2")
    assert parse_model(good, name=name).spec.live == "1"
    with pytest.raises(ConfigError, match="warmpu"):
        parse_model(good.replace("warmup:", "warmpu:"), name=name)


def rec(name: str, due_s: float, version: str) -> Sample:
    return Sample(name, due_s, 0.01, 200, version, "", None)


@pytest.mark.parametrize(
    ("samples", "is_well"),
    [
        ([rec("rec-canary", 2, "2"), rec("rec", 3, "1")], True),
        ([rec("rec-canary", 2, "1"), rec("rec", 3, "1")], False),
        ([rec("rec-canary", 2, "2"), rec("rec", 3, "2")], False),
        ([rec("rec", 3, "1")], False),
        # Outside of the canary's time both versions may answer.
        ([rec("rec-canary", 2, "2"), rec("rec", 3, "1"), rec("rec", 11, "2")], True),
    ],
)
def test_the_canary_is_checked_request_by_request(samples: list[Sample], is_well: bool) -> None:
    edits = [
        Edit("2 as canary", traffic.REC_MODEL, 0.5, 1.0, True),
        Edit("live 1 -> 2", traffic.REC_MODEL, 10.0, 10.5, True),
    ]
    assert (not canary_problems(Result(samples, 0.0, 20.0), edits)) is is_well
