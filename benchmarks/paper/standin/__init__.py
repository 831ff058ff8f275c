"""What stands in for models and data where there is no hub: small tasks, one or two of each kind, and base models."""

from __future__ import annotations

from benchmarks.paper.tasks import ANSWERS, CLASSIFICATION, REGRESSION, SUMMARIES, Task

PACKAGES = 16  # classes of task "package"

STAND_INS = {
    task.name: task
    for task in (
        Task("order", "order of two sentences", CLASSIFICATION, ("first", "second"), ("accuracy",), None, classes=2),
        Task("package", f"which of {PACKAGES} packages", CLASSIFICATION, ("text",), ("accuracy",), None,
             classes=PACKAGES),
        Task("overlap", "words that are left", REGRESSION, ("first", "second"), ("pearson", "spearman"), None,
             classes=1),
        Task("purpose", "what something is for", ANSWERS, ("question", "context"), ("f1", "exact_match"), None,
             no_answer=True),
        Task("first-line", "a docstring's first line", SUMMARIES, ("body", "summary"),
             ("rouge1", "rouge2", "rougeLsum"), None),
    )
}  # fmt: skip


__all__ = ["PACKAGES", "STAND_INS"]
