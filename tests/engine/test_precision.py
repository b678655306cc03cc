"""Number formats in whole runs: the VAE in float32, and a base model kept in 8 bits."""

from __future__ import annotations

import lorakit
from tests.engine.test_runs import same, weights_of


def test_vae_in_float32(make_config) -> None:
    """`no_half_vae` reaches the latents of a mixed-precision run, and has no effect without mixed precision."""

    def trained(mixed_precision: str, no_half_vae: bool) -> dict:
        training = {"mixed_precision": mixed_precision, "max_steps": 2}
        return weights_of(lorakit.train(make_config(model={"no_half_vae": no_half_vae}, training=training)))

    assert not same(trained("bf16", False), trained("bf16", True))
    assert same(trained("no", False), trained("no", True))
