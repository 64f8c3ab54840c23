"""The base of every error that this project raises on purpose; each package derives its own."""


class PaddlewheelError(Exception):
    """Something that can happen without a bug in us: bad input, bad weather, bad weights."""


class Bug(Exception):
    """Something that only a bug in us explains. Never caught as if it were bad weather."""
