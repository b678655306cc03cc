"""What every saver must do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from lorakit.api.components import SaverConfig
from lorakit.errors import AdapterError, OutputError
from lorakit.networks.adapter_file import AdapterFile, Precision
from lorakit.testing.contracts.component import ComponentContract

DTYPES: Mapping[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
METADATA: Mapping[str, str] = {"ss_network_dim": "4", "ss_training_comment": "naïve “quotes” ✓", "modelspec.title": "a"}


class SaverContract(ComponentContract):
    """What every saver must do.

        class TestNumpyZip(SaverContract):
            config = NumpyZipConfig()
            keeps_metadata = False

    It is given the tensors of a small network, and a disk that is full.
    """

    config: SaverConfig
    keeps_metadata = True
    """Whether the format holds metadata."""

    def test_suffix(self) -> None:
        """Files of the format have a suffix with its dot, whatever the precision."""
        suffixes = {attrs.evolve(self.config, precision=precision).build().suffix for precision in DTYPES}
        assert len(suffixes) == 1
        suffix = suffixes.pop()
        assert Path(f"lora{suffix}").suffix == suffix != ""

    @pytest.mark.parametrize("precision", DTYPES)
    def test_reads_what_it_wrote(self, precision: Precision) -> None:
        """Every tensor comes back with its key and shape, its numbers rounded to the precision and no further."""
        saver = attrs.evolve(self.config, precision=precision).build()
        written = adapter()
        path = Path(f"lora{saver.suffix}")
        saver.save(written, path)
        read = saver.load(path).tensors
        assert read.keys() == written.tensors.keys()
        for key, tensor in written.tensors.items():
            assert read[key].dtype == DTYPES[precision]
            assert torch.equal(read[key], tensor.to(DTYPES[precision]))
        assert [found.name for found in Path().iterdir()] == [path.name], "other files were left behind"

    def test_keeps_metadata(self) -> None:
        """The metadata comes back, letter by letter, where the format holds any."""
        saver, path = self.config.build(), self.path
        saver.save(adapter(), path)
        found = saver.load(path).metadata
        assert METADATA.items() <= found.items() if self.keeps_metadata else not found

    def test_replaces_an_older_file(self) -> None:
        """A file of the same name is replaced as a whole."""
        saver, path = self.config.build(), self.path
        saver.save(adapter(), path)
        newer = AdapterFile({"lora_unet_out.alpha": torch.tensor(2.0)})
        saver.save(newer, path)
        assert saver.load(path).tensors == newer.tensors

    def test_a_failing_write_leaves_no_file(self) -> None:
        """When the disk takes no more halfway through, nothing is left behind."""
        with _small_disk(), pytest.raises(OutputError, match=self.path.name):
            self.config.build().save(adapter(), self.path)
        assert not list(Path().iterdir())

    def test_a_failing_write_keeps_the_older_file(self) -> None:
        """When the disk takes no more halfway through, the file that was there is as it was."""
        saver, path = self.config.build(), self.path
        saver.save(adapter(), path)
        before = path.read_bytes()
        with _small_disk(), pytest.raises(OutputError):
            saver.save(adapter(seed=1), path)
        assert path.read_bytes() == before
        assert [found.name for found in Path().iterdir()] == [path.name]

    def test_says_what_is_missing(self) -> None:
        """A file that is not there is an `AdapterError` that names it."""
        with pytest.raises(AdapterError, match=self.path.name):
            self.config.build().load(self.path)

    def test_says_what_is_broken(self) -> None:
        """A file that was cut short is an `AdapterError` that names it."""
        saver, path = self.config.build(), self.path
        saver.save(adapter(), path)
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(AdapterError, match=path.name):
            saver.load(path)

    @property
    def path(self) -> Path:
        """A file name of the format, in the folder of the test."""
        return Path(f"lora{self.config.build().suffix}")


def adapter(seed: int = 0) -> AdapterFile:
    """What a small network hands over: linear and convolutional factors, and alphas that are single numbers."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"down.weight": (4, 320), "up.weight": (320, 4, 1, 1)}
    tensors: dict[str, Any] = {}
    for layer in ("lora_unet_mid_block_proj_in", "lora_te_text_model_layers_0_q_proj"):
        for suffix, shape in shapes.items():
            tensors[f"{layer}.lora_{suffix}"] = torch.randn(shape, generator=generator)
        tensors[f"{layer}.alpha"] = torch.tensor(1.5)
    return AdapterFile(tensors, METADATA)


@contextmanager
def _small_disk() -> Iterator[None]:
    """Files cannot grow beyond 8 KiB while inside, as on a disk that is about full."""
    resource = pytest.importorskip("resource", reason="this system has no limit on the size of files")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
