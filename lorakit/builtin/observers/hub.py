"""The Hugging Face Hub: saves are uploaded during training."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from attrs import field, frozen

from lorakit.api.components import ObserverConfig
from lorakit.api.hookspecs import hookimpl
from lorakit.api.observer import Observer, RunInfo

log = logging.getLogger(__name__)

_REPO_ID = re.compile(r"(?!.*(--|\.\.))[\w][\w.-]*/[\w]([\w.-]{0,94}\w)?", re.A)


def _repo_id(_: object, __: object, value: str) -> None:
    if not _REPO_ID.fullmatch(value) or value.endswith(".git"):
        raise ValueError(f"must be the owner and the name of a repository, such as 'me/my-lora', not {value!r}")


def _folder(_: object, __: object, value: str) -> None:
    if value.startswith("/") or "\\" in value or {"..", "."} & set(value.split("/")):
        raise ValueError(f"must be a folder in the repository, such as 'loras/cats', not {value!r}")


@frozen(kw_only=True)
class HubConfig(ObserverConfig):
    """Uploads all saves to a repository on the Hugging Face Hub; needs `hf auth login` once, or HF_TOKEN."""

    name = "hub"

    repo_id: str = field(validator=_repo_id)
    """Owner and name of the repository, such as `me/my-lora`; created if missing."""
    repo_type: Literal["model", "dataset"] = "model"
    """Type of the repository."""
    path_in_repo: str = field(default="", validator=_folder)
    """Folder in the repository; defaults to its root."""
    private: bool = True
    """Whether a new repository is private; an existing one is not changed."""
    states: bool = False
    """Also upload training states, each three times the size of the LoRA."""

    def build(self, run_info: RunInfo) -> Hub:
        """The uploads of one run."""
        return Hub(self, run_info.config.output.dir, f"{run_info.config.output.name}-state")


class Hub(Observer):
    """Uploads in a separate thread, one after another; failures are logged, and the files stay where they are."""

    def __init__(self, config: HubConfig, folder: Path, states: str) -> None:
        """Files are saved in `folder`; `states` is the name of the folder in it that states are in."""
        self._config = config
        self._folder = folder
        self._states = states
        self._thread = ThreadPoolExecutor(1, "hub")
        self._uploads: list[Future[None]] = []
        self._is_there = False

    def run_started(self, run: RunInfo) -> None:  # noqa: ARG002
        """Make the repository, so that a missing permission shows at the start."""
        self._uploads.append(self._thread.submit(self._tell_failure, "nothing can be uploaded", self._find_repository))

    def adapter_saved(self, path: Path) -> None:
        """Upload the file as it is now, whatever becomes of it."""
        self._upload(path, path.name)

    def state_saved(self, folder: Path) -> None:
        """Upload the folder as it is now, if states are asked for."""
        if self._config.states:
            self._upload(folder, f"{self._states}/{folder.name}")

    def closed(self) -> None:
        """Wait for the uploads that are left."""
        left = sum(not upload.done() for upload in self._uploads)
        if left:
            log.info("waiting for uploads to %s: %d left; Ctrl-C gives them up", self._config.repo_id, left)
        try:
            self._thread.shutdown()
        except KeyboardInterrupt:
            self._thread.shutdown(wait=False, cancel_futures=True)
            raise

    def _upload(self, path: Path, name: str) -> None:
        """Have a file or folder uploaded; a second name keeps it until then, even if the run removes it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        kept = Path(tempfile.mkdtemp(prefix=".upload-", dir=self._folder))
        if path.is_dir():
            shutil.copytree(path, kept / path.name, copy_function=_link)
        else:
            _link(path, kept / path.name)
        failure = f"{path} was not uploaded"
        self._uploads.append(self._thread.submit(self._send, failure, kept, path.name, name))

    def _send(self, failure: str, kept: Path, found: str, name: str) -> None:
        """Upload what is in the folder `kept` under the name `found`, and remove the folder."""
        target = "/".join(filter(None, [self._config.path_in_repo.strip("/"), name]))
        try:
            self._tell_failure(failure, lambda: self._commit(kept / found, target))
        finally:
            shutil.rmtree(kept, ignore_errors=True)

    def _commit(self, path: Path, target: str) -> None:
        api = self._find_repository()
        to = {"repo_id": self._config.repo_id, "repo_type": self._config.repo_type}
        if path.is_dir():
            api.upload_folder(folder_path=path, path_in_repo=target, commit_message=f"Upload {target}", **to)
        else:
            api.upload_file(path_or_fileobj=path, path_in_repo=target, commit_message=f"Upload {target}", **to)

    def _find_repository(self) -> Any:
        """The way to the Hub, once the repository is there."""
        from huggingface_hub import HfApi
        from huggingface_hub.utils.tqdm import disable_progress_bars

        api = HfApi()
        if not self._is_there:
            disable_progress_bars()  # they would be drawn over the run's own
            config = self._config
            api.create_repo(config.repo_id, repo_type=config.repo_type, private=config.private, exist_ok=True)
            self._is_there = True
        return api

    def _tell_failure(self, failure: str, work: Callable[[], object]) -> None:
        """Do the work; where it fails, say so, and why."""
        try:
            work()
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            status = getattr(getattr(error, "response", None), "status_code", None)
            reason = " ".join(dict.fromkeys((lines[0], lines[-1])))
            if status in (401, 403):
                reason += "; log in with `hf auth login`, or set HF_TOKEN to a token that may write"
            log.warning("%s to %s: %s", failure, self._config.repo_id, reason)


def _link(source: str | Path, target: str | Path) -> str:
    """Give a file a second name, or copy it where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return str(target)


@hookimpl
def register_observers() -> list[type[ObserverConfig]]:
    """The Hub."""
    return [HubConfig]
