"""A canary's rules as values (pure). How they are tried is `router.rules`' business."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    TypeAdapter,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from registry.spec_values import AnyText, HeaderName, Percent, Text, wants

RuleKind = Literal["header", "user", "region", "percent"]
RULE_KINDS: tuple[RuleKind, ...] = ("header", "user", "region", "percent")
"""In the order in which they are tried."""


class Value(BaseModel):
    """Base of everything in a document: frozen, strict, no unknown fields."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        validate_by_name=True,
        validate_by_alias=True,
        use_attribute_docstrings=True,
        hide_input_in_errors=True,
    )


def exactly_one(*names: str) -> dict[str, Any]:
    """The part of a JSON Schema that says so."""
    return {"oneOf": [{"required": [name]} for name in names]}


def choose_one(names: tuple[str, ...], given: tuple[str, ...]) -> PydanticCustomError:
    want = f"exactly one of {', '.join(names)}"
    got = " and ".join(given) if given else "none of them"
    return PydanticCustomError("said", "{said}", {"said": f"want {want}, got {got}"})


class HeaderRule(Value):
    """A request header that says canary."""

    kind: ClassVar[RuleKind] = "header"
    model_config = ConfigDict(json_schema_extra=exactly_one("equals", "prefix", "present"))

    name: HeaderName
    """The header, in any case."""
    equals: AnyText | None = None
    """Its whole value."""
    prefix: Text | None = None
    """What its value starts with."""
    present: Annotated[Literal[True], wants("true")] | None = None
    """Any value will do."""

    @model_validator(mode="after")
    def _one_test(self) -> HeaderRule:
        tests = ("equals", "prefix", "present")
        given = tuple(name for name in tests if getattr(self, name) is not None)
        if len(given) != 1:
            raise choose_one(tests, given)
        return self


class UserRule(Value):
    """A share of users, sticky: growing the percent never moves a user out again."""

    kind: ClassVar[RuleKind] = "user"
    model_config = ConfigDict(json_schema_extra=exactly_one("header", "claim"))

    header: HeaderName | None = None
    """The header with the user's id."""
    claim: Text | None = None
    """The verified JWT claim with the user's id."""
    percent: Percent
    """Share of users, 0 to 100."""

    @model_validator(mode="after")
    def _one_id(self) -> UserRule:
        given = tuple(name for name in ("header", "claim") if getattr(self, name) is not None)
        if len(given) != 1:
            raise choose_one(("header", "claim"), given)
        return self


class RegionRule(Value):
    """A share of the requests from some regions."""

    kind: ClassVar[RuleKind] = "region"

    header: HeaderName
    """The header with the region."""
    regions: Annotated[tuple[Text, ...], Field(min_length=1)] = Field(
        validation_alias="in", serialization_alias="in"
    )
    """The regions meant."""
    percent: Percent = 100.0
    """Share of their requests, by user where there is a user id."""


class PercentRule(Value):
    """A share of the requests that no other rule took, at random."""

    kind: ClassVar[RuleKind] = "percent"

    percent: Percent
    """Share of requests, 0 to 100."""


Rule = HeaderRule | UserRule | RegionRule | PercentRule


class RuleShape(Value):
    """One entry of ``rules`` as it is written: a mapping with one field, the rule's kind."""

    model_config = ConfigDict(title="Rule", json_schema_extra=exactly_one(*RULE_KINDS))

    header: HeaderRule | None = None
    """A request header that says canary."""
    user: UserRule | None = None
    """A share of users, sticky."""
    region: RegionRule | None = None
    """A share of the requests from some regions."""
    percent: Percent | None = None
    """A share of the requests that no other rule took."""

    @model_validator(mode="after")
    def _one_kind(self) -> RuleShape:
        given = tuple(kind for kind in RULE_KINDS if getattr(self, kind) is not None)
        if len(given) != 1:
            raise choose_one(RULE_KINDS, given)
        return self

    def rule(self) -> Rule:
        rule = self.header or self.user or self.region
        if rule is not None:
            return rule
        return PercentRule(percent=0.0 if self.percent is None else self.percent)


def rule_document(rule: Rule) -> Mapping[str, Any]:
    """The rule as it stands in a document: ``{"user": {"header": "X-Id", "percent": 5.0}}``."""
    if isinstance(rule, PercentRule):
        return {"percent": rule.percent}
    return {rule.kind: rule.model_dump(mode="json", by_alias=True, exclude_none=True)}


class _AsWritten:
    """Reads a `RuleShape`, keeps the `Rule`; a `Rule` passes as it is."""

    def __get_pydantic_core_schema__(
        self, _source: Any, _handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        def read(value: Any) -> Rule:
            if isinstance(value, Rule):
                return value
            return _SHAPE.validate_python(value, by_name=False, by_alias=True).rule()

        return core_schema.no_info_plain_validator_function(
            read,
            serialization=core_schema.plain_serializer_function_ser_schema(rule_document),
        )

    def __get_pydantic_json_schema__(
        self, _schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return handler(_SHAPE.core_schema)


_SHAPE = TypeAdapter(RuleShape)
RuleEntry = Annotated[Rule, _AsWritten()]
