"""Uploads to the Hub, by the real client: what arrives, and what becomes of a run when nothing can."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load

import lorakit
from lorakit.builtin.observers.hub import HubConfig
from lorakit.config.train_config import TrainConfig
from lorakit.errors import ConfigError
from tests.training.conftest import MakeConfig
from tests.training.hub_server import WRITER, HubServer, hub_server


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub that the client finds, with a token that may write."""
    with hub_server() as server:
        _connect(monkeypatch, server.url)
        yield server


def _connect(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", WRITER)


def observed(make_config: MakeConfig, **settings: Any) -> TrainConfig:
    """A run of three saves that keeps only the newest of all, with uploads."""
    return make_config(
        training={"max_steps": 3},
        output={"save_every_n_steps": 1, "keep_last": 1, "save_state": True},
        observers=[{"name": "hub", "repo_id": "me/my-lora", **settings}],
    )


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was said of uploads."""
    return [record.getMessage() for record in caplog.records if record.name == "lorakit.builtin.observers.hub"]


def test_every_save_arrives(make_config: MakeConfig, hub: HubServer, caplog: pytest.LogCaptureFixture) -> None:
    """All saves and states arrive whole and in order, though the run removes them sooner than the Hub takes them."""
    hub.seconds = 0.3
    path = lorakit.train(observed(make_config, path_in_repo="loras/cats/", states=True))
    assert not [text for text in warnings_of(caplog) if not text.startswith("waiting for uploads to me/my-lora: ")]
    (repository,) = hub.repositories
    assert (repository["organization"], repository["name"], repository["visibility"]) == ("me", "my-lora", "private")
    state = ("network.safetensors", "optimizer.safetensors", "state.json")
    expected = []
    for step, stem in enumerate(["test-step00000001", "test-step00000002", "test"], start=1):
        expected.append(f"loras/cats/{stem}.safetensors")
        expected += [f"loras/cats/test-state/step{step:08d}/{name}" for name in state]
    assert [name for name, _ in hub.files] == expected
    content = dict(hub.files)
    assert content["loras/cats/test.safetensors"] == path.read_bytes()
    saves = [load(content[f"loras/cats/{stem}.safetensors"]) for stem in ("test-step00000001", "test-step00000002")]
    assert any((saves[0][key] != saves[1][key]).any() for key in saves[0])
    assert sorted(found.name for found in path.parent.iterdir()) == [
        "test-state", "test-step00000002.safetensors", "test.config.toml", "test.safetensors",
    ]  # fmt: skip


def test_adapters_alone_in_a_dataset(make_config: MakeConfig, hub: HubServer) -> None:
    """Without more said, adapters go to the top of the repository and states stay here; it can be public."""
    lorakit.train(observed(make_config, repo_type="dataset", private=False))
    assert [name for name, _ in hub.files] == [
        "test-step00000001.safetensors", "test-step00000002.safetensors", "test.safetensors"
    ]  # fmt: skip
    assert (hub.repositories[0]["type"], hub.repositories[0]["visibility"]) == ("dataset", "public")
    assert all("/datasets/me/my-lora/" in call for call in hub.calls if "repos/create" not in call)


def test_one_that_fails(make_config: MakeConfig, hub: HubServer, caplog: pytest.LogCaptureFixture) -> None:
    """A file that the Hub does not take is named with the cause; those after it are uploaded."""
    hub.failing = {1}
    path = lorakit.train(observed(make_config))
    (warning,) = [text for text in warnings_of(caplog) if "waiting" not in text]
    assert warning.startswith(f"{path.with_name('test-step00000002.safetensors')} was not uploaded to me/my-lora: ")
    assert "No space left for you" in warning
    assert [name for name, _ in hub.files] == ["test-step00000001.safetensors", "test.safetensors"]


def test_without_a_token(
    make_config: MakeConfig,
    hub: HubServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With a token that may not write, the first warning comes at the start, says the cure, and the run goes on."""
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    path = lorakit.train(observed(make_config))
    warnings = [text for text in warnings_of(caplog) if "waiting" not in text]
    assert len(warnings) == 4
    assert warnings[0].startswith("nothing can be uploaded to me/my-lora: ")
    assert all("401" in text and "log in with `hf auth login`" in text for text in warnings)
    assert path.name in warnings[-1]
    assert path.is_file()
    assert not hub.files


def test_nobody_answers(
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where no server is, each file is named, and the run ends as without uploads."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        _connect(monkeypatch, f"http://127.0.0.1:{listener.getsockname()[1]}")
    path = lorakit.train(observed(make_config, states=True))
    warnings = [text for text in warnings_of(caplog) if "waiting" not in text]
    assert len(warnings) == 7
    assert all("refused" in text for text in warnings)
    assert not list(path.parent.glob(".upload-*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repo_id": "my-lora"}, r"repo_id: must be the owner and the name of a repository, such as 'me/my-lora', not"),
        ({"repo_id": "me/my--lora"}, "repo_id: must be the owner"),
        ({"repo_id": "me/my-lora.git"}, "repo_id: must be the owner"),
        ({"repo_id": "https://hf.co/me/my-lora"}, "repo_id: must be the owner"),
        ({"repo_id": "me/x", "path_in_repo": "../up"}, "path_in_repo: must be a folder in the repository"),
        ({"repo_id": "me/x", "path_in_repo": "/a"}, "path_in_repo: must be a folder in the repository"),
        ({"repo_id": "me/x", "repo_type": "space"}, "repo_type: must be one of 'model', 'dataset', not 'space'"),
        ({}, "repo_id: is missing"),
    ],
)
def test_mistakes(settings: dict[str, str], message: str, make_config: MakeConfig) -> None:
    """A name that no repository can have is told when the config is read."""
    with pytest.raises(ConfigError, match=rf"observers\[0\]\.{message}"):
        make_config(observers=[{"name": "hub", **settings}])


@pytest.mark.parametrize(
    "repo_id",
    [
        "me/my-lora", "Me_2/lora.v1_final", "a/b", "me/-x", "me/x-", "me/.x", "me/x.git", "me/a--b", "me/a..b", "me/ä",
        "me/a b", "/me", "me/", "me/x/y", "-me/x", "me/" + 96 * "x", "me/" + 97 * "x",
    ],
)  # fmt: skip
def test_names_are_those_of_the_hub(repo_id: str) -> None:
    """Names that are taken are those that the client takes, and have an owner."""

    def takes(check: Callable[[str], object]) -> bool:
        try:
            check(repo_id)
        except ValueError:
            return False
        return True

    assert takes(lambda name: HubConfig(repo_id=name)) == takes(validate_repo_id)
