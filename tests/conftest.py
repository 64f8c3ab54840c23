"""What holds for all tests."""

# hypothesis's pytest plugin imports it at the end of a run otherwise, deep in pytest's own stack,
# where CPython 3.11.7 fails to compile it ("AST constructor recursion depth mismatch").
import hypothesis  # noqa: F401
