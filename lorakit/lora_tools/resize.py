"""Resizing a LoRA file: the best approximation of each layer's update at a lower rank."""

from __future__ import annotations

from torch import Tensor

from lorakit.checkpoints.lora_names import MAGNITUDE
from lorakit.errors import AdapterError
from lorakit.lora_tools.adapters import LORA_PARTS, Adapter, AnyPath, LoRAFile, open_lora
from lorakit.lora_tools.low_rank import Decomposition, decompose, decompose_product, fixed_rank, rank_by_energy
from lorakit.lora_tools.merge import save
from lorakit.lora_tools.output import LayerError, Written, new_file
from lorakit.networks.adapter_file import Precision


def resize(
    file: AnyPath,
    output: AnyPath,
    *,
    rank: int | None = None,
    energy: float | None = None,
    precision: Precision | None = None,
) -> Written:
    """Write a LoRA file at a lower rank: `rank` for all layers, or for each the least that keeps a share of its energy.

    `energy` is that share of the squared norm of the update, such as 0.95. Of a DoRA, the low-rank part is resized and
    the magnitudes stay. A LoHa or LoKr becomes a LoRA. Raises `AdapterError` for other files.
    """
    if (rank is None) == (energy is None):
        raise AdapterError("Give either a rank or an energy.")
    choose = fixed_rank(rank) if rank is not None else rank_by_energy(energy or 0.0)
    target, source = new_file(output), open_lora(file)
    resized: dict[str, Adapter] = {}
    errors = []
    for key in source.keys:
        found, inputs, magnitude = _decomposed(source, key)
        kept = choose(found.values)
        up, down = found.factors(kept)
        resized[key] = Adapter(up, down, inputs, magnitude)
        errors.append(LayerError(key, found.tail(kept) ** 2, found.tail(0) ** 2))
    return save([source], resized, target, precision, tuple(errors))


def _decomposed(file: LoRAFile, key: str) -> tuple[Decomposition, tuple[int, ...], Tensor | None]:
    """The update of a layer, its inputs, and its magnitudes if it has any."""
    if file.parts(key) <= LORA_PARTS:
        adapter = file.adapter(key)
        return decompose_product(adapter.up, adapter.down), adapter.inputs, adapter.magnitude
    update, inputs = file.update(key)
    magnitude = file.tensor(f"{key}.{MAGNITUDE}").float() if MAGNITUDE in file.parts(key) else None
    if magnitude is not None and magnitude.shape[0] != len(update):
        raise AdapterError(f"{file.path} has magnitudes for the inputs of {key}, which no LoRA can have.")
    return decompose(update), inputs, None if magnitude is None else magnitude.flatten()
