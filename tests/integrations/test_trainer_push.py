"""What the Trainer uploads to the hub holds the training state, and nobody writes to it while it is read."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adalora_kernels import AdaLoraCallback, RankAllocator, patch_model
from adalora_kernels.integrations.checkpoint import STATE_FILE
from tests.integrations.small_models import build
from tests.integrations.small_models_trainer import make_trainer


class _Hub:
    """The hub's client, as far as the Trainer calls it; uploads note when the state file was written."""

    def __init__(self) -> None:
        self.files: dict[Path, int] = {}

    def create_repo(self, name: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, *, folder_path: str, path_in_repo: str | None = None, **_: Any) -> Future[None]:
        if path_in_repo is not None:
            file = Path(folder_path) / STATE_FILE
            self.files[file] = file.stat().st_mtime_ns
        done: Future[None] = Future()
        done.set_result(None)
        return done


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_a_checkpoint_is_uploaded_with_its_training_state(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = _Hub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    model = patch_model(build("llama", layers=1))
    options: dict[str, Any] = {"push_to_hub": True, "hub_strategy": strategy, "hub_model_id": "me/model"}
    trainer = make_trainer(
        model, tmp_path, AdaLoraCallback(), save_strategy="steps", save_steps=4, max_steps=8, **options
    )
    monkeypatch.setattr(trainer, "create_model_card", lambda **_: None)
    trainer.train()
    assert [file.parent.name for file in hub.files] == ["checkpoint-4", "checkpoint-8"]
    trainer.push_to_hub()
    assert {file: file.stat().st_mtime_ns for file in hub.files} == hub.files
    again = patch_model(build("llama", layers=1, seed=1))
    again.load_adapter(tmp_path / "checkpoint-4", "default", is_trainable=True)
    allocator: RankAllocator = again.base_model.rank_allocator()
    assert allocator.next_step == 4
