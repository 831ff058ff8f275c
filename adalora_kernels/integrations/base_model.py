"""The base model that an adapter's checkpoint names, with the head that the adapter was trained with."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from adalora_kernels.integrations.adapter import CONFIG_FILE, Adapter

_AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
# Where transformers' classifiers keep the matrix that has a row for each label.
_LABELS = ("classifier.weight", "score.weight", "classifier.out_proj.weight", "classification_head.out_proj.weight")


def load_base(adapter: Adapter, source: str | Path | None) -> nn.Module:
    """Load the base model of an adapter through transformers, in the dtype that it is stored in.

    Args:
        adapter: whose config tells the task, and whose saved head the number of labels.
        source: folder or hub name; None for the one that the config names.

    Raises:
        ValueError: neither names a base, its class isn't one of transformers', or it lacks weights that the adapter
            doesn't have either, or it can't be loaded.
    """
    source = source or adapter.config.get("base_model_name_or_path")
    if not source:
        raise ValueError("base: expected a model folder, the adapter's config names none; give it with --base")
    labels = next((adapter.others[name].shape[0] for name in _LABELS if name in adapter.others), None)
    settings = {} if labels is None else {"num_labels": labels}
    if (Path(source) / CONFIG_FILE).is_file():
        raise ValueError(f"base: expected the model below the adapter, {source} holds an adapter itself; give its base")
    cls = _class_of(adapter)
    try:
        model, info = cls.from_pretrained(source, dtype="auto", output_loading_info=True, **settings)
    except (OSError, ValueError) as error:  # several lines for one cause
        cause = str(error).splitlines()[0]
        raise ValueError(f"base: expected the model that the adapter was trained on in {source}, but {cause}") from None
    if missing := set(info["missing_keys"]).difference(adapter.others):
        raise ValueError(
            f"base: expected all weights of {type(model).__name__} in {source} or in the adapter, neither has "
            f"{', '.join(sorted(missing)[:3])}; give the base of its training"
        )
    loaded: nn.Module = model
    return loaded


def _class_of(adapter: Adapter) -> Any:
    task_type = adapter.config.get("task_type")
    if task_type is not None:
        if task_type not in _AUTO_CLASSES:
            raise ValueError(f"adapter: expected a task_type of {', '.join(_AUTO_CLASSES)}, got {task_type!r}")
        return getattr(transformers, _AUTO_CLASSES[task_type])
    mapping = adapter.config.get("auto_mapping") or {}
    library, name = str(mapping.get("parent_library")), str(mapping.get("base_model_class"))
    # A file says what to import here: from transformers, and from nowhere else.
    with suppress(ImportError, AttributeError):
        if library.partition(".")[0] == "transformers":
            return getattr(import_module(library), name)
    raise ValueError(
        f"adapter: expected a task_type or a class of transformers, got {name} of {library}; load the model in Python "
        "and call adalora_kernels.integrations.export.export_merged(model, path)"
    )


__all__ = ["load_base"]
