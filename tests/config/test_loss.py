"""The [loss] section: what cannot be, alone and with the model, and what has no effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lorakit.config.train_config import TrainConfig

Tables = dict[str, Any]
Read = Callable[[Tables], TrainConfig]
Problems = Callable[[Tables], dict[str, str]]

EPSILON, VELOCITY = {"prediction": "epsilon"}, {"prediction": "v_prediction"}


def with_loss(tables: Tables, loss: Tables, model: Tables | None = None) -> Tables:
    """The tables with a loss, and with more about the model."""
    return {**tables, "loss": loss, "model": {**tables["model"], **(model or {})}}


@pytest.mark.parametrize(
    ("model", "loss", "key", "message"),
    [
        ({}, {"type": "mse"}, "type", "no loss is called 'mse' (it is 'l2' here)"),
        ({}, {"huber_c": 0}, "huber_c", "must be more than 0"),
        ({}, {"huber_scale": -1}, "huber_scale", "must be more than 0"),
        ({}, {"min_snr_gamma": 0}, "min_snr_gamma", "must be more than 0"),
        ({}, {"noise_offset": -0.1}, "noise_offset", "must be at least 0"),
        ({}, {"multires_noise_iterations": 0}, "multires_noise_iterations", "must be at least 1"),
        ({}, {"multires_noise_iterations": 1.5}, "multires_noise_iterations", "must be a whole number"),
        ({}, {"adaptive_noise_scale": 0.1}, "adaptive_noise_scale", "needs noise_offset"),
        ({}, {"min_timestep": 500, "max_timestep": 500}, "min_timestep", "less than max_timestep, 500"),
        ({}, {"min_timestep": 1000}, "min_timestep", "less than the model's 1000 timesteps"),
        ({}, {"max_timestep": 1001}, "max_timestep", "at most 1000"),
        (VELOCITY, {"v_pred_like_loss": 1}, "v_pred_like_loss", "models that predict the noise"),
        (
            EPSILON,
            {"scale_v_pred_loss_like_noise_pred": True},
            "scale_v_pred_loss_like_noise_pred",
            "models that predict the velocity",
        ),
        (
            EPSILON,
            {"zero_terminal_snr": True, "debiased_estimation": True},
            "debiased_estimation",
            "infinite weight at the last timestep",
        ),
        (
            EPSILON,
            {"zero_terminal_snr": True, "v_pred_like_loss": 0.1},
            "v_pred_like_loss",
            "infinite weight at the last timestep",
        ),
    ],
)
def test_what_cannot_be(
    problems: Problems, tables: Tables, model: Tables, loss: Tables, key: str, message: str
) -> None:
    """Each value or combination without a meaning is one problem, at its key."""
    found = problems(with_loss(tables, loss, model))
    assert list(found) == [f"loss.{key}"]
    assert message in found[f"loss.{key}"]


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        ({}, {"noise_offset": 0.0, "adaptive_noise_scale": -0.1}),
        ({}, {"min_timestep": 999, "max_timestep": 1000}),
        ({}, {"scale_v_pred_loss_like_noise_pred": True}),
        ({}, {"zero_terminal_snr": True}),
        (VELOCITY, {"zero_terminal_snr": True, "debiased_estimation": True}),
        (EPSILON, {"min_snr_gamma": 5, "v_pred_like_loss": 0.1}),
        (VELOCITY, {"min_snr_gamma": 5, "scale_v_pred_loss_like_noise_pred": True}),
        ({}, {"type": "huber", "huber_schedule": "constant", "huber_c": 0.5, "huber_scale": 2}),
        ({}, {"multires_noise_iterations": 6, "multires_noise_discount": 0.8}),
        ({}, {"ip_noise_gamma": 0.1, "ip_noise_gamma_random_strength": True}),
    ],
)
def test_what_can_be(read: Read, tables: Tables, model: Tables, loss: Tables) -> None:
    """Combinations that mean something are read as they are, without a warning; what is not known yet is left open."""
    config = read(with_loss(tables, loss, model))
    assert config.loss.name == loss.pop("type", "l2")
    assert config.loss == type(config.loss)(**loss)
    assert not list(config.warnings())


@pytest.mark.parametrize(
    ("loss", "key"),
    [
        ({"huber_c": 0.2}, "huber_c"),
        ({"type": "l1", "huber_schedule": "constant"}, "huber_schedule"),
        ({"huber_scale": 2}, "huber_scale"),
        ({"noise_offset_random_strength": True}, "noise_offset_random_strength"),
        ({"multires_noise_discount": 0.8}, "multires_noise_discount"),
        ({"ip_noise_gamma_random_strength": True}, "ip_noise_gamma_random_strength"),
    ],
)
def test_what_has_no_effect(read: Read, tables: Tables, loss: Tables, key: str) -> None:
    """An option of something that is switched off is a warning that says what it needs."""
    (warning,) = read(with_loss(tables, loss)).warnings()
    assert warning.key == f"loss.{key}"
    assert warning.message.startswith("has no effect without ")


def test_no_signal_for_a_model_that_predicts_noise(read: Read, tables: Tables) -> None:
    """A schedule that ends without signal is warned of where the model predicts the noise."""
    (warning,) = read(with_loss(tables, {"zero_terminal_snr": True}, EPSILON)).warnings()
    assert warning.key == "loss.zero_terminal_snr"


def test_infinite_weights_that_are_never_used(read: Read, tables: Tables) -> None:
    """Without the last timestep, no weight is infinite, and the combination is not refused."""
    loss = {"zero_terminal_snr": True, "debiased_estimation": True, "max_timestep": 999}
    assert read(with_loss(tables, loss, EPSILON)).loss.max_timestep == 999


@pytest.mark.parametrize(
    ("timesteps", "loss", "key", "message"),
    [
        ({"min": 1000}, {}, "min", "must be less than 1000"),
        ({"max": 1001}, {}, "max", "must be at most 1000"),
        ({"min": 500, "max": 500}, {}, "min", "must be less than max, 500"),
        ({"min": 0.5}, {}, "min", "must be a whole number"),
        ({"min": 3}, {"min_timestep": 3}, "min", "is the same as loss.min_timestep"),
        ({"name": "logit_normal", "std": 0}, {}, "std", "must be more than 0"),
        ({"mean": 1.0}, {}, "mean", "is not a known key"),
        ({"name": "sigmoid"}, {}, "name", "it is 'logit_normal' here"),
    ],
)
def test_timesteps_that_cannot_be(
    problems: Problems, tables: Tables, timesteps: Tables, loss: Tables, key: str, message: str
) -> None:
    """A distribution or bound that the model cannot have is one problem, at its key."""
    found = problems({**tables, "timesteps": timesteps, "loss": loss})
    assert list(found) == [f"timesteps.{key}"]
    assert message in found[f"timesteps.{key}"]


def test_bounds_of_either_section(read: Read, tables: Tables) -> None:
    """`timesteps.min` and `loss.min_timestep` are the same; without any, timesteps are uniform over all."""
    given: list[Tables] = [{}, {"loss": {"min_timestep": 100}}, {"timesteps": {"min": 100}}]
    configs = [read({**tables, **more}) for more in given]
    assert {config.timesteps.name for config in configs} == {"uniform"}
    found = [config.timestep_sampler.bounds(config.model.noise_process) for config in configs]
    assert found == [(0, 1000), (100, 1000), (100, 1000)]
    assert all(isinstance(bound, int) for bounds in found for bound in bounds)
