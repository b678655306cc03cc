"""Examines whether a LoRA of the quick start has learned what a zorp is, and nothing else.

    python examples/tiny-sd/examine.py examples/quickstart/out/zorp.safetensors

Diffusers loads the file and paints prompts about zorps and about the rest of the world, with the LoRA and without. The
prompts are not those that it was taught with. Ends with status 1 if something is not as it should be.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from attrs import define, field, frozen
from numpy.typing import NDArray
from score import MODEL, SUBJECTS, Score, load_pipeline, paint
from zorp import NAME

LEARNED, UNKNOWN, FORGOTTEN = 0.8, 0.05, 0.05
"""Shares of pictures: of zorps at least, with the LoRA; of zorps below, without it; of others lost by it, at most."""
_FILE = Path(__file__).parents[1] / "quickstart" / "out" / "zorp.safetensors"

Pictures = list[NDArray[np.uint8]]


@frozen
class Report:
    """What a LoRA has learned. Shares are of pictures, 0 to 1."""

    zorps: dict[float, float]
    """How many pictures that should show a zorp do, by the LoRA's strength."""
    right: float
    """How many of those are right in place and background, too, at full strength."""
    others: dict[float, float]
    """How many other pictures are all right, by strength."""
    change: dict[float, float]
    """How far pictures that should show a zorp are from those without the LoRA, by strength: mean of 0 to 255."""
    is_off_at_zero: bool
    """Whether strength 0 gives the very pictures that the model paints without the LoRA."""

    def failures(self, slack: float = 0.0) -> Iterator[str]:
        """What is not as it should be; `slack` is a share of pictures to be lenient by, where there are few of them."""
        if self.zorps[1.0] < LEARNED - slack:
            yield f"zorps are painted too seldom ({self.zorps[1.0]:.1%})"
        if self.zorps[0.0] >= UNKNOWN:
            yield f"zorps are painted without the LoRA ({self.zorps[0.0]:.1%})"
        if self.others[1.0] < self.others[0.0] - FORGOTTEN - slack:
            yield f"other things are forgotten ({self.others[0.0]:.1%} before, {self.others[1.0]:.1%} now)"
        if not (self.zorps[0.0] <= self.zorps[0.5] <= self.zorps[1.0] and 0 < self.change[0.5] < self.change[1.0]):
            yield "half the strength does not lie between none and all"
        if not self.is_off_at_zero:
            yield "strength 0 is not off"

    def __str__(self) -> str:
        lines = ["strength  zorps    other prompts  change"]
        for strength, share in self.zorps.items():
            others = f"{self.others[strength]:6.1%}" if strength in self.others else "     –"
            lines.append(f"{strength:<8}  {share:6.1%}   {others}         {self.change[strength]:.1f}")
        return "\n".join([*lines, f"zorps with place and background right: {self.right:.1%}"])


@define
class Examiner:
    """Paints the same prompts with each LoRA that it is given, and compares with the model's own pictures."""

    folder: Path = MODEL
    count: int = 100
    """How many prompts about zorps, and how many about other things."""
    seed: int = 0
    steps: int = 20
    _pipeline: Any = field(init=False)
    _own: dict[str, Pictures] = field(init=False)
    """What the model paints without a LoRA, by subject."""

    def __attrs_post_init__(self) -> None:
        self._pipeline = load_pipeline(self.folder)
        self._own = {subject: self._painted(subject) for subject in SUBJECTS}

    def examine(self, lora: Path) -> Report:
        """What the LoRA in a file has learned; leaves the model as it was."""
        self._pipeline.load_lora_weights(lora.parent, weight_name=lora.name, adapter_name="lora")
        try:
            by_strength = {0.0: self._own[NAME]}
            for strength in (0.5, 1.0):
                self._pipeline.set_adapters("lora", strength)
                by_strength[strength] = self._painted(NAME)
            others = {0.0: self._own["world"], 1.0: self._painted("world")}
            self._pipeline.set_adapters("lora", 0.0)
            off = self._painted(NAME)
        finally:
            self._pipeline.unload_lora_weights()
        zorps = {strength: self._score(NAME, pictures) for strength, pictures in by_strength.items()}
        return Report(
            zorps={strength: own.share("colour", "shape") for strength, own in zorps.items()},
            right=zorps[1.0].share("right"),
            others={strength: self._score("world", own).share("right") for strength, own in others.items()},
            change={strength: _distance(own, by_strength[0.0]) for strength, own in by_strength.items()},
            is_off_at_zero=np.array_equal(off, self._own[NAME]),
        )

    def _painted(self, subject: str) -> Pictures:
        _, prompts = SUBJECTS[subject].prompts(self.count, self.seed)
        return paint(self._pipeline, prompts, self.seed, self.steps)

    def _score(self, subject: str, pictures: Pictures) -> Score:
        scenes, _ = SUBJECTS[subject].prompts(self.count, self.seed)
        return SUBJECTS[subject].judged(pictures, scenes)


def _distance(some: Pictures, others: Pictures) -> float:
    return float(np.abs(np.stack(some).astype(np.float32) - np.stack(others)).mean())


def main() -> None:
    """Print the report on a LoRA, and what it fails in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=_FILE, help="the LoRA")
    parser.add_argument("--folder", type=Path, default=MODEL, help="the model, a diffusers folder")
    parser.add_argument("--count", type=int, default=100, help="how many prompts about zorps, and about other things")
    options = parser.parse_args()
    report = Examiner(options.folder, options.count).examine(options.file)
    print(report)
    sys.exit("; ".join(report.failures()) or 0)


if __name__ == "__main__":
    main()
