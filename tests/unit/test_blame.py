"""Blame, one line a case: what is on record, and who is at fault."""

from __future__ import annotations

import pytest

from loader.blame import Blame, Incident, judge
from loader.faults import from_code
from registry.names import Version

LIVE, STANDBY = Version("2"), Version("1")


def record(text: str) -> list[Incident]:
    """``2:700:a@0 1:700:a@0``: version, code, input, answers so far; one each 10 ms."""
    incidents: list[Incident] = []
    for n, word in enumerate(text.split()):
        left, _, answered = word.partition("@")
        version, digest, code = left.split(":", 2)
        device = "gpu:1" if code.endswith("!") else "gpu:0"
        fault = from_code(code.rstrip("!"))
        incidents.append(
            Incident(n * 0.01, Version(version), fault.code, fault.fault_class, digest, device,
                     int(answered or 0))
        )  # fmt: skip
    return incidents


CASES: dict[str, tuple[str, int | None, Blame]] = {
    "the standby answers what live fails": ("2:a:700@0 2:b:700@1 2:c:700@2", 3, Blame.VERSION),
    "memory counts like any other": ("2:a:-101@0 2:b:-101@1 2:c:-101@2", 3, Blame.VERSION),
    "the same input every time, answered by the standby": (
        "2:a:700@0 2:a:700@1 2:a:700@2", 3, Blame.VERSION),
    "a lone crash of the standby changes nothing": (
        "1:z:SIGKILL@0 2:a:700@9 2:b:700@10 2:c:700@11", 12, Blame.VERSION),
    "same code on both, nothing answered": (
        "2:a:700@5 1:a:700@5 2:b:700@5 1:b:700@5 2:c:700@5 1:c:700@5", 5, Blame.DEVICE),
    "the same, though nobody counts answers": (
        "2:a:700 1:a:700 2:b:700 1:b:700 2:c:700 1:c:700", None, Blame.DEVICE),
    "the same, with one input only": (
        "2:a:700 1:a:700 2:a:700 1:a:700 2:a:700 1:a:700", 0, Blame.DEVICE),
    "old noise does not hide a device that broke now": (
        "2:x:SIGKILL@0 2:a:700@900 1:a:700@900 2:b:700@900 1:b:700@900 2:c:700@900 1:c:700@900",
        901, Blame.DEVICE),
    "inputs not known, same code close together": (
        "2::HANG@5 1::HANG@5 2::HANG@5 1::HANG@5 2::HANG@5 1::HANG@5", 5, Blame.DEVICE),
    "hardware says so itself": ("2:a:46@0", 100, Blame.DEVICE),
    "a killer, while others are answered": ("2:a:700@0 1:a:700@2", 9, Blame.INPUT),
    "a killer seen for the first time": ("2:a:SIGSEGV@7 1:a:SIGSEGV@7", 7, Blame.INPUT),
    "two killers, sent again and again": (
        "2:a:SIGFPE@0 2:b:SIGFPE@0 1:a:SIGFPE@0 1:b:SIGFPE@0 2:a:SIGFPE@0 1:a:SIGFPE@0",
        0, Blame.INPUT),
    "of two that crash, one is not proven yet": (
        "2:a:SIGFPE@0 2:b:SIGFPE@0 1:a:SIGFPE@0", 0, Blame.UNDECIDED),
    "whatever comes crashes both": (
        "2:a:SIGFPE@0 1:a:SIGFPE@0 2:b:SIGFPE@0 1:b:SIGFPE@0 2:c:SIGFPE@0 1:c:SIGFPE@0",
        0, Blame.DEVICE),
    "a code seen for the first time may be the device": (
        "2:a:700@7 1:a:700@7", 7, Blame.UNDECIDED),
    "both short of memory: not the device, not the version": (
        "2:a:-101@0 1:a:-101@0 2:b:-101@0 1:b:-101@0 2:c:-101@0 1:c:-101@0", 0, Blame.UNDECIDED),
    "both fail, each in its own way": (
        "2:a:700@0 1:a:-204@0 2:b:700@0 1:b:-204@0 2:c:700@0 1:c:-204@0", 0, Blame.UNDECIDED),
    "nothing was run on the standby yet": ("2:a:700@4 2:b:700@4 2:c:700@4", 4, Blame.UNDECIDED),
    "the standby runs on another device": (
        "2:a:700@0 1:a:700!@1 2:b:700@2 1:b:700!@3 2:c:700@4 1:c:700!@5", 9, Blame.VERSION),
    "only the client's errors": ("2:a:InvalidArgument@0 2:b:InvalidArgument@0", 9, Blame.UNDECIDED),
    "nothing": ("", 9, Blame.UNDECIDED),
}  # fmt: skip


@pytest.mark.parametrize(("text", "answered", "wanted"), CASES.values(), ids=CASES)
def test_judge(text: str, answered: int | None, wanted: Blame) -> None:
    verdict = judge(record(text), live=LIVE, standby=STANDBY, answered=answered)
    assert verdict.blame is wanted, verdict
    assert verdict.reason


ALONE: dict[str, tuple[str, int, Blame]] = {
    "one input twice, others well": ("2:a:SIGSEGV@0 2:a:SIGSEGV@90", 180, Blame.INPUT),
    "one input twice, nothing else ran": ("2:a:SIGSEGV@0 2:a:SIGSEGV@0", 0, Blame.UNDECIDED),
    "different inputs": ("2:a:700@0 2:b:700@50 2:c:700@90", 180, Blame.UNDECIDED),
    "one input twice, and another": (
        "2:a:700@0 2:b:700@9 2:a:700@90", 180, Blame.UNDECIDED),
}  # fmt: skip


@pytest.mark.parametrize(("text", "answered", "wanted"), ALONE.values(), ids=ALONE)
def test_judge_without_a_standby(text: str, answered: int, wanted: Blame) -> None:
    assert judge(record(text), live=LIVE, standby=None, answered=answered).blame is wanted


def test_a_verdict_names_what_it_blames() -> None:
    version = judge(record("2:a:700@0 2:b:700@1 2:c:719@2"), live=LIVE, standby=STANDBY, answered=3)
    assert (version.version, version.code) == (LIVE, "700")
    poison = judge(record("2:a:HANG@0 1:a:HANG@2"), live=LIVE, standby=STANDBY, answered=9)
    assert (poison.inputs, poison.version) == ({"a"}, None)
    device = judge(
        record("2:a:719 1:a:719 2:b:719 1:b:719 2:c:719 1:c:719"), live=LIVE, standby=STANDBY
    )
    assert (device.device, device.code, device.inputs) == ("gpu:0", "719", {"a", "b", "c"})
