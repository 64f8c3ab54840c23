"""Why a servable could not be made ready."""

from __future__ import annotations

from registry.errors import PaddlewheelError


class LoaderError(PaddlewheelError):
    """Base of this package's errors."""


class FetchFailed(LoaderError):
    """The source could not be read. ``retryable`` says whether trying again may help."""

    def __init__(self, message: str, *, retryable: bool = True) -> None:
        super().__init__(message)
        self.retryable = retryable


class SourceGone(FetchFailed):
    """There is no model there. Asking again at once is of no use; later it may be: a folder that
    is not mounted yet, or not synced, looks the same."""

    def __init__(self, message: str) -> None:
        super().__init__(message, retryable=False)


class NotAdmitted(LoaderError):
    """One of the seven checks of SPEC section 4 failed.

    ``check`` is one of: digest, params, finite, signature, memory, warmup, golden.
    """

    def __init__(self, check: str, reason: str, *, may_heal: bool = False) -> None:
        """may_heal: the same files may be admitted later (memory that others hold now)."""
        super().__init__(f"{check}: {reason}")
        self.check = check
        self.reason = reason
        self.may_heal = may_heal


class LoadFailed(LoaderError):
    """Paddle refused the model."""


class LoadTimedOut(LoaderError):
    """Loading passed its deadline: it may go better another time."""


class WorkerDied(LoaderError):
    """The worker process ended. ``code`` is ``SIGSEGV``, ``SIGKILL``, ``EXIT:1``, ``HANG`` ..."""

    def __init__(self, code: str, message: str = "") -> None:
        super().__init__(message or f"worker ended: {code}")
        self.code = code


class PredictorFault(LoaderError):
    """``run`` raised. Classified inside the worker (`loader.faults`)."""

    def __init__(self, message: str, *, code: str, fault_class: str) -> None:
        super().__init__(message)
        self.code = code
        self.fault_class = fault_class
