"""A LoRA file on a base model, without training: attached at any strength, and taken off again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from lorakit.api.components import NetworkConfig
from lorakit.checkpoints import summarize
from lorakit.checkpoints.kinds import adapter_kind
from lorakit.checkpoints.lora_names import MAGNITUDE
from lorakit.config.train_config import TrainConfig
from lorakit.errors import AdapterError, ModelError
from lorakit.models.interfaces import DiffusionModel
from lorakit.networks.adapter_file import load_initial_weights
from lorakit.networks.network import Network
from lorakit.networks.ranked_config import RankedConfig
from lorakit.plugins.catalog import Catalog


def require_fit(file: Path, config: TrainConfig) -> None:
    """An AdapterError unless a file is a LoRA or DoRA for the kind of base model that `config` names."""
    try:
        kind, title = adapter_kind(summarize(file)), config.model.adapter_title
    except ModelError as error:
        raise AdapterError(f"{error}.") from error
    if kind.algorithm not in ("LoRA", "DoRA") or not kind.fits(title):
        raise AdapterError(f"{file} is {kind.description}; give a LoRA or DoRA for {title or 'the base model'}.")


@contextmanager
def attached(model: DiffusionModel, file: Path, config: TrainConfig) -> Iterator[Network]:
    """The network of a LoRA file on a model while the block lasts; its `multiplier` is the strength.

    `config` names the base model. Raises AdapterError where the file is not for it.
    """
    targets = model.targets([part.name for part in config.model.parts])
    tensors = load_initial_weights(file, targets)
    network = _config_of(tensors).build_like(tensors, targets)
    try:
        network.load_adapter_state(tensors, str(file))
        yield network.eval().requires_grad_(False)
    finally:
        network.detach()


def adapts_text(network: Network, config: TrainConfig) -> bool:
    """Whether a network changes how texts are encoded."""
    encoders = {part.name for part in config.model.parts if part.encoders}
    return any(part in encoders for part in network.parts)


def _config_of(tensors: Mapping[str, Tensor]) -> RankedConfig:
    """A config of networks that any LoRA or DoRA file fits."""
    kind = Catalog.discover().find(NetworkConfig, "c3lier")
    dora = any(name.endswith(f".{MAGNITUDE}") for name in tensors)
    config: RankedConfig = kind(rank_from_weights=True, dora=dora)  # type: ignore[assignment, call-arg]
    return config
