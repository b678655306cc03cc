"""The layers of FLUX.1, Chroma and Anima that LoRA adapt, and what `[network]` can say of a choice of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain, combinations

from attrs import frozen

from lorakit.api.block_layout import BlockLayout

_STREAMS: Mapping[str, frozenset[str]] = {"img": frozenset(), "txt": frozenset({"text_stream"})}
_ATTENTION, _MLP, _MODULATION = (frozenset({"transformer", tag}) for tag in ("attention", "mlp", "modulation"))

Kinds = Mapping[str, frozenset[str]]
"""The tags of the layers in a block, by their paths in it."""

_DOUBLE: Kinds = {
    f"{stream}_{path}": tags | more
    for stream, more in _STREAMS.items()
    for path, tags in {
        "attn.qkv": _ATTENTION, "attn.proj": _ATTENTION, "mlp.0": _MLP, "mlp.2": _MLP, "mod.lin": _MODULATION,
    }.items()
}  # fmt: skip
_SINGLE: Kinds = {"linear1": _ATTENTION | _MLP, "linear2": _ATTENTION | _MLP, "modulation.lin": _MODULATION}
_ANIMA: Kinds = {
    **{f"{kind}.{name}_proj": _ATTENTION for kind in ("self_attn", "cross_attn") for name in ("q", "k", "v", "output")},
    **{f"mlp.layer{number}": _MLP for number in (1, 2)},
    **{
        f"adaln_modulation_{kind}.{number}": frozenset({"modulation"})
        for kind in ("self_attn", "cross_attn", "mlp")
        for number in (1, 2)
    },
}


def _without_modulation(kinds: Kinds) -> Kinds:
    return {path: tags for path, tags in kinds.items() if "modulation" not in tags}


LAYERS: Mapping[str, Mapping[str, Kinds]] = {
    "flux1": {"double": _DOUBLE, "single": _SINGLE},
    "chroma": {"double": _without_modulation(_DOUBLE), "single": _without_modulation(_SINGLE)},
    "anima": {"blocks": _ANIMA},
}
"""The layers in a block of each group of a family's blocks."""


@frozen
class Layer:
    """A layer in a block of the transformer."""

    path: str
    """Its path in the transformer: `double_blocks.0.img_attn.qkv`."""
    group: str
    """The group of its block."""
    block: int
    """The number of its block in the layout."""
    tags: frozenset[str]
    """What `network.layers` chooses it by."""


def layers_of(family: str, layout: BlockLayout) -> list[Layer]:
    """All layers in blocks of a family's transformer."""
    return [
        Layer(f"{group if group == 'blocks' else f'{group}_blocks'}.{number}.{path}", group, block, tags)
        for group, kinds in LAYERS[family].items()
        for number, block in enumerate(layout.groups[group])
        for path, tags in kinds.items()
    ]


@frozen
class Choice:
    """What `[network]` says of the ranks of layers."""

    tags: tuple[str, ...] | None
    """`layers`; None where it is not needed."""
    ranks: tuple[int, ...]
    """The rank of each block."""


def choice_of(ranks: Mapping[Layer, int]) -> Choice | None:
    """The choice that gives each layer its rank, 0 for none; None where there is no such choice."""
    of_blocks: dict[int, int] = {}
    for layer, rank in ranks.items():
        of_blocks[layer.block] = max(rank, of_blocks.get(layer.block, 0))
    if any(rank not in (0, of_blocks[layer.block]) for layer, rank in ranks.items()):
        return None
    asked = {layer: rank > 0 for layer, rank in ranks.items() if of_blocks[layer.block]}
    tags = next((tags for tags in _sets_of_tags(ranks) if all(_is_chosen(*own, tags) for own in asked.items())), ())
    if asked and not tags:
        return None
    is_usual = not asked or tags == ("transformer",)
    return Choice(None if is_usual else tags, tuple(rank for _, rank in sorted(of_blocks.items())))


def _is_chosen(layer: Layer, is_asked: bool, tags: tuple[str, ...]) -> bool:
    """Whether tags do with a layer what is asked for."""
    return bool(layer.tags & set(tags)) is is_asked


def _sets_of_tags(layers: Mapping[Layer, int]) -> Iterator[tuple[str, ...]]:
    """All sets of tags; that of what networks adapt by default comes first."""
    known = sorted(set().union(*(layer.tags for layer in layers)) - {"transformer"})
    pool = ["transformer", *known]
    yield from chain.from_iterable(combinations(pool, count) for count in range(1, len(pool) + 1))
