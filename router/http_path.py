"""A request target taken apart: path segments and the query (pure)."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import parse_qsl, unquote


class Target(NamedTuple):
    """``/v2/models/ocr%20rec/infer?x=1`` as ``("v2", "models", "ocr rec", "infer")``, ``"x=1"``."""

    segments: tuple[str, ...]
    """Percent-decoded one by one: an encoded slash stays inside its segment."""
    query: str

    def parameters(self) -> list[tuple[str, str]]:
        """Return the query's names and values in order, blank values kept."""
        return parse_qsl(self.query, keep_blank_values=True)


def parse_target(raw: str) -> Target:
    """Take a request target apart; the absolute form, as proxies send it, too.

    A slash at the end does not matter: an answer would otherwise have to be a redirection.
    """
    if raw.startswith(("http://", "https://")):
        raw = "/" + raw.split("://", 1)[1].partition("/")[2]
    path, _, query = raw.partition("?")
    if "%" in path:
        segments = tuple(unquote(part) for part in path.strip("/").split("/"))
    else:
        segments = tuple(path.strip("/").split("/"))
    return Target(segments, query.partition("#")[0])
