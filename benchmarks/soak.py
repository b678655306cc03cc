"""Whether a long run stays as it began: memory, open files and speed over 20 000 steps.

    python benchmarks/soak.py                        # 20 000 steps of a tiny model: twelve minutes of one core
    python benchmarks/soak.py --steps 2000 --plot soak.svg

The run is `lorakit train` in a process of its own, with saves, states, previews, validation and logs on the way. Each
time it tells of its progress, what the system says of its process is noted. Speed is steps per CPU second, relative to
a reference workload timed at the same moments: other programs and virtual machines on the same cores slow down both.

A line is fitted to each curve, without its first fifth, in which caches fill. The run has failed if along that line
memory grows by more than 3 %, open files by more than one, or speed falls by more than a tenth. What is noted goes into
`soak.jsonl` in the work folder at once, and at the end the plot is drawn; ends with status 1 if the run has failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from attrs import asdict, frozen

MEBIBYTE = 2**20


@frozen
class Sample:
    """What the system says of the run at a moment."""

    step: int
    seconds: float
    """Since the start."""
    computed: float
    """Seconds of all cores."""
    memory: float
    """Resident memory in MiB."""
    files: int
    """Open file descriptors."""
    reference: float
    """CPU seconds of the reference workload at this moment."""


@frozen
class Curve:
    """One quantity over the run, and how far it may go in the wrong direction."""

    title: str
    steps: Sequence[float]
    values: Sequence[float]
    allowed: float
    """Change along the fitted line: growth if positive, fall if negative."""

    @property
    def line(self) -> tuple[float, float]:
        """The fitted line's values at the first and the last of the samples that count."""
        skipped = len(self.steps) // 5
        steps, values = np.asarray(self.steps[skipped:]), np.asarray(self.values[skipped:])
        slope, height = np.polyfit(steps, values, 1)
        return float(height + slope * steps[0]), float(height + slope * steps[-1])

    @property
    def change(self) -> float:
        """How much the fitted line rises."""
        first, last = self.line
        return last - first

    @property
    def is_flat(self) -> bool:
        """Whether the change is within what is allowed."""
        return self.change <= self.allowed if self.allowed > 0 else self.change >= self.allowed


def main() -> None:
    """Run, write what was noted, draw it, and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lorakit-soak")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--plot", type=Path, help="where to draw the curves; soak.svg in the work folder when absent")
    arguments = parser.parse_args()
    samples: list[Sample] = []
    path = config(arguments.work, arguments.steps)
    with (arguments.work / "soak.jsonl").open("w") as notes:
        for noted in watch(path, arguments.work):
            samples.append(noted)
            print(json.dumps(asdict(noted)), file=notes, flush=True)
    found = curves(samples)
    (arguments.plot or arguments.work / "soak.svg").write_text("\n".join(drawing(found)))
    print(*table(found), sep="\n")
    sys.exit(0 if all(curve.is_flat for curve in found) else 1)


def config(work: Path, steps: int) -> Path:
    """A config file for the run, with a new output folder, and the model and images it needs."""
    from make_images import make_images

    from lorakit.testing.models import make_tiny_sd1

    if not (work / "model" / "model_index.json").exists():
        make_tiny_sd1(work / "model")
    make_images(work / "images", 8, sides=(64, 96))
    (work / "prompts.txt").write_text("a part of a photograph --w 64 --h 64 --s 4\n")
    path = work / "config.toml"
    path.write_text(f"""
model = {{ path = "model" }}
data = {{ image_dir = "images", resolution = 64, shuffle_caption = true, validation_split = 0.25 }}
network = {{ name = "lierla", rank = 4, parts = ["unet"], dropout = 0.1 }}
optimizer = {{ name = "adamw", lr = 1e-4 }}
lr_scheduler = {{ name = "cosine" }}
training = {{ max_steps = {steps}, device = "cpu" }}
saver = {{ name = "safetensors" }}
[output]
dir = "{time.strftime("out-%Y%m%d-%H%M%S")}"
save_every_n_steps = 50
keep_last = 3
save_state = true
[[observers]]
name = "tensorboard"
dir = "logs"
[[observers]]
name = "samples"
prompts = "prompts.txt"
every_n_steps = 100
[[observers]]
name = "validation"
every_n_steps = 100
""")
    return path


def watch(path: Path, work: Path) -> Iterator[Sample]:
    """Run a config, and note the process each time it has told of its progress.

    Raises RuntimeError when it does not end well.
    """
    log, started, last = work / "soak.log", time.monotonic(), 0
    with log.open("wb") as file:
        command = [sys.executable, "-m", "lorakit", "train", str(path)]
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        while process.poll() is None:
            time.sleep(0.5)
            step = progress(log)
            if step > last:
                last = step
                try:
                    yield sample(process.pid, step, time.monotonic() - started)
                except OSError:  # it has just ended
                    continue
    finally:
        process.kill()
    if process.wait() != 0:
        raise RuntimeError(f"the run failed; see {log}")
    if not last:
        raise RuntimeError(f"no step was found in {log}")


def progress(log: Path) -> int:
    """The last step that a log names as reached."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        steps = re.findall(rb" step (\d+)/\d+ ", file.read())
    return int(steps[-1]) if steps else 0


def sample(pid: int, step: int, seconds: float) -> Sample:
    """What the system says of a process. Raises OSError when it is gone."""
    process = Path(f"/proc/{pid}")
    fields = (process / "stat").read_text().rpartition(")")[2].split()
    computed = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    pages = int((process / "statm").read_text().split()[1])
    memory = pages * os.sysconf("SC_PAGE_SIZE") / MEBIBYTE
    return Sample(step, seconds, computed, memory, len(list((process / "fd").iterdir())), reference_time())


def reference_time() -> float:
    """CPU seconds of a reference workload, many small matrix products as in a step of a tiny model; the median of 9."""
    matrix, times = np.full((64, 64), 1 / 64), []
    for _ in range(9):
        started = time.process_time()
        for _ in range(1000):
            matrix = matrix @ matrix
        times.append(time.process_time() - started)
    return float(np.median(times))


def curves(samples: Sequence[Sample]) -> list[Curve]:
    """Memory, open files and speed over the steps."""
    steps = [sample.step for sample in samples]
    memory = [sample.memory for sample in samples]
    reference = np.array([sample.reference for sample in samples])
    slowness = (reference[:-1] + reference[1:]) / 2 / np.median(reference)
    speed = (np.diff(steps) / np.diff([sample.computed for sample in samples]) * slowness).tolist()
    return [
        Curve("memory, MiB", steps, memory, 0.03 * float(np.median(memory))),
        Curve("open files", steps, [sample.files for sample in samples], 1.0),
        Curve("steps per second computed", steps[1:], speed, -0.1 * float(np.median(speed))),
    ]


def table(found: Sequence[Curve]) -> Iterator[str]:
    """The curves in Markdown."""
    yield f"| over {found[0].steps[-1]} steps | least | most | fitted line | |"
    yield "|---|---|---|---|---|"
    for curve in found:
        first, last = curve.line
        verdict = "flat" if curve.is_flat else "**not flat**"
        values = f"{min(curve.values):.1f} | {max(curve.values):.1f} | {first:.1f} → {last:.1f}"
        yield f"| {curve.title} | {values} | {verdict} |"


def drawing(found: Sequence[Curve], width: int = 720, height: int = 150) -> Iterator[str]:
    """The curves as an SVG picture, one below the other, each from 0 on."""
    margin, gap = 70, 50
    total = len(found) * (height + gap) + 20
    font = 'font-family="sans-serif" font-size="13"'
    yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {total}" {font}>'
    yield f'<rect width="{width}" height="{total}" fill="white"/>'
    for index, curve in enumerate(found):
        top, most, last = 30 + index * (height + gap), 1.15 * max(curve.values), curve.steps[-1]

        def place(step: float, value: float, top: int = top, most: float = most, last: float = last) -> str:
            right = margin + step / last * (width - margin - 20)
            return f"{right:.1f},{top + height - value / most * height:.1f}"

        yield f'<text x="{margin}" y="{top - 8}" font-weight="bold">{curve.title}</text>'
        yield from axes(place, most / 1.15, last)
        points = " ".join(place(*point) for point in zip(curve.steps, curve.values, strict=True))
        yield f'<polyline points="{points}" fill="none" stroke="#2563a8" stroke-width="1.5"/>'
        first, end = curve.line
        start = curve.steps[len(curve.steps) // 5]
        line = f"{place(start, first)} {place(last, end)}"
        yield f'<polyline points="{line}" fill="none" stroke="#c2410c" stroke-dasharray="6 4"/>'
    yield "</svg>"


def axes(place: Callable[[float, float], str], most: float, last: float) -> Iterator[str]:
    """The axes of one curve, with the largest value and the last step."""
    yield f'<polyline points="{place(0, most * 1.15)} {place(0, 0)} {place(last, 0)}" fill="none" stroke="black"/>'
    for step, value, anchor, shift in ((0, most, "end", -6), (0, 0, "end", -6)):
        right, down = place(step, value).split(",")
        yield f'<text x="{float(right) + shift}" y="{float(down) + 4}" text-anchor="{anchor}">{value:.0f}</text>'
    right, down = place(last, 0).split(",")
    yield f'<text x="{right}" y="{float(down) + 16}" text-anchor="end">step {last:.0f}</text>'


if __name__ == "__main__":
    main()
