"""The paper's twelve tasks, and those that stand in for them where there is no hub: what each is made of."""

from __future__ import annotations

from dataclasses import dataclass, field

CLASSIFICATION, REGRESSION, ANSWERS, SUMMARIES = "classification", "regression", "answers", "summaries"
TRAINING = "train"  # the split that is trained on
NATS = "nats_per_token"  # of a held-out summary; less is better


@dataclass(frozen=True)
class Task:
    """What a data set holds and how it is judged.

    Attributes:
        name: as on the command line.
        title: as in the paper's tables.
        kind: one of the four above.
        texts: the columns of text: one or two sentences; question and context; document and summary.
        metrics: by their names in ``metrics``, the paper's own, the first leading.
        hub: repository and configuration on the hub; None for a stand-in.
        classes: number of classes; 1 for a regression, 0 elsewhere.
        evaluation: the splits that are judged.
        no_answer: whether a question may have none.
    """

    name: str
    title: str
    kind: str
    texts: tuple[str, ...]
    metrics: tuple[str, ...]
    hub: tuple[str, str | None] | None
    classes: int = 0
    evaluation: tuple[str, ...] = ("validation",)
    no_answer: bool = False
    columns: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        target = {ANSWERS: ("id", "answers"), SUMMARIES: ()}.get(self.kind, ("label",))
        object.__setattr__(self, "columns", (*self.texts, *target))


def _glue(
    name: str,
    title: str,
    texts: tuple[str, ...],
    metrics: tuple[str, ...] = ("accuracy",),
    classes: int = 2,
    evaluation: tuple[str, ...] = ("validation",),
) -> Task:
    kind = REGRESSION if classes == 1 else CLASSIFICATION
    return Task(name, title, kind, texts, metrics, ("nyu-mll/glue", name), classes, evaluation)


def _squad(name: str, title: str, repository: str, no_answer: bool) -> Task:
    texts = ("question", "context")
    return Task(name, title, ANSWERS, texts, ("exact_match", "f1"), (repository, None), no_answer=no_answer)


_TWO = ("sentence1", "sentence2")
_ROUGE = ("rouge1", "rouge2", "rougeLsum")

TASKS = {
    task.name: task
    for task in (
        _glue("mnli", "MNLI", ("premise", "hypothesis"), classes=3,
              evaluation=("validation_matched", "validation_mismatched")),
        _glue("sst2", "SST-2", ("sentence",)),
        _glue("cola", "CoLA", ("sentence",), ("matthews",)),
        _glue("qqp", "QQP", ("question1", "question2"), ("accuracy", "f1_of_positives")),
        _glue("qnli", "QNLI", ("question", "sentence")),
        _glue("rte", "RTE", _TWO),
        _glue("mrpc", "MRPC", _TWO),
        _glue("stsb", "STS-B", _TWO, ("pearson", "spearman"), classes=1),
        _squad("squad", "SQuAD v1.1", "rajpurkar/squad", no_answer=False),
        _squad("squad_v2", "SQuAD v2.0", "rajpurkar/squad_v2", no_answer=True),
        Task("xsum", "XSum", SUMMARIES, ("document", "summary"), _ROUGE, ("EdinburghNLP/xsum", None)),
        Task("cnn_dailymail", "CNN/DailyMail", SUMMARIES, ("article", "highlights"), _ROUGE,
             ("abisee/cnn_dailymail", "3.0.0")),
    )
}  # fmt: skip


__all__ = ["ANSWERS", "CLASSIFICATION", "NATS", "REGRESSION", "SUMMARIES", "TASKS", "TRAINING", "Task"]
