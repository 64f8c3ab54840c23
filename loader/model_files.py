"""Which files of a folder are the model, and the one digest over them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from loader.errors import LoaderError
from registry.names import Digest

PROGRAM_SUFFIXES = (".json", ".pdmodel")
PARAMS_SUFFIX = ".pdiparams"


class NoSuchModel(LoaderError):
    """The folder holds no program, or more than one."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Plain file names. ``params`` is ``None`` when no params file is there."""

    program: str
    params: str | None

    @property
    def wanted_params(self) -> str:
        """The name that the params file has, or would have."""
        return self.params or PurePosixPath(self.program).stem + PARAMS_SUFFIX

    def names(self) -> tuple[str, ...]:
        """What is there, the program first: the order of the digest."""
        return (self.program,) if self.params is None else (self.program, self.params)


def choose(names: Iterable[str]) -> ModelFiles:
    """Find the one program and its params among the file names of a folder.

    With ``m.json`` and ``m.pdmodel`` both there, the ``.json`` is taken, as Paddle 3 does: both
    are exports of one net with the same params. Other ``.json`` files (a tokenizer's, say) do not
    count when exactly one program has params of its own name. Raises `NoSuchModel`.
    """
    present = {name for name in names if _is_plain(name)}
    stems: dict[str, str] = {}
    for suffix in reversed(PROGRAM_SUFFIXES):
        for name in present:
            if name.endswith(suffix):
                stems[name.removesuffix(suffix)] = name
    params = sorted(name for name in present if name.endswith(PARAMS_SUFFIX))
    if not stems:
        found = ", ".join(sorted(present)) or "nothing"
        raise NoSuchModel(f"no program (*.json or *.pdmodel) in the folder, only {found}")
    paired = [stem for stem in stems if stem + PARAMS_SUFFIX in present]
    if len(paired) == 1:
        return ModelFiles(stems[paired[0]], paired[0] + PARAMS_SUFFIX)
    if len(stems) > 1:
        raise NoSuchModel(
            f"more than one program in the folder: {', '.join(sorted(stems.values()))}"
        )
    (program,) = stems.values()
    if len(params) > 1:
        raise NoSuchModel(f"more than one params file in the folder: {', '.join(params)}")
    return ModelFiles(program, params[0] if params else None)


def choose_in(folder: Path) -> ModelFiles:
    """`choose` among the files of a folder on this machine. Raises `OSError` too."""
    return choose(path.name for path in folder.iterdir() if path.is_file())


def model_digest(files: ModelFiles, sha256: Mapping[str, str]) -> Digest:
    """The digest of program and params together, from the hex digest of each file.

    It is the sha256 of what ``sha256sum PROGRAM PARAMS`` prints, so that anyone can check it:
    ``sha256sum inference.json inference.pdiparams | sha256sum``.
    """
    lines = "".join(f"{sha256[name]}  {name}\n" for name in files.names())
    return Digest(f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}")


def digest_breach(found: Mapping[str, str], wanted: Mapping[str, str]) -> str | None:
    """How files differ from the digests of the document (hex, any case, ``sha256:`` allowed).

    found: the hex digest of every file of the model. Files that the document does not name are
    not looked at.
    """
    for name, digest in wanted.items():
        if name not in found:
            return f"{name!r} is not a file of the model, which has {', '.join(sorted(found))}"
        if found[name] != digest.lower().removeprefix("sha256:"):
            return f"{name} is sha256 {found[name]}, the document says {digest}"
    return None


def file_sha256(path: Path) -> str:
    """The hex digest of one file. Raises `OSError`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_plain(name: str) -> bool:
    """A name that is one path segment and that sha256sum prints as it is."""
    return (
        bool(name) and not name.startswith(".") and "/" not in name and "\\" not in name
        and name.isprintable()
    )  # fmt: skip
