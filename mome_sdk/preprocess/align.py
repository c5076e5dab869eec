"""From a scan to its place in the template's space: what is tried, in which order, and checked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mome_sdk.errors import PreparationError
from mome_sdk.model import Model
from mome_sdk.preprocess import register, skull_strip
from mome_sdk.preprocess.intensity import background_of
from mome_sdk.preprocess.quality import NO_BRAIN, Problem, Quality, centre_mm, check_grid, judge
from mome_sdk.volume import Volume

# A brain whose outline covers the template's this well is not registered again.
_ALREADY_THERE = 0.9


@dataclass(frozen=True, eq=False)
class Alignment:
    """Where a scan, and whatever shares its patient space, lies in the template's space.

    Attributes:
        to_template: 4x4, RAS mm of the scan to RAS mm of the template.
        brain: The brain in the scan's own space (uint8); None for the template's brain mask.
        method: How `to_template` was found.
        brain_from: Where the brain is from: "image" (without skull already), "template", "file",
            or name and version of the program.
        quality: The figures that it was judged by.
        forced: Codes of the checks that said no and were overruled.
    """

    to_template: NDArray[np.float64]
    brain: Volume | None
    method: str
    brain_from: str
    quality: Quality
    forced: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """How it was made, as JSON values."""
        return {
            "registration": self.method,
            "to_template": [[round(float(x), 6) for x in row] for row in self.to_template],
            "brain": self.brain_from,
            "quality": self.quality.as_json(),
            "forced": list(self.forced),
        }


def align(
    scan: Volume,
    bundle: Model,
    *,
    brain_mask: Volume | None = None,
    force: bool = False,
    method: register.Method = "niimath",
    threads: int | None = None,
) -> Alignment:
    """Find a scan's place in the template's space, and its brain.

    Args:
        scan: The image (I, J, K), any axes; a whole head or a brain without skull.
        bundle: Whose template is meant.
        brain_mask: The brain in the scan's space, not 0 inside, on any grid.
        force: Take the best there is where a check says no; `Alignment.forced` tells.
        method: The registration program.
        threads: Most threads of it.

    A brain that covers the template's already is left where it is. A head whose registration the
    checks refuse is stripped by deepbet (extra `prep`) and tried again.

    Raises:
        PreparationError: `registration.*`, `brain.*`: a check says no; its `attempt` is the
            Alignment that was refused.
        InputError: `argument.brain-mask`.
    """
    unfit = check_grid(scan.grid)
    if unfit and not force:
        raise _refusal(unfit, None)
    brain = None if brain_mask is None else skull_strip.check_mask(brain_mask, scan.grid)
    found = _best(scan, bundle, brain, "image" if brain is None else "file", method, threads)
    if found.quality.problems() and brain is None and skull_strip.is_installed():
        brain = skull_strip.find_brain(scan)
        found = _best(scan, bundle, brain, skull_strip.method(), method, threads)
    return _checked(found, [unfit] if unfit else [], force=force, may_strip=brain is None)


def align_to(reference: Alignment, scan: Volume, bundle: Model, *, force: bool) -> Alignment:
    """The place of another scan of the same session, by its reference's registration.

    Raises:
        PreparationError: the scan does not lie where the reference does.
    """
    unfit = check_grid(scan.grid)
    if unfit and not force:
        raise _refusal(unfit, None)
    quality = judge(scan, reference.to_template, bundle)
    brain, source = (None, "image") if quality.is_stripped else (reference.brain, "reference")
    if not quality.is_stripped and brain is None:
        source = "template"
    method = f"reference: {reference.method}"
    found = Alignment(reference.to_template, brain, method, source, quality)
    return _checked(found, [unfit] if unfit else [], force=force, may_strip=False)


def _best(
    scan: Volume,
    bundle: Model,
    brain: Volume | None,
    source: str,
    method: register.Method,
    threads: int | None,
) -> Alignment:
    """The first registration that no check refuses, or the most similar of all."""
    moving = scan if brain is None else skull_strip.stripped(scan, brain)

    def alignment(to_template: NDArray[np.float64], how: str) -> Alignment:
        quality = judge(moving, to_template, bundle)
        if brain is not None or quality.is_stripped:
            mask = brain
            if mask is None:
                mask = Volume(scan.array != background_of(scan), scan.affine)
            return Alignment(to_template, mask, how, source, quality)
        return Alignment(to_template, None, how, "template", quality)

    there = alignment(np.eye(4), "none: in the template's space already")
    if there.quality.overlap >= _ALREADY_THERE and not there.quality.problems():
        return there
    best: Alignment | None = None
    tries = register.registrations(
        moving, bundle.template, centre_mm(bundle), method=method, threads=threads
    )
    for matrix in tries:
        found = alignment(matrix, register.name_of(method))
        if not found.quality.problems():
            return found
        if best is not None and max(best.quality.similarity, found.quality.similarity) < NO_BRAIN:
            break
        if best is None or found.quality.similarity > best.quality.similarity:
            best = found
    assert best is not None  # registrations() raises when it has nothing
    return best


def _checked(
    found: Alignment, problems: list[Problem], *, force: bool, may_strip: bool
) -> Alignment:
    """The alignment with what was overruled, or the error that refuses it."""
    problems = [*problems, *found.quality.problems()]
    if problems and not force:
        raise _refusal(problems[0], found, may_strip=may_strip)
    return replace(found, forced=tuple(problem.code for problem in problems))


def _refusal(
    problem: Problem, attempt: Alignment | None, *, may_strip: bool = False
) -> PreparationError:
    hint = problem.hint
    if may_strip and not skull_strip.is_installed():
        hint += (
            f" If this is a head with its skull, brain extraction may help: {skull_strip.INSTALL}."
        )
    return PreparationError(problem.code, problem.message, hint=hint, attempt=attempt)
