"""Everything that this package raises on purpose: one tree, each error with a stable code."""

from __future__ import annotations


class MomeError(Exception):
    """An error with a stable `code` for programs and whole sentences for people.

    The text says what was found, what was expected and what to do. It never holds patient data.
    """

    def __init__(self, code: str, message: str, *, hint: str = "") -> None:
        super().__init__(code, message)  # what rebuilds it in another process, with its state
        self.code = code
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        text = f"[{self.code}] {self.message}"
        return f"{text} {self.hint}" if self.hint else text


class InputError(MomeError, ValueError):
    """This image or argument cannot be used: `volume.*`, `argument.*`."""


class GeometryError(InputError):
    """The voxels have no trustworthy place: `geometry.*`."""


class BundleError(MomeError):
    """Weights are missing, altered or foreign: `bundle.*`."""


class PreparationError(MomeError):
    """A preparation step ran, but its check says no: `registration.*`, `brain.*`.

    Attributes:
        attempt: What was refused, for a picture of it: the `preprocess.pipeline.Prepared` of a
            check that says no, None where there is none.
    """

    def __init__(self, code: str, message: str, *, hint: str = "", attempt: object = None) -> None:
        super().__init__(code, message, hint=hint)
        self.attempt = attempt


class EngineError(MomeError, RuntimeError):
    """A backend is missing or did not work: `engine.*`."""


class DicomError(MomeError):
    """DICOM that cannot be read, or is over a limit: `dicom.*`."""


class PeerError(MomeError):
    """The other side refused, timed out or answered a failure: `peer.*`."""

    def __init__(self, code: str, message: str, *, hint: str = "", retryable: bool = False) -> None:
        super().__init__(code, message, hint=hint)
        self.retryable = retryable


def out_of_memory(error: MemoryError) -> EngineError:
    """What to tell the user when an allocation was refused."""
    return EngineError(
        "engine.out-of-memory",
        f"There is not enough memory ({error}).",
        hint="Free some, or use a smaller --batch.",
    )
