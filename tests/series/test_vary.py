"""Values to vary, and what is made of them."""

from __future__ import annotations

import pytest

from lorakit.errors import ConfigError
from lorakit.series.vary import split_values, variations


def test_every_combination() -> None:
    """The last key changes fastest; each is named after its values, and overrides the keys."""
    found = variations(["optimizer.lr=5e-5,1e-4", "network.rank=8,32"])
    assert [one.label for one in found] == ["lr=5e-5 rank=8", "lr=5e-5 rank=32", "lr=1e-4 rank=8", "lr=1e-4 rank=32"]
    assert [one.suffix for one in found] == ["lr5e-5-rank8", "lr5e-5-rank32", "lr1e-4-rank8", "lr1e-4-rank32"]
    assert found[1].overrides == ("optimizer.lr=5e-5", "network.rank=32")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1,2", ["1", "2"]),
        ("[unet],[unet, text_encoder]", ["[unet]", "[unet, text_encoder]"]),
        ('"a, b",c', ['"a, b"', "c"]),
        ("{a = 1, b = [1, 2]}, 3", ["{a = 1, b = [1, 2]}", "3"]),
        ("one", ["one"]),
    ],
)
def test_commas_inside_of_values(text: str, values: list[str]) -> None:
    """Lists, tables and quoted texts are single values."""
    assert split_values(text) == values


def test_names_are_plain_and_differ() -> None:
    """Names of files hold no brackets and blanks; keys with the same last part keep the rest of it."""
    (first, _) = variations(["network.parts=[unet],[unet, text_encoder]"])
    assert first.suffix == "parts_unet"
    (first, *_) = variations(["optimizer.name=lion,adamw", "network.name=lierla"])
    assert (first.label, first.suffix) == (
        "optimizer.name=lion network.name=lierla",
        "optimizer.namelion-network.namelierla",
    )


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["optimizer.lr"], "must be KEY=VALUE,VALUE, not 'optimizer.lr'"),
        (["a=1,2", "a=3"], "varies a twice"),
        (["a=1,,2"], "a lacks a value"),
        (["a=1,1"], "a has a value twice"),
        (["network.rank=2,4", "output.name=a,b"], "output.name is made of the values of the other keys"),
    ],
)
def test_what_cannot_be_varied(texts: list[str], message: str) -> None:
    """One message names the key and the cause."""
    with pytest.raises(ConfigError, match=message) as caught:
        variations(texts)
    assert len(caught.value.problems) == 1
