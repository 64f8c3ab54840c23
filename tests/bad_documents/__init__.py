"""Bad model documents, each with where its first error has to point.

Most are `GOOD` with one edit, so that a case reads as "this, instead of that". End-to-end tests
put `BadDocument.bytes_for` under a served model's key and expect ``accepted: false`` with this
path and line, and the model to serve on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

GOOD = """\
apiVersion: paddlewheel/v1
kind: Model
metadata: {name: m, labels: {team: vision}}
spec:
  live: "1"
  versions:
    - version: "1"
      source: file:///models/m/1
    - version: "2"
      source: file:///models/m/2
  canary:
    version: "2"
    rules:
      - header: {name: X-Canary, equals: "1"}
      - user: {header: X-User-Id, percent: 5}
      - region: {header: X-Region, in: [cn-sh], percent: 10}
      - percent: 2
  placement: {device: cpu, replicas: 1, memoryMB: 64, labels: {zone: a}}
  predictor: {threads: 1, precision: fp32, options: {}}
  warmup: {requests: 3, shapes: {x: [1, 4]}, rtol: 1.0e-3}
  rollback: {codes: [700, sticky], window_s: 30, bake_s: 600}
  limits: {timeout_s: 10, queue: 256}
"""
MODEL = "m"


@dataclass(frozen=True)
class BadDocument:
    name: str
    raw: bytes
    path: str
    """Of the error meant; empty for the document as a whole."""
    line: int | None
    message: str
    """A part of the message."""
    errors: int = 1
    """How many there are in all."""
    schema_refuses: bool = True
    """Whether JSON Schema alone refuses it (only where the text can be read at all)."""

    def bytes_for(self, model: str) -> bytes:
        """The same document with ``model`` as its name, where it has one."""
        return self.raw.replace(b"name: m,", f"name: {model},".encode())


def _edit(
    name: str,
    old: str,
    new: str,
    path: str,
    line: int | None,
    message: str,
    *,
    errors: int = 1,
    schema_refuses: bool = True,
) -> BadDocument:
    assert GOOD.count(old) == 1, (name, old)
    raw = GOOD.replace(old, new).encode()
    return BadDocument(name, raw, path, line, message, errors, schema_refuses)


def _canary(
    name: str, more: str, path: str, message: str, *, errors: int = 1, schema_refuses: bool = True
) -> BadDocument:
    """``more``: fields of the canary, in flow style. Its rules make room for them."""
    fields = "    " + more.replace("}], ", "}]\n    ") + "\n"
    raw = GOOD[: GOOD.index("    rules:")] + fields + GOOD[GOOD.index("  placement:") :]
    where = f"spec.canary.{path}" if path else "spec.canary"
    line = 11 if not path else 12 + ("\n    sticky" in fields and "sticky" in path) + 1
    return BadDocument(name, raw.encode(), where, line, message, errors, schema_refuses)


def _whole(
    name: str, raw: bytes | str, line: int | None, message: str, *, path: str = "", errors: int = 1
) -> BadDocument:
    data = raw.encode() if isinstance(raw, str) else raw
    return BadDocument(name, data, path, line, message, errors)


def _json(
    name: str, text: str, path: str, line: int, message: str, *, schema_refuses: bool = True
) -> BadDocument:
    return BadDocument(name, text.encode(), path, line, message, 1, schema_refuses)


_ONE = '    - version: "1"\n      source: file:///models/m/1\n'
_LIVE = '  live: "1"\n'
_V1 = '- version: "1"'
_HEADER = '{name: X-Canary, equals: "1"}'
_USER = "{header: X-User-Id, percent: 5}"
_REGION = "{header: X-Region, in: [cn-sh], percent: 10}"
_BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
_GOOD_JSON = json.dumps(
    {
        "apiVersion": "paddlewheel/v1",
        "kind": "Model",
        "metadata": {"name": "m", "labels": {}},
        "spec": {"live": "1", "versions": [{"version": "1", "source": "/models/m/1"}]},
    },
    indent=2,
)
_LONG = "x" * (1 << 20)

_TEXT = (
    # --- text that holds no document ------------------------------------------------------------
    _whole("empty", "", None, "want a document, got nothing"),
    _whole("only a comment", "# nothing yet\n", None, "want a document, got nothing"),
    _whole("only a scalar", "live\n", 1, "want a mapping, got 'live'"),
    _whole("a list", "- apiVersion: paddlewheel/v1\n", 1, "want a mapping, got a list"),
    _whole("over 1 MiB", GOOD + f"# {_LONG}\n", None, "want at most 1048576 bytes"),
    _whole("not UTF-8", GOOD.encode() + b"# caf\xe9\n", 23, "want UTF-8, got the byte 0xe9"),
    _whole("UTF-16", GOOD.encode("utf-16"), 1, "want UTF-8"),
    _whole("gzip", b"\x1f\x8b\x08\x00\x00\x00\x00\x00", 1, "want UTF-8"),
    _whole("NUL byte", GOOD.replace("kind: Model", "kind: Mo\0del"), 2, "U+0000"),
    _whole("control character", GOOD.replace("fp32", "fp\x0732"), 19, "U+0007"),
    _whole("tab as indent", GOOD.replace('  live: "1"', '\tlive: "1"'), 5, "a tab indents"),
    _whole("unclosed quote", GOOD.replace('live: "1"', 'live: "1'), 7, "not readable as YAML"),
    _whole("unclosed brace", GOOD.replace("queue: 256}", "queue: 256"), 23, "not readable as YAML"),
    _whole("bad indent", GOOD.replace("  limits:", "   limits:"), 22, "not readable as YAML"),
    _whole("two documents", GOOD + "---\n" + GOOD, 23, "want one document, got a second"),
    _whole("alias bomb", _BOMB, 5, "too large: more than 20000 values"),
    _whole("alias inside itself", "a: &a [*a]\n", 1, "*a stands inside itself"),
    _whole("alias of nothing", "a: 1\nb: *gone\n", 2, "no &gone before this *alias"),
    _whole("deep nesting", "a: " + "[" * 5000 + "]" * 5000, 1, "nested too deeply"),
    _whole("deep block nesting", "".join(" " * n + "a:\n" for n in range(99)), 33, "nested too"),
    _whole("list as a field name", "[a, b]: c\n", 1, "want text as a field name"),
    _whole("many values", "a: [" + "1, " * 30_000 + "]\n", 1, "too large: more than 20000"),
    _whole("Python object", "!!python/object:os.system {}\n", 1, "tags such as"),
    _whole("binary cut short", GOOD.encode()[:400], 17, "not readable as YAML"),
    # --- JSON -----------------------------------------------------------------------------------
    _json("JSON without a comma", _GOOD_JSON.replace('"m",', '"m"'), "", 6,
          "not readable as JSON"),
    _json("JSON cut short", _GOOD_JSON[:-20], "", 13, "not readable as JSON"),
    _json("JSON and more", _GOOD_JSON + "\n{}", "", 18, "not readable as JSON"),
    _json("JSON repeated key", _GOOD_JSON.replace('"kind": "Model"', '"kind": "Model", "kind": 1'),
          "kind", 3, "written twice (first on line 3)", schema_refuses=False),
    _json("JSON NaN", _GOOD_JSON.replace('"live": "1"', '"live": "1", "limits": {"queue": NaN}'),
          "spec.limits.queue", 9, "got NaN"),
    _json("JSON half a pair", _GOOD_JSON.replace('"live": "1"', '"live": "\\ud800"'),
          "spec.live", 9, "half a surrogate pair"),
    _json("JSON deep", '{"a": ' * 5000 + "1" + "}" * 5000, "", 1, "nested too deeply"),
    _json("JSON number as version", _GOOD_JSON.replace('"version": "1"', '"version": 1'),
          "spec.versions[0].version", 12, 'quote it, "1"'),
)  # fmt: skip

_SPELLING = (
    # --- YAML that its readers disagree about ---------------------------------------------------
    _edit("repeated key", _LIVE, _LIVE + '  live: "2"\n', "spec.live", 6,
          "written twice (first on line 5)", schema_refuses=False),
    _edit("repeated section", "  limits:", "  rollback: {}\n  limits:", "spec.rollback", 22,
          "written twice (first on line 21)", schema_refuses=False),
    _edit("unquoted number as live", 'live: "1"', "live: 1", "spec.live", 5, 'quote it, "1"'),
    _edit("unquoted decimal as live", 'live: "1"', "live: 1.10", "spec.live", 5,
          'got 1.10: quote it, "1.10"'),
    _edit("unquoted number as version", '- version: "1"', "- version: 20240521",
          "spec.versions[0].version", 7, 'quote it, "20240521"', errors=2),
    _edit("unquoted date as live", 'live: "1"', "live: 2024-05-21", "spec.live", 5,
          'is a date to YAML: write "2024-05-21"', schema_refuses=False),
    _edit("leading zero", 'live: "1"', "live: 007", "spec.live", 5, 'write "007" in quotes',
          schema_refuses=False),
    _edit("exponent as live", 'live: "1"', "live: 1e3", "spec.live", 5, 'quote it, "1e3"'),
    _edit("Norway", "labels: {zone: a}", "labels: {zone: no}", "spec.placement.labels.zone", 18,
          'write "no" in quotes', schema_refuses=False),
    _edit("yes for true", _HEADER, "{name: X-Canary, present: yes}",
          "spec.canary.rules[0].header.present", 14, "or true or false"),
    _edit("underscores", "queue: 256", "queue: 1_000", "spec.limits.queue", 22, "or 1000"),
    _edit("base 60", "timeout_s: 10", "timeout_s: 1:30", "spec.limits.timeout_s", 22, "base 60"),
    _edit("merge key", _LIVE, '  <<: {a: b}\n' + _LIVE, 'spec["<<"]', 5, "merge keys"),
    _edit("tag on a value", 'live: "1"', 'live: !!python/none "1"', "spec.live", 5, "tags such",
          schema_refuses=False),
    _edit("number of 70 digits", "queue: 256", "queue: " + "9" * 70, "spec.limits.queue", 22,
          "at most 64 characters"),
    # --- the head -------------------------------------------------------------------------------
    _edit("no apiVersion", "apiVersion: paddlewheel/v1\n", "", "apiVersion", 1, "required"),
    _edit("apiVersion of later", "paddlewheel/v1", "paddlewheel/v2", "apiVersion", 1,
          "want paddlewheel/v1, got 'paddlewheel/v2'"),
    _edit("api_version", "apiVersion", "api_version", "api_version", 1,
          "did you mean apiVersion?", errors=2),
    _edit("another kind", "kind: Model", "kind: Pipeline", "kind", 2, "want Model"),
    _edit("no metadata", "metadata: {name: m, labels: {team: vision}}\n", "", "metadata", 1,
          "required"),
    _edit("no name", "{name: m, labels: {team: vision}}", "{labels: {}}", "metadata.name", 3,
          "required"),
    _edit("name of another model", "{name: m,", "{name: other,", "metadata.name", 3,
          "the last part of the key, got 'other'", schema_refuses=False),
    _edit("name with a slash", "{name: m,", "{name: a/b,", "metadata.name", 3, "want a name of"),
    _edit("label that is a number", "{team: vision}", "{team: 7}", "metadata.labels.team", 3,
          'quote it, "7"'),
    _edit("no spec", GOOD[GOOD.index("spec:"):], "", "spec", 1, "required"),
    _edit("unknown top-level field", "kind: Model", "kind: Model\nstatus: {}", "status", 3,
          "unknown field"),
    # --- versions -------------------------------------------------------------------------------
    _edit("no live", _LIVE, "", "spec.live", 4, "required"),
    _edit("live not listed", 'live: "1"', 'live: "9"', "spec.live", 5,
          "want a version listed under spec.versions (1, 2), got '9'", schema_refuses=False),
    _edit("live with a space", 'live: "1"', 'live: "1 "', "spec.live", 5, "want a version as text"),
    _edit("version of 65 characters", 'live: "1"', f'live: "{"v" * 65}"', "spec.live", 5,
          "at most 64"),
    _edit("version listed twice", '- version: "2"', '- version: "1"', "spec.versions[1].version", 9,
          "listed already, in spec.versions[0].version", errors=2, schema_refuses=False),
    _edit("version climbing out", _V1, "- version: ../1", "spec.versions[0].version", 7,
          "want a version as text", errors=2),
    _edit("no source", "      source: file:///models/m/1\n", "", "spec.versions[0].source", 7,
          "required"),
    _edit("empty source", "file:///models/m/1", '""', "spec.versions[0].source", 8,
          "want a folder's path or fsspec URL"),
    _edit("digest of 8 digits", _ONE, _ONE + "      sha256: {a.pdiparams: abcdef01}\n",
          "spec.versions[0].sha256[\"a.pdiparams\"]", 9, "64 hex digits"),
    _edit("digest of a file outside", _ONE, _ONE + f'      sha256: {{../a: "{"0" * 64}"}}\n',
          'spec.versions[0].sha256["../a"]', 9, "inside the source folder", schema_refuses=False),
    _edit("digest as text", _ONE, _ONE + "      sha256: abc\n", "spec.versions[0].sha256", 9,
          "want a mapping, got 'abc'"),
    _edit("unknown compatibility", _ONE, _ONE + "      compatibility: exact\n",
          "spec.versions[0].compatibility", 9, "want strict, loose or none, got 'exact'"),
    _edit("versions as a mapping", _ONE + '    - version: "2"\n      source: file:///models/m/2\n',
          "    a: b\n", "spec.versions", 6, "want a list, got a mapping"),
    _edit("no versions in the list", GOOD[GOOD.index("  versions:"):GOOD.index("  canary:")],
          "  versions: []\n", "spec.versions", 6, "want a list of one entry or more"),
    _edit("nothing after versions",
          GOOD[GOOD.index("  versions:"):GOOD.index("  canary:")],
          "  versions:\n", "spec.versions", 6, "want a list, got nothing"),
    # --- canary ---------------------------------------------------------------------------------
    _edit("canary not listed", 'canary:\n    version: "2"', 'canary:\n    version: "7"',
          "spec.canary.version", 12, "want a version listed under", schema_refuses=False),
    _edit("canary without version", '    version: "2"\n    rules', "    rules",
          "spec.canary.version", 11, "required"),
    _edit("unknown rule", "- percent: 2", "- weight: 2", "spec.canary.rules[3].weight", 17,
          "unknown field"),
    _edit("misspelled rule", "- percent: 2", "- precent: 2", "spec.canary.rules[3].precent", 17,
          "did you mean percent?"),
    _edit("rule of two kinds", "- percent: 2", f"- percent: 2\n        user: {_USER}",
          "spec.canary.rules[3]", 17,
          "want exactly one of header, user, region, percent, got user and percent"),
    _edit("empty rule", "- percent: 2", "- {}", "spec.canary.rules[3]", 17, "got none of them"),
    _edit("percent over 100", "- percent: 2", "- percent: 101", "spec.canary.rules[3].percent", 17,
          "want a number in 0..100, got 101"),
    _edit("percent below 0", "percent: 5", "percent: -1", "spec.canary.rules[1].user.percent", 15,
          "want a number in 0..100, got -1"),
    _edit("percent as text", "- percent: 2", '- percent: "2"', "spec.canary.rules[3].percent", 17,
          "got '2': leave the quotes out"),
    _edit("percent with a sign", "- percent: 2", "- percent: 5%", "spec.canary.rules[3].percent",
          17, "want a number in 0..100, got '5%'"),
    _edit("percent NaN", "- percent: 2", "- percent: .nan", "spec.canary.rules[3].percent", 17,
          "want a number in 0..100, got .nan", schema_refuses=False),
    _edit("percent infinite", "percent: 10}", "percent: .inf}",
          "spec.canary.rules[2].region.percent", 16, "got .inf"),
    _edit("percent true", "- percent: 2", "- percent: true", "spec.canary.rules[3].percent", 17,
          "got true"),
    _edit("header with two tests", _HEADER, '{name: X-Canary, equals: "1", present: true}',
          "spec.canary.rules[0].header", 14, "want exactly one of equals, prefix, present"),
    _edit("header without a test", _HEADER, "{name: X-Canary}", "spec.canary.rules[0].header", 14,
          "got none of them"),
    _edit("header present false", _HEADER, "{name: X-Canary, present: false}",
          "spec.canary.rules[0].header.present", 14, "want true, got false"),
    _edit("header equals a number", _HEADER, "{name: X-Canary, equals: 1}",
          "spec.canary.rules[0].header.equals", 14, 'quote it, "1"'),
    _edit("header name with a space", _HEADER, '{name: X Canary, equals: "1"}',
          "spec.canary.rules[0].header.name", 14, "want an HTTP header's name"),
    _edit("misspelled test", _HEADER, '{name: X-Canary, equal: "1"}',
          "spec.canary.rules[0].header.equal", 14, "did you mean equals?"),
    _edit("user by header and claim", _USER, "{header: X-User-Id, claim: sub, percent: 5}",
          "spec.canary.rules[1].user", 15, "want exactly one of header, claim"),
    _edit("user without an id", _USER, "{percent: 5}", "spec.canary.rules[1].user", 15,
          "got none of them"),
    _edit("user without percent", _USER, "{header: X-User-Id}",
          "spec.canary.rules[1].user.percent", 15, "required"),
    _edit("region as text", _REGION, "{header: X-Region, in: cn-sh}",
          "spec.canary.rules[2].region.in", 16, "want a list, got 'cn-sh'"),
    _edit("no regions", _REGION, "{header: X-Region, in: []}",
          "spec.canary.rules[2].region.in", 16, "want a list of one entry or more"),
    _edit("regions by another name", _REGION, "{header: X-Region, regions: [cn-sh]}",
          "spec.canary.rules[2].region.regions", 16, "unknown field", errors=2),
    _canary("steps as numbers", "steps: [5, 20]",
            "steps[0]", "want a mapping, got 5", errors=2),
    _canary("a step without its time", "steps: [{percent: 5}]",
            "steps[0].hold_s", "required"),
    _canary("a step over 100", "steps: [{percent: 101, hold_s: 1}]",
            "steps[0].percent", "want a number in 0..100, got 101"),
    _canary("a step by another name", "steps: [{percent: 5, hold: 1, hold_s: 1}]",
            "steps[0].hold", "unknown field"),
    _canary("a time that is negative", "steps: [{percent: 5, hold_s: -1}]",
            "steps[0].hold_s", "want seconds"),
    _canary("steps that fall", "steps: [{percent: 9, hold_s: 1}, {percent: 5, hold_s: 1}]",
            "steps", "got 5 in step 1 after 9", schema_refuses=False),
    _canary("steps that stand still", "steps: [{percent: 5, hold_s: 1}, {percent: 5, hold_s: 1}]",
            "steps", "got 5 in step 1 after 5", schema_refuses=False),
    _canary("sticky without an id", "steps: [{percent: 5, hold_s: 1}], sticky: {}",
            "sticky", "want exactly one of header, claim"),
    _canary("sticky without steps", "sticky: {header: X-User-Id}",
            "", "there are none", schema_refuses=False),
    _canary("an error rate in percent", "gates: {error_rate: 5}",
            "gates.error_rate", "want a share in 0..1, got 5"),
    _canary("a canary that must be faster", "gates: {p95_ratio: 0.9}",
            "gates.p95_ratio", "want a number in 1..1000"),
    _canary("no samples at all", "gates: {min_samples: 0}",
            "gates.min_samples", "want a whole number"),
    _canary("agreement without a mirror", "gates: {agreement: 0.9}",
            "", "want mirror too", schema_refuses=False),
    _canary("promoted at will", "promote: later",
            "promote", "want auto or manual, got 'later'"),
    _canary("a mirror without a share", "mirror: {}",
            "mirror.percent", "required"),
    _canary("a mirror over 100", "mirror: {percent: 200}",
            "mirror.percent", "want a number in 0..100"),
    _canary("a top of none", "mirror: {percent: 1, compare: {topk: 0}}",
            "mirror.compare.topk", "want a whole number"),
    # --- placement, predictor, warm-up ------------------------------------------------------------
    _edit("unknown device", "device: cpu", "device: tpu", "spec.placement.device", 18,
          'want "cpu", "gpu" or "gpu:N", got \'tpu\''),
    _edit("no replicas", "replicas: 1", "replicas: 0", "spec.placement.replicas", 18,
          "want a whole number in 1..256, got 0"),
    _edit("half a replica", "replicas: 1", "replicas: 1.5", "spec.placement.replicas", 18,
          "got 1.5"),
    _edit("memory in units", "memoryMB: 64", "memoryMB: 64Mi", "spec.placement.memoryMB", 18,
          "want megabytes, a whole number of 1 or more, got '64Mi'"),
    _edit("memory_mb", "memoryMB", "memory_mb", "spec.placement.memory_mb", 18,
          "did you mean memoryMB?"),
    _edit("unknown priority", "replicas: 1", "priority: urgent", "spec.placement.priority", 18,
          "want low, normal or high"),
    _edit("placement as a list", "{device: cpu, replicas: 1, memoryMB: 64, labels: {zone: a}}",
          "[cpu]", "spec.placement", 18, "want a mapping, got a list"),
    _edit("threads as text", "threads: 1", 'threads: "1"', "spec.predictor.threads", 19,
          "leave the quotes out"),
    _edit("unknown precision", "precision: fp32", "precision: fp8", "spec.predictor.precision", 19,
          "want fp32, fp16, bf16 or int8"),
    _edit("option with nothing", "options: {}", "options: {mkldnn: }",
          "spec.predictor.options.mkldnn", 19, "got nothing"),
    _edit("no warm-up requests", "requests: 3", "requests: 0", "spec.warmup.requests", 20,
          "want a whole number in 1..1000000, got 0"),
    _edit("open dimension", "x: [1, 4]", "x: [-1, 4]", "spec.warmup.shapes.x[0]", 20,
          "want a whole number of 1 or more, got -1"),
    _edit("shape out of this world", "x: [1, 4]", "x: [100000, 100000]", "spec.warmup.shapes.x",
          20, "elements", schema_refuses=False),
    _edit("negative tolerance", "rtol: 1.0e-3", "rtol: -0.1", "spec.warmup.rtol", 20,
          "want a number of 0 or more"),
    _edit("infinite tolerance", "rtol: 1.0e-3", "rtol: .inf", "spec.warmup.rtol", 20,
          "want a number of 0 or more, got .inf", schema_refuses=False),
    # --- rollback, limits -------------------------------------------------------------------------
    _edit("unknown class", "codes: [700, sticky]", "codes: [700, crashy]",
          "spec.rollback.codes[1]", 21,
          "want a code's number or one of sticky, memory, unsupported, got 'crashy'"),
    _edit("code as text", "codes: [700, sticky]", 'codes: ["700"]', "spec.rollback.codes[0]", 21,
          "leave the quotes out"),
    _edit("codes not in a list", "codes: [700, sticky]", "codes: 700", "spec.rollback.codes", 21,
          "want a list, got 700"),
    _edit("window of nothing", "window_s: 30", "window_s: 0", "spec.rollback.window_s", 21,
          "want seconds, more than 0"),
    _edit("negative bake", "bake_s: 600", "bake_s: -1", "spec.rollback.bake_s", 21,
          "want seconds, 0 up to a year, got -1"),
    _edit("endless bake", "bake_s: 600", "bake_s: .inf", "spec.rollback.bake_s", 21, "got .inf"),
    _edit("duration with a unit", "timeout_s: 10", "timeout_s: 10s", "spec.limits.timeout_s", 22,
          "want seconds, more than 0 and up to a year, got '10s'"),
    _edit("no timeout", "timeout_s: 10", "timeout_s: 0", "spec.limits.timeout_s", 22,
          "want seconds, more than 0"),
    _edit("timeout without unit in its name", "timeout_s", "timeout", "spec.limits.timeout", 22,
          "did you mean timeout_s?"),
    _edit("mesh of a later release", "  limits:", "  mesh: {}\n  limits:", "spec.mesh", 22,
          "unknown field"),
    _edit("waves without their strategy", "  limits:",
          "  rollout: {waves: [{percent: 5}]}\n  limits:", "spec.rollout", 22,
          "want no waves with strategy immediate", schema_refuses=False),
    _edit("waves without any", "  limits:", "  rollout: {strategy: waves}\n  limits:",
          "spec.rollout", 22, "want one wave or more", schema_refuses=False),
    _edit("wave of two kinds", "  limits:",
          "  rollout: {strategy: waves, waves: [{percent: 5, labels: {a: b}}]}\n  limits:",
          "spec.rollout.waves[0]", 22, "exactly one of percent, labels"),
    _edit("strategy unheard of", "  limits:", "  rollout: {strategy: wave}\n  limits:",
          "spec.rollout.strategy", 22, "want immediate, waves or barrier"),
    _edit("rollout without time", "  limits:", "  rollout: {timeout_s: 0}\n  limits:",
          "spec.rollout.timeout_s", 22, "want seconds, more than 0"),
    _edit("nothing after limits", "limits: {timeout_s: 10, queue: 256}", "limits:", "spec.limits",
          22, "want a mapping, got nothing"),
    # --- all of it at once ------------------------------------------------------------------------
    _edit("several at once", 'live: "1"', 'live: "9"\n  lief: 1\n  placment: {}', "spec.live", 5,
          "want a version listed under", errors=3),
)  # fmt: skip

CASES: tuple[BadDocument, ...] = _TEXT + _SPELLING
UNREADABLE = frozenset(case.name for case in _TEXT if case.path == "")
"""Those that hold no tree at all, and so nothing that a JSON Schema could judge."""
