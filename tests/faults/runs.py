"""Small runs to kill: their configs, what is left of them, and what must be true of that."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomlkit
from attrs import evolve, field, frozen
from PIL import Image
from safetensors.torch import load

from tests.faults.commands import Attempt, SmallDisk, start_forked, start_plain
from tests.faults.injection import Fault

Tables = dict[str, dict[str, Any]]


@frozen
class SmallRun:
    """A run of a few steps, to be started and resumed in a folder of its own."""

    folder: Path
    tables: Tables
    plain: bool = False
    """Started as `python -m lorakit`, not forked."""

    @property
    def output(self) -> Path:
        """The output folder."""
        return self.folder / "out"

    @property
    def final(self) -> Path:
        """The file at the end."""
        return self.output / "test.safetensors"

    def beside(self, name: str, **changes: Mapping[str, Any]) -> SmallRun:
        """The run with other tables, and a folder beside this one's."""
        tables = {**self.tables, **{key: {**self.tables.get(key, {}), **value} for key, value in changes.items()}}
        return evolve(self, folder=self.folder.parent / name, tables=tables)

    def states(self) -> list[Path]:
        """The folders of states under their final names, oldest first."""
        return sorted(self.output.glob("test-state/step*"))

    def start(
        self, *overrides: str, faults: Sequence[Fault] = (), disk: SmallDisk | None = None, resume: bool = True
    ) -> Attempt:
        """Start the run, or go on with it where it has left a state."""
        self.folder.mkdir(exist_ok=True)
        config = self.folder / "config.toml"
        config.write_text(tomlkit.dumps({**self.tables, "output": {**self.tables["output"], "dir": str(self.output)}}))
        arguments = ["train", config, *(part for own in overrides for part in ("--set", own))]
        arguments += ["--resume"] if resume and self.states() else []
        return start_plain(arguments, self.folder) if self.plain else start_forked(arguments, self.folder, faults, disk)

    def finish(self, *overrides: str, faults: Sequence[Fault] = ()) -> Attempt:
        """Run to the end, which must be a good one."""
        attempt = self.start(*overrides, faults=faults)
        status = attempt.wait()
        assert status == 0, attempt.said
        assert "Traceback" not in attempt.said
        self.check_files()
        return attempt

    def check_files(self) -> None:
        """Every file under a final name is whole: adapters, states, pictures, configs, and the cache."""
        check_folder(self.output)
        check_folder(Path(self.tables["data"]["cache_dir"]))


@frozen
class Reference:
    """The run that nothing disturbed."""

    weights: bytes
    startup: float
    """Seconds that it computed until its first save."""
    rest: float
    """Seconds that it computed after that."""
    operations: list[str] = field(repr=False)
    """Its operations on files."""

    @classmethod
    def of(cls, run: SmallRun) -> Reference:
        """What a run gives."""
        attempt, last = run.start(), [0.0, 0.0]

        def measured() -> bool:
            seconds = attempt.cpu_seconds
            if seconds != float("inf"):
                last[1] = seconds
            if not last[0] and attempt.has_saved:
                last[0] = last[1]
            return False

        attempt.until(measured)
        assert attempt.poll() == 0, attempt.said
        run.check_files()
        operations = attempt.operations.read_text().splitlines() if attempt.operations.exists() else []
        return cls(weights_of(run.final), last[0], last[1] - last[0], operations)


def weights_of(path: Path) -> bytes:
    """The bytes of a file's tensors, with their names and places; not its metadata, which hold times."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__")
    return json.dumps(header, sort_keys=True).encode() + content[start:]


def check_folder(folder: Path) -> None:
    """Every file in a folder can be read, but for hidden ones, which are those that writing has begun."""
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.parent.name.endswith("-state"):
            names = {own.name for own in path.iterdir()}
            assert {"network.safetensors", "optimizer.safetensors", "state.json"} <= names, (path, names)
        elif path.is_file():
            _check_file(path)


def _check_file(path: Path) -> None:
    try:
        match path.suffix:
            case ".safetensors":
                assert load(path.read_bytes()) or path.name == "optimizer.safetensors"
            case ".png":
                with Image.open(path) as image:
                    image.load()
            case ".toml":
                assert tomlkit.parse(path.read_text())
            case ".json":
                assert json.loads(path.read_text())
    except Exception as error:
        raise AssertionError(f"{path} is broken: {error}") from error
