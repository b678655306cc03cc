"""What a busy CPU costs a run, by how long OpenMP's threads spin before they sleep.

    python benchmarks/busy_cpu.py                     # a small model, at rest and with one busy process for each core
    python benchmarks/busy_cpu.py --rounds 5 --seconds 20
    python benchmarks/busy_cpu.py --config my.toml    # any other run

libgomp, which PyTorch computes with on Linux, lets threads that wait for each other spin 300 000 times first. While a
thread spins, the one that it waits for may not have a core. `libgomp` is that, `lorakit` is the 1000 that lorakit sets
(`GOMP_SPINCOUNT`), `passive` does not spin at all (`OMP_WAIT_POLICY=PASSIVE`).

Each measurement is a run in a process of its own; the ways are interleaved, and the medians of the rounds are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

WAYS = {"libgomp": {"GOMP_SPINCOUNT": "300000"}, "lorakit": {}, "passive": {"OMP_WAIT_POLICY": "PASSIVE"}}
OWN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart" / "config.toml"
PATIENCE = 6
"""How many times as long as it measures a run may take in all; what it has not begun by then counts as no step."""


def main() -> None:
    """Measure all ways and print the table, or measure one and print its steps per second."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=QUICKSTART, help="of the run")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long each measurement takes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(steps_per_second(arguments.config, arguments.seconds)))
        return
    found: dict[tuple[str, bool], list[float]] = {(way, busy): [] for busy in (False, True) for way in WAYS}
    for number in range(arguments.rounds):
        for (way, busy), rates in found.items():
            with processor_busy(busy):
                rate = measured(way, arguments.config, arguments.seconds)
            rates.append(rate)
            print(f"round {number + 1}, {way}, {'busy' if busy else 'at rest'}: {rate:.3g} steps/s", file=sys.stderr)
    rest = statistics.median(found["libgomp", False])
    print("| threads wait as | steps/s at rest | ÷ libgomp at rest | steps/s while busy | ÷ libgomp at rest |")
    print("|---|---|---|---|---|")
    for way in WAYS:
        idle, busy = (statistics.median(found[way, load]) for load in (False, True))
        print(f"| {way} | {idle:.3g} | {idle / rest:.2f} | {busy:.3g} | {busy / rest:.2f} |")


@contextmanager
def processor_busy(busy: bool) -> Iterator[None]:
    """Keep each core busy with a process that computes and never waits."""
    count = os.cpu_count() or 1
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count if busy else 0)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measured(way: str, config: Path, seconds: float) -> float:
    """Steps per second of a run whose threads wait in this way."""
    environment = {name: value for name, value in os.environ.items() if name not in OWN} | WAYS[way]
    command = [sys.executable, __file__, "--measure", "--config", str(config), "--seconds", str(seconds)]
    try:
        result = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, timeout=PATIENCE * seconds + 300, check=True
        )
    except subprocess.TimeoutExpired:
        return 0.0
    return float(json.loads(result.stdout.splitlines()[-1]))


def steps_per_second(config: Path, seconds: float) -> float:
    """Steps per second of a run in this process, after its first step."""
    import lorakit
    from lorakit.api.observer import Observer
    from lorakit.errors import Interrupted

    stop = threading.Event()

    class Clock(Observer):
        """Counts steps, and stops the run when its time is over."""

        begun = 0.0
        rate = 0.0

        def step_finished(self, step: int) -> None:
            if step == 1:
                self.begun = time.perf_counter()
                return
            elapsed = time.perf_counter() - self.begun
            self.rate = (step - 1) / elapsed
            if elapsed > seconds:
                stop.set()

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        changes = [f"output.dir={folder}", "training.max_steps=1000000", "training.device=cpu", "observers=[]"]
        with suppress(Interrupted):
            lorakit.train(config, overrides=changes, observers=[clock], stop=stop)
    return clock.rate


if __name__ == "__main__":
    main()
