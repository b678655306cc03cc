"""The observer `wandb` keeps its contract, and its log holds what happened in the run."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit_wandb.observer import WandbConfig
from PIL import Image
from wandb.proto.wandb_internal_pb2 import Record

import lorakit
from lorakit.api import RunInfo
from lorakit.testing.contracts import ObserverContract
from lorakit.testing.runs import train_config


class TestWandb(ObserverContract):
    """The observer `wandb`."""

    config = WandbConfig(project="test", tags=("one", "two"))

    def test_previews_and_validation(self, run_info: RunInfo, tmp_path: Path) -> None:
        """Pictures and validation losses are logged at their step, also when it is behind one that was logged."""
        picture = tmp_path / "cat.png"
        Image.new("RGB", (8, 8), "teal").save(picture)
        observer = self.config.build(run_info)
        observer.run_started(run_info)
        observer.validated(2, {"average": 0.5})
        observer.previews_drawn(1, [picture])
        observer.closed()
        records = complete_log(run_info.config.output.dir)
        validated, drawn = history(records)
        assert (validated["step"], validated["validation/average"]) == (2, 0.5)
        assert (drawn["step"], drawn["previews/captions"]) == (1, ["cat"])
        assert len(list(run_info.config.output.dir.glob("wandb/offline-run-*/files/media/images/previews*.png"))) == 1
        assert [record.exit.exit_code for record in records if record.HasField("exit")] == [1]


def test_log_of_a_run(train_tables: dict[str, Any], tmp_path: Path) -> None:
    """The log has the run's names, its config without folders, every step's numbers, and that it ended well."""
    observer = {"name": "wandb", "project": "cats", "run_name": "rank 4", "tags": ["a"], "dir": "logs", "notes": "n"}
    lorakit.train(train_config({**train_tables, "observers": [observer]}, tmp_path))
    records = complete_log(tmp_path / "logs")
    (run,) = [record.run for record in records if record.HasField("run")]
    assert (run.project, run.display_name, list(run.tags), run.notes) == ("cats", "rank 4", ["a"], "n")
    config = {update.key: update.value_json for update in run.config.update}
    assert json.loads(config["output"])["dir"] == "out"
    assert str(tmp_path) not in "".join(config.values())
    steps = history(records)
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert all(0 < step["loss"] < 10 and step["gradient_norm"] > 0 for step in steps)
    assert {"lr/unet", "lr/text_encoder"} <= steps[0].keys()
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [0]


def complete_log(folder: Path) -> list[Record]:
    """The records of the one log in a folder, once the process of wandb has written the last one."""
    deadline = time.monotonic() + 60
    while True:
        records = list(records_of(folder))
        if any(record.HasField("exit") for record in records):
            return records
        assert time.monotonic() < deadline, "the log has no end"
        time.sleep(0.1)


def records_of(folder: Path) -> Iterator[Record]:
    """The records of the one log in a folder.

    Behind seven bytes there are blocks of 32 KiB with parts of records, each behind its checksum, its length and what
    it is: 1 all of a record, 2 the first part, 3 one in between, 4 the last; what is left of a block is zeros.
    """
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    content, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        left = 0x8000 - position % 0x8000
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        if position + 7 + length > len(content):  # still being written
            return
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


def history(records: list[Record]) -> list[dict[str, Any]]:
    """What was logged, entry by entry."""
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
