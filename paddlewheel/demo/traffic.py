"""The demo's requests: text images as tensors, and a judge that reads the answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from paddlewheel.bench.checks import infer_body, read_outputs
from paddlewheel.bench.load import Headers, Verify, http_request
from paddlewheel.bench.load_process import PlannedRequest
from paddlewheel.demo import ocr

REC_MODEL = "ocr-rec"
CLS_MODEL = "ocr-cls"
CANARY_HEADER = ("X-Canary", "1")

TEXTS = (
    "Paddlewheel",
    "12:30:45",
    "0123456789",
    "PADDLE 3.3",
    "bfloat16",
    "rollback",
)
"""Chosen to be read with a wide margin by both versions, so that a wrong text means wrong numbers
and not a coin's fall between two characters."""


@dataclass(frozen=True, slots=True)
class Shares:
    """How many requests of each kind in one round of the traffic."""

    rec: int = 1
    cls: int = 1


def planned_requests(alphabet: Path, shares: Shares = Shares()) -> tuple[PlannedRequest, ...]:
    """One round: every text to both models, to the direction model upside down too.

    A third of the texts to the recognition model carries the canary's header. Recognition is
    binary (its answer has 265,000 scores), direction a mix of JSON and binary.
    """
    return (*_recognition(alphabet, shares.rec), *_direction(shares.cls))


def _recognition(alphabet: Path, weight: int) -> Iterable[PlannedRequest]:
    for number, text in enumerate(TEXTS):
        with_header = number % 3 == 0
        headers, body = infer_body({"x": ocr.rec_input(ocr.render(text))}, binary=True)
        if with_header:
            headers |= dict([CANARY_HEADER])
        yield PlannedRequest(
            name="rec-canary" if with_header else "rec",
            data=http_request("POST", f"/v2/models/{REC_MODEL}/infer", body, headers=headers),
            weight=weight,
            judge="paddlewheel.demo.traffic:text_judge",
            judge_args={"text": text, "alphabet": str(alphabet)},
        )


def _direction(weight: int) -> Iterable[PlannedRequest]:
    for number, text in enumerate(TEXTS):
        turned = number % 2 == 1
        headers, body = infer_body(
            {"x": ocr.cls_input(ocr.render(text, turned=turned))}, binary=number % 3 != 0
        )
        yield PlannedRequest(
            name="cls",
            data=http_request("POST", f"/v2/models/{CLS_MODEL}/infer", body, headers=headers),
            weight=weight,
            judge="paddlewheel.demo.traffic:direction_judge",
            judge_args={"degrees": "180" if turned else "0"},
        )


WRONG = "read "
"""How a judge's complaint begins when an answer came but says something else."""


def text_judge(*, text: str, alphabet: str) -> Verify:
    """Wants the recognition model's answer to say ``text``; spaces at its ends do not count."""
    characters = ocr.read_alphabet(Path(alphabet))

    def verify(status: int, headers: Headers, body: bytes) -> str | None:
        if status != 200:
            return f"status {status}: {body[:200].decode('utf-8', 'replace')}"
        (scores,) = read_outputs(headers, body).values()
        read = ocr.decode_text(scores, characters).strip()
        return None if read == text else f"{WRONG}{read!r}, not {text!r}"

    return verify


def direction_judge(*, degrees: str) -> Verify:
    """Wants the direction model's answer to be ``degrees``: ``"0"`` or ``"180"``."""

    def verify(status: int, headers: Headers, body: bytes) -> str | None:
        if status != 200:
            return f"status {status}: {body[:200].decode('utf-8', 'replace')}"
        (scores,) = read_outputs(headers, body).values()
        read = ocr.decode_direction(scores)
        return None if read == degrees else f"{WRONG}{read} degrees, not {degrees}"

    return verify
