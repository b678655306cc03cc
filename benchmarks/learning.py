"""Whether LoRAs learn what they should, and nothing else: the quick start, trained in every way.

    python benchmarks/learning.py                    # each optimizer, AdamW in every way: an hour on two cores
    python benchmarks/learning.py adamw lion         # some optimizers, the first of them in every way
    python benchmarks/learning.py --all              # every optimizer in every way: hours

Each run is `lorakit train examples/quickstart/config.toml` with another network, optimizer, precision or choice of
parts, in a process of its own; `examples/tiny-sd/examine.py` examines its file. Reports are kept in the work folder, so
a run that was broken off goes on where it was. Prints a table, and ends with status 1 if a LoRA failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import product, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from attrs import asdict, frozen

ROOT = Path(__file__).parents[1]
SMALLER_MODEL = 20
"""How many times the learning rate of a full-size model the small one takes. Its layers are narrower."""
RATES = {"adamw": 1e-4, "adamw8bit": 1e-4, "adafactor": 1e-4}
"""What `docs/how-to/optimizers.md` recommends for a full-size model. Paged optimizers are the same on a CPU."""
OWN_RATES = {
    "lion": 1e-4, "lion8bit": 1e-4,
    "dadaptation": 0.25, "dadaptadagrad": 20.0, "dadaptadam": 0.25, "dadaptadan": 0.25, "dadaptadanip": 0.25,
    "dadaptlion": 0.5, "dadaptsgd": 1.8, "sgdnesterov": 2.0, "sgdnesterov8bit": 2.0,
}  # fmt: skip
"""Learning rates of optimizers whose steps have another size: Lion's, plain descent's, and those that find the rest."""
STEPS = 1500
TIMES_THE_STEPS = {
    "sgdnesterov": 2.0,
    "sgdnesterov8bit": 2.0,
    "dadaptsgd": 2.0,
    "dadaptadagrad": 2.5,
    "lierla, U-Net": 2.0,
    "c3lier, U-Net": 5 / 6,
}
"""What takes longer: plain descent, and LierLa on the U-Net alone, as the name means nothing to the text encoder.
C3Lier is faster there, and with more steps forgets more."""
TIMES_THE_RATE = {"c3lier, U-Net": 0.75}
SETTINGS = {"c3lier, U-Net": ("data.prior_loss_weight=2.0", "loss.min_snr_gamma=5.0")}
"""What else keeps C3Lier on the U-Net alone from forgetting more than it may."""
GROWTH = 1.03
"""By what factor the estimates of D-Adaptation may grow at a step: in one leap they grow too large here."""
PARTS = {"U-Net and text encoder": ["unet", "text_encoder"], "U-Net": ["unet"]}
WAYS = tuple(product(("lierla", "c3lier"), ("no", "bf16"), PARTS))
"""Networks, precisions and parts; the quick start's first."""


@frozen
class Lesson:
    """One way to train the quick start."""

    optimizer: str
    network: str
    precision: str
    parts: str

    @property
    def name(self) -> str:
        """A name for files."""
        return "-".join([self.optimizer, self.network, self.precision, *PARTS[self.parts]])

    @property
    def way(self) -> str:
        """What is trained, as the tables above name it."""
        return f"{self.network}, {self.parts}"

    @property
    def rate(self) -> float:
        """The learning rate."""
        own = OWN_RATES.get(self.optimizer) or RATES[self.optimizer] * SMALLER_MODEL
        return own * TIMES_THE_RATE.get(self.way, 1.0)

    @property
    def steps(self) -> int:
        """How long to train."""
        times = [TIMES_THE_STEPS[what] for what in (self.optimizer, self.way) if what in TIMES_THE_STEPS]
        return round(STEPS * max(times, default=1.0))

    def settings(self, folder: Path) -> Iterator[str]:
        """What differs from the quick start's config, as `--set` takes it."""
        yield f"network.name={self.network}"
        yield f"network.parts={json.dumps(PARTS[self.parts])}"
        yield f"optimizer.name={self.optimizer}"
        yield f"optimizer.lr={self.rate}"
        if self.optimizer.startswith("dadapt") and self.optimizer != "dadaptlion":
            yield f"optimizer.growth_rate={GROWTH}"
        yield from SETTINGS.get(self.way, ())
        yield f"training.mixed_precision={self.precision}"
        yield f"training.max_steps={self.steps}"
        yield f"output.dir={folder / self.name}"
        yield f"data.cache_dir={folder / f'cache-{self.precision}'}"
        yield "observers=[]"


@frozen
class Outcome:
    """What `examine.py` found."""

    zorps: list[float]
    """Share of zorps where they were asked for, at strengths 0, 0.5 and 1."""
    right: float
    """Share of those that are right in place and background, too, at strength 1."""
    others: list[float]
    """Share of other pictures that are all right, at strengths 0 and 1."""
    failures: list[str]


def learned(lesson: Lesson, folder: Path, count: int) -> Outcome:
    """Train and examine, unless that was done before; a run that fails has learned nothing."""
    report = folder / f"{lesson.name}.json"
    if not report.exists():
        settings = [word for setting in lesson.settings(folder) for word in ("--set", setting)]
        config = ROOT / "examples" / "quickstart" / "config.toml"
        command = [sys.executable, "-m", "lorakit", "train", config, *settings]
        trained = subprocess.run(command, capture_output=True, text=True, check=False)
        if trained.returncode:
            return Outcome([], 0.0, [], [trained.stderr.strip().splitlines()[-1]])
        found = examined(folder / lesson.name / "zorp.safetensors", count)
        report.write_text(json.dumps(asdict(found)))
    return Outcome(**json.loads(report.read_text()))


def examined(file: Path, count: int) -> Outcome:
    """What a LoRA has learned."""
    report = _examiner(count).examine(file)
    return Outcome(
        zorps=list(report.shown.values()),
        right=report.right,
        others=list(report.others.values()),
        failures=list(report.failures()),
    )


@cache
def _examiner(count: int) -> Any:
    """Kept, because it has painted what the model paints without a LoRA."""
    sys.path.insert(0, str(ROOT / "examples" / "tiny-sd"))
    from examine import Examiner

    return Examiner(count=count)


def table(lessons: Iterable[Lesson], outcomes: Iterable[Outcome]) -> Iterator[str]:
    """The outcomes in Markdown."""
    columns = ["optimizer", "learning rate", "steps", "network", "precision", "trained"]
    columns += ["zorps at 0, 0.5, 1", "others before, after", ""]
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for lesson, outcome in zip(lessons, outcomes, strict=True):
        precision = "float32" if lesson.precision == "no" else lesson.precision
        cells = [f"`{lesson.optimizer}`", f"{lesson.rate:g}", str(lesson.steps)]
        cells += [f"`{lesson.network}`", precision, lesson.parts]
        cells += [", ".join(f"{share:.0%}" for share in shares) for shares in (outcome.zorps, outcome.others)]
        yield "| " + " | ".join([*cells, "; ".join(outcome.failures) or "passed"]) + " |"


def main() -> None:
    """Train, examine and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("optimizers", nargs="*", choices=[*RATES, *OWN_RATES, []], help="which; all without any")
    parser.add_argument("--all", action="store_true", help="train with every optimizer in every way")
    parser.add_argument("--count", type=int, default=100, help="how many prompts of each kind to examine with")
    parser.add_argument("--jobs", type=int, default=2, help="how many to train at once")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lorakit-learning")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    names = options.optimizers or [*RATES, *OWN_RATES]
    lessons = [Lesson(name, *way) for name in names for way in (WAYS if options.all or name == names[0] else WAYS[:1])]
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        outcomes = list(pool.map(learned, lessons, repeat(options.work), repeat(options.count)))
    print("\n".join(table(lessons, outcomes)))
    sys.exit(int(any(outcome.failures for outcome in outcomes)))


if __name__ == "__main__":
    main()
