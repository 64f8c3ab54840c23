"""docs/faults.md shows the code's tables; ``python -m tests.unit.test_faults_doc`` writes them."""

from __future__ import annotations

from pathlib import Path

from loader.fault_tables import (
    CUDA,
    CUDA_NAMES,
    HANDLING,
    LIBRARY,
    OWN,
    PADDLE,
    STATUS,
    XID,
    FaultClass,
)

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"

MEANING = {
    FaultClass.REQUEST: "the client's fault: answered 400",
    FaultClass.MEMORY: "full now",
    FaultClass.STICKY: "the worker's device context is poisoned",
    FaultClass.UNSUPPORTED: "this version cannot run on this device",
    FaultClass.CRASH: "the worker is gone, or was ended because it hung",
    FaultClass.HARDWARE: "the device is bad: it is cordoned",
    FaultClass.GUARD: "the outputs or the latency broke an objective",
    FaultClass.UNKNOWN: "no rule knows the error",
}
COUNTED = {
    "always": "always",
    "never": "never",
    "by default": "unless `rollback.codes` leaves it out",
    "proven": "once another version answered the same request, or when `rollback.codes` names it",
}


def table(*rows: tuple[str, ...]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def yes(value: bool) -> str:
    return "yes" if value else "no"


def numbers(held: frozenset[int]) -> str:
    names = {number: name for name, number in CUDA_NAMES.items()}
    return ", ".join(f"{n} ({names[n]})" if n in names else str(n) for n in sorted(held))


def spans(held: tuple[range, ...]) -> str:
    return ", ".join(str(r.start) if len(r) == 1 else f"{r.start} to {r.stop - 1}" for r in held)


def render() -> str:
    classes = table(
        ("class", "means", "counted", "worker replaced", "run again elsewhere"),
        *[
            (f"`{c}`", MEANING[c], COUNTED[h.counted], yes(h.replaces_worker), yes(h.rerun))
            for c, h in HANDLING.items()
        ],
    )
    own = table(("code", "class"), *[(f"`{code}`", f"`{c}`") for code, c in OWN.items()])
    paddle = table(
        ("Paddle says", "code", "class"),
        *[(f"`{name}`", f"`{code}`", f"`{c}`") for name, (code, c) in PADDLE.items()],
    )
    cuda = table(
        ("class", "CUDA numbers"), *[(f"`{c}`", numbers(held)) for c, held in CUDA.items()]
    )
    status = table(
        ("class", "a status with"),
        *[(f"`{c}`", ", ".join(f"`{part}`" for part in parts)) for c, parts in STATUS.items()],
    )
    library = table(
        ("library", "class", "numbers"),
        *[
            (name, f"`{c}`", spans(held))
            for name, classes in LIBRARY.items()
            for c, held in classes.items()
        ],
    )
    xid = table(("code", "means"), *[(f"`XID:{n}`", text) for n, text in XID.items()])
    return f"""## Classes

{classes}

## Our own codes

{own}

## Paddle's classes of error

{paddle}

An error that says `The kernel ... is not registered` is `-204` whatever its class, and one that
says `Out of memory error on GPU 0` is `-102`.

## CUDA

{cuda}

Any other number is `unknown`.

## Other GPU libraries

The name of the status decides where the text has one:

{status}

else the number, as `CUDNN:8`:

{library}

## XIDs of the driver

{xid}

These are `hardware`. Other XIDs are a program's doing and reach its process as a CUDA error.
"""


def page(old: str) -> str:
    before, _, rest = old.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{render()}\n{END}{after}"


def test_the_page_shows_the_tables_of_the_code() -> None:
    old = PAGE.read_text()
    assert BEGIN in old
    assert END in old
    assert page(old) == old, "run python -m tests.unit.test_faults_doc"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
