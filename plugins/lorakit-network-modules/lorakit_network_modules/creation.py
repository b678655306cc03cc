"""Adapters as a network module makes them.

A network module replaces the `forward` of the layers that it adapts. Here each layer gets its `forward` back, and the
adapter is returned with the layer's path and its key, so that lorakit can attach it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from torch import nn

from lorakit.api import AdaptationTarget, AdapterError, derived_seed

if TYPE_CHECKING:
    from lorakit_network_modules.component import NetworkModuleConfig

_PREFIX = re.compile(r"lora_te\d?_")
"""Matches the prefix of the keys of text encoders' adapters."""


@frozen
class Created:
    """An adapter that a network module made."""

    key: str
    """Its key in files: `lora_unet_mid_block_attentions_0_proj_in`."""
    path: str
    """The path in its part of the layer that it adapts."""
    module: nn.Module
    """The adapter; its `forward` maps the layer's input to the layer's output plus the update."""
    lr_factors: Mapping[str, float]
    """The factor of the learning rate of each trained parameter, by its name."""


def create(config: NetworkModuleConfig, targets: Sequence[AdaptationTarget], seed: int) -> dict[str, Created]:
    """The adapters of one part of the model, by key, their weights a function of the seed and the part.

    Raises `AdapterError` if it is no network module, rejects the arguments, or removes the weights of layers.
    """
    first = targets[0]
    shown = _under(first.root, _levels(first))
    is_unet = first.encoder_index is None
    encoder, unet = ([], shown) if is_unet else (shown, nn.Module())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "network_module", first.part))
        network = _create_network(config, encoder, unet)
        network.apply_to(encoder, unet, not is_unet, is_unet)
    # The module knows the part alone, and so no second text encoder, nor other names than those of the layers' paths.
    keys = {target.path: target.key for target in targets}
    created = _detach_adapters(network, first.root, keys, _lr_factors(network))
    emptied = next(
        (one.key for one in created.values() if not hasattr(first.root.get_submodule(one.path), "weight")), ""
    )
    if emptied:
        raise AdapterError(
            f"network.args: {config.name} removes the weights of {emptied}, as LyCORIS' algo=full does, instead of"
            " adding to them. Choose another algorithm."
        )
    return created


def _create_network(config: NetworkModuleConfig, text_encoder: Any, unet: nn.Module) -> Any:
    try:
        make = import_module(config.name).create_network
    except (ImportError, AttributeError) as error:
        raise AdapterError(f"network.name: {config.name} is not a network module: {error}") from error
    arguments = {key: str(value) for key, value in config.args.items()}
    arguments.setdefault("dropout", str(config.dropout))
    try:
        return make(
            1.0, config.rank, config.alpha, None, text_encoder, unet, neuron_dropout=config.dropout, **arguments
        )
    except (TypeError, ValueError, KeyError, AssertionError) as error:
        raise AdapterError(f"network.args: {config.name} rejects them: {error!r}") from error


def _lr_factors(network: Any) -> dict[int, float]:
    """The learning rates that a network module gives its parameters when that of the part is 1, by their ids."""
    groups = network.prepare_optimizer_params(1.0, 1.0, 1.0)
    if isinstance(groups, tuple):  # groups and their descriptions
        groups = groups[0]
    return {id(parameter): float(group.get("lr", 1.0)) for group in groups for parameter in group["params"]}


def _detach_adapters(
    network: nn.Module, root: nn.Module, keys: Mapping[str, str], lr_factors: Mapping[int, float]
) -> dict[str, Created]:
    """The adapters whose `forward` replaces that of a layer of the root; the layers get their `forward` back.

    `keys` has the keys of layers by path; others have the key that the module gives them.
    """
    names = {id(module): name for name, module in network.named_modules()}
    created = {}
    for path, layer in root.named_modules():
        changed = layer.__dict__.pop("forward", None)
        if changed is not None:
            module = changed.__self__
            key = keys.get(path, names[id(module)])
            factors = {name: lr_factors[id(p)] for name, p in module.named_parameters() if id(p) in lr_factors}
            created[key] = Created(key, path, module, factors)
    return created


def _levels(target: AdaptationTarget) -> str:
    """What a text encoder's key has between the prefix and the layer's path: `text_model`; empty for other parts."""
    if target.encoder_index is None:
        return ""
    return _PREFIX.sub("", target.key, count=1).removesuffix(target.path.replace(".", "_")).strip("_")


def _under(root: nn.Module, level: str) -> nn.Module:
    """The root, or a module that holds it under this name, so that paths start with it."""
    if not level:
        return root
    holder = nn.Module()
    holder.add_module(level, root)
    return holder


def by_part(targets: Sequence[AdaptationTarget]) -> Mapping[str, list[AdaptationTarget]]:
    """The targets of each part, in their order."""
    parts: dict[str, list[AdaptationTarget]] = {}
    for target in targets:
        parts.setdefault(target.part, []).append(target)
    return parts
