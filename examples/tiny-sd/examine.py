"""Examines whether a LoRA of the quick start has learned what a zorp is, and nothing else.

    python examples/tiny-sd/examine.py examples/quickstart/out/zorp.safetensors

Diffusers loads the file and paints prompts about zorps, or another creature, and about the rest of the world, with the
LoRA and without. The prompts are not those that it was taught with. Ends with status 1 if something is not as it should
be.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import define, field, frozen
from creatures import CREATURES, ZORP
from numpy.typing import NDArray
from score import MODEL, SUBJECTS, Score, load_pipeline, paint

LEARNED, UNKNOWN, FORGOTTEN = 0.8, 0.05, 0.05
"""Shares of pictures: of zorps at least, with the LoRA; of zorps below, without it; of others lost by it, at most."""
_FILE = Path(__file__).parents[1] / "quickstart" / "out" / "zorp.safetensors"

_WORLD = "world"
"""The subject of the other prompts."""

Pictures = list[NDArray[np.uint8]]


@frozen
class Report:
    """What a LoRA has learned. Shares are of pictures, 0 to 1."""

    creature: str
    """What it should have learned."""
    shown: dict[float, float]
    """How many pictures that should show the creature do, by the LoRA's strength."""
    right: float
    """How many of those are right in place and background, too, at full strength."""
    others: dict[float, float]
    """How many other pictures are all right, by strength."""
    change: dict[float, float]
    """How far pictures of the creature are from those without the LoRA, by strength: mean of 0 to 255."""
    is_off_at_zero: bool
    """Whether strength 0 gives the very pictures that the model paints without the LoRA."""

    def failures(self, slack: float = 0.0) -> Iterator[str]:
        """What is not as it should be; `slack` is a share of pictures to be lenient by, where there are few of them."""
        shown, change = self.shown, self.change
        if shown[1.0] < LEARNED - slack:
            yield f"{self.creature}s are painted too seldom ({shown[1.0]:.1%})"
        if shown[0.0] >= UNKNOWN:
            yield f"{self.creature}s are painted without the LoRA ({shown[0.0]:.1%})"
        if self.others[1.0] < self.others[0.0] - FORGOTTEN - slack:
            yield f"other things are forgotten ({self.others[0.0]:.1%} before, {self.others[1.0]:.1%} now)"
        if not (shown[0.0] <= shown[0.5] <= shown[1.0] and 0 < change[0.5] < change[1.0]):
            yield "half the strength does not lie between none and all"
        if not self.is_off_at_zero:
            yield "strength 0 is not off"

    def __str__(self) -> str:
        lines = [f"strength  {self.creature}s    other prompts  change"]
        for strength, share in self.shown.items():
            others = f"{self.others[strength]:6.1%}" if strength in self.others else "     –"
            lines.append(f"{strength:<8}  {share:6.1%}   {others}         {self.change[strength]:.1f}")
        return "\n".join([*lines, f"{self.creature}s with place and background right: {self.right:.1%}"])


@define
class Examiner:
    """Paints the same prompts with each LoRA that it is given, and compares with the model's own pictures."""

    folder: Path = MODEL
    count: int = 100
    """How many prompts about the creature, and how many about other things."""
    seed: int = 0
    steps: int = 20
    creature: str = ZORP.name
    _pipeline: Any = field(init=False)
    _own: dict[str, Pictures] = field(init=False)
    """What the model paints without a LoRA, by subject."""

    def __attrs_post_init__(self) -> None:
        self._pipeline, self._own = load_pipeline(self.folder), {}

    def examine(self, lora: Path) -> Report:
        """What the LoRA in a file has learned; leaves the model as it was."""
        self._own = self._own or {subject: self._painted(subject) for subject in (self.creature, _WORLD)}
        self._pipeline.load_lora_weights(lora.parent, weight_name=lora.name, adapter_name="lora")
        name = self.creature
        try:
            by_strength = {0.0: self._own[name]}
            for strength in (0.5, 1.0):
                self._pipeline.set_adapters("lora", strength)
                by_strength[strength] = self._painted(name)
            others = {0.0: self._own[_WORLD], 1.0: self._painted(_WORLD)}
            self._pipeline.set_adapters("lora", 0.0)
            off = self._painted(name)
        finally:
            self._pipeline.unload_lora_weights()
        shown = {strength: self._score(name, pictures) for strength, pictures in by_strength.items()}
        return Report(
            creature=name,
            shown={strength: own.share("colour", "shape") for strength, own in shown.items()},
            right=shown[1.0].share("right"),
            others={strength: self._score(_WORLD, own).share("right") for strength, own in others.items()},
            change={strength: _distance(own, by_strength[0.0]) for strength, own in by_strength.items()},
            is_off_at_zero=np.array_equal(off, self._own[name]),
        )

    def shares(self, lora: Path | None, subjects: Iterable[str]) -> dict[str, float]:
        """Of how many pictures what they should show is right, by subject, at full strength; without a LoRA for None.

        Of creatures colour and shape count, of the world everything.
        """
        if lora:
            self._pipeline.load_lora_weights(lora.parent, weight_name=lora.name, adapter_name="lora")
        try:
            scores = {subject: self._score(subject, self._painted(subject)) for subject in subjects}
        finally:
            self._pipeline.unload_lora_weights()
        parts = {_WORLD: ("right",)}
        return {subject: own.share(*parts.get(subject, ("colour", "shape"))) for subject, own in scores.items()}

    def _painted(self, subject: str) -> Pictures:
        _, prompts = SUBJECTS[subject].prompts(self.count, self.seed)
        return paint(self._pipeline, prompts, self.seed, self.steps)

    def _score(self, subject: str, pictures: Pictures) -> Score:
        scenes, _ = SUBJECTS[subject].prompts(self.count, self.seed)
        return SUBJECTS[subject].judged(pictures, scenes)


def _distance(some: Pictures, others: Pictures) -> float:
    return float(np.abs(np.stack(some).astype(np.float32) - np.stack(others)).mean())


def main() -> None:
    """Print the report on each LoRA, and what it fails in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", help=f"the LoRA, or several; {_FILE.name} of the quick start")
    parser.add_argument("--folder", type=Path, default=MODEL, help="the model, a diffusers folder")
    parser.add_argument(
        "--creature", choices=CREATURES, action="append", help="what it should have learned; a zorp if absent"
    )
    parser.add_argument("--count", type=int, default=100, help="how many prompts about it, and about other things")
    parser.add_argument(
        "--compare", action="store_true", help="only a line for the model and for each LoRA, at full strength"
    )
    options = parser.parse_args()
    creatures = options.creature or [ZORP.name]
    examiner = Examiner(options.folder, options.count, creature=creatures[0])
    if options.compare:
        _compare(examiner, creatures, options.files)
        return
    failures = []
    for file in options.files or [_FILE]:
        report = examiner.examine(file)
        print(f"{file}:", report, sep="\n", flush=True)
        failures += [f"{file.name}: {failure}" for failure in report.failures()]
    sys.exit("; ".join(failures) or 0)


def _compare(examiner: Examiner, creatures: Sequence[str], files: Sequence[Path]) -> None:
    print("".join(f"{name + 's':>7} " for name in (*creatures, "other")))
    for file in (None, *files):
        shares = examiner.shares(file, (*creatures, _WORLD))
        print("".join(f"{share:7.1%} " for share in shares.values()), file or "without a LoRA", flush=True)


if __name__ == "__main__":
    main()
