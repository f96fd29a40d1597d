"""Metrics of continual learning, computed from an accuracy matrix (docs/design.md 6.2).

`A[t][i]` is the score on task i after stage t, in percent; entries with i > t are None (not learned yet). A matrix has
T columns and up to T rows: a run in progress lacks the last rows (or has None in them), and joint training has only
the last row. A metric that needs a missing entry is None, never a mean over the others.
"""

from collections.abc import Iterable, Sequence

from pipeline.errors import UserError

Row = Sequence[float | None]
Matrix = Sequence[Row]

HIGHEST = 1000  # percent; scores in [0, 1] reach 100, CIDEr, which is in [0, 10], reaches 1000
ROUNDING = 1e-6  # tolerance at both ends of the range, for means of floats


def square(accuracy: Matrix) -> list[list[float | None]]:
    """Return the matrix with rows of None for the stages to come, [T, T], after checking it.

    Raises UserError for an empty or ragged matrix, more rows than tasks, a score above the diagonal, or one
    outside 0..1000 (only CIDEr passes 100).
    """
    if not accuracy or not accuracy[0]:
        raise UserError("The accuracy matrix is empty; expected one row per stage. Evaluate the run first.")
    tasks = len(accuracy[0])
    if len(accuracy) > tasks:
        raise UserError(f"The accuracy matrix has {len(accuracy)} rows for {tasks} tasks; expected one row per stage.")
    for stage, row in enumerate(accuracy):
        if len(row) != tasks:
            raise UserError(
                f"Row {stage + 1} of the accuracy matrix has {len(row)} entries; expected {tasks}, one per task, "
                "as in its first row."
            )
        for task, score in enumerate(row):
            if score is None:
                continue
            if task > stage:
                raise UserError(
                    f"The accuracy matrix has a score for task {task + 1} after stage {stage + 1}; expected null, "
                    "because that task is learned later (zero-shot scores have a list of their own)."
                )
            if not -ROUNDING <= score <= HIGHEST + ROUNDING:
                raise UserError(
                    f"The score of task {task + 1} after stage {stage + 1} is {score}; expected percent, 0 to 100 "
                    f"(CIDEr up to {HIGHEST})."
                )
    return [list(row) for row in accuracy] + [[None] * tasks for _ in range(tasks - len(accuracy))]


def last(accuracy: Matrix) -> float | None:
    """Mean over i of A[T][i]: the score over all tasks at the end (MFN or final accuracy; docs/design.md 6.2)."""
    return _mean(square(accuracy)[-1])


def average(accuracy: Matrix) -> float | None:
    """Mean over t of the mean over i <= t of A[t][i]: the tasks seen, averaged over the stages.

    CoIN's and MCITlib's mean average accuracy (MAA; docs/design.md 6.2), so it is also reported as
    `mean_average_accuracy`.
    """
    return _mean([_mean(row[: stage + 1]) for stage, row in enumerate(square(accuracy))])


def immediate(accuracy: Matrix) -> float | None:
    """Mean over i of A[i][i]: the score on each task right after learning it (MFT; docs/design.md 6.2)."""
    return _mean(_diagonal(square(accuracy)))


def forgetting(accuracy: Matrix) -> float | None:
    """Mean over i < T of max over t < T of A[t][i], minus A[T][i]; positive = forgetting. None for a single task.

    Chaudhry et al. 2018 (Riemannian walk): forgetting is measured from the best score a task ever had.
    """
    *earlier, final = square(accuracy)
    best = [_highest([row[task] for row in earlier[task:]]) for task in range(len(earlier))]
    return _mean([_difference(before, now) for before, now in zip(best, final, strict=False)])


def forgetting_coin(accuracy: Matrix) -> float | None:
    """Mean over i < T of A[i][i] - A[T][i]: CoIN's "BWT", where positive means forgetting (docs/design.md 6.2)."""
    matrix = square(accuracy)
    return _mean([_difference(first, now) for first, now in list(zip(_diagonal(matrix), matrix[-1], strict=True))[:-1]])


def backward_transfer(accuracy: Matrix) -> float | None:
    """Mean over i < T of A[T][i] - A[i][i]; negative = forgetting. None for a single task.

    Lopez-Paz and Ranzato 2017 (GEM, eq. 3) and MCITlib's sign; `forgetting_coin` is the other one (docs/design.md 6.2).
    """
    matrix = square(accuracy)
    return _mean([_difference(now, first) for first, now in list(zip(_diagonal(matrix), matrix[-1], strict=True))[:-1]])


def retention_per_task(accuracy: Matrix) -> list[float | None]:
    """Per task i, the final score A[T][i] in percent of A[i][i], the score right after the task was learned.

    A ratio, unlike the differences of `forgetting_coin`, so that tasks with low scores count as much as the others;
    None for a task that scored 0 right after its stage.
    """
    matrix = square(accuracy)
    pairs = zip(_diagonal(matrix), matrix[-1], strict=True)
    return [100.0 * now / first if first and now is not None else None for first, now in pairs]


def retention(accuracy: Matrix) -> float | None:
    """Mean over i < T of `retention_per_task`; 100 = nothing lost. None for a single task."""
    return _mean(retention_per_task(accuracy)[:-1])


def immediate_gain(accuracy: Matrix, zero_shot: Row) -> float | None:
    """Mean over i of A[i][i] - Z[i]: what a task's own stage adds to the frozen model's zero-shot score Z."""
    return _mean([_difference(own, before) for own, before in zip(_diagonal(square(accuracy)), zero_shot, strict=True)])


def forward_transfer(zero_shot: Row, ahead: Row | None) -> float | None:
    """Mean over i > 1 of A[i-1][i] - Z[i]: the effect of earlier stages on a task that is not learned yet.

    Lopez-Paz and Ranzato 2017 (GEM, eq. 4), with the frozen model's zero-shot score Z in place of their random
    initialisation's. The entries just above the diagonal, `ahead[i]` = A[i-1][i], are measured with `evaluate.ahead`;
    None without them and for a single task.
    """
    if ahead is None:
        return None
    return _mean([_difference(before, none) for before, none in list(zip(ahead, zero_shot, strict=True))[1:]])


def routing_loss_per_task(told: Row, routed: Row) -> list[float | None]:
    """Per task what routing costs its score: the score with the task told minus the routed one, in percent points."""
    return [_difference(own, found) for own, found in zip(told, routed, strict=True)]


def routing_costs(told: Row, routed: Row) -> dict[str, float | None]:
    """The mean of the scores with the task told, and the mean of `routing_loss_per_task`; the rows as long as known."""
    return {"told": _mean(told), "routing_loss": _mean(routing_loss_per_task(told, routed))}


METRICS = {
    "last": last,
    "average": average,
    "mean_average_accuracy": average,
    "immediate": immediate,
    "forgetting": forgetting,
    "forgetting_coin": forgetting_coin,
    "backward_transfer": backward_transfer,
    "retention": retention,
}


# Metrics that are another one under the name of a paper, or its negative; tables and MLflow leave them out.
OTHER_NAMES = ("mean_average_accuracy", "forgetting_coin")


def summarise(accuracy: Matrix, zero_shot: Row | None = None, ahead: Row | None = None) -> dict[str, float | None]:
    """Return every metric of this module by name, in percent; those that compare with zero-shot need its scores.

    Shapes: accuracy [T, T], zero_shot [T], ahead [T] (see `forward_transfer`; its first entry is not used). Raises
    UserError when the shapes do not match.
    """
    tasks = len(square(accuracy))
    summary = {name: metric(accuracy) for name, metric in METRICS.items()}
    for name, row in (("zero-shot", zero_shot), ("ahead", ahead)):
        if row is not None and len(row) != tasks:
            raise UserError(f"There are {len(row)} {name} scores; expected {tasks}, one per task.")
    if zero_shot is not None:
        summary["zero_shot"] = _mean(zero_shot)
        summary["gain"] = _difference(summary["last"], summary["zero_shot"])
        summary["immediate_gain"] = immediate_gain(accuracy, zero_shot)
        summary["forward_transfer"] = forward_transfer(zero_shot, ahead)
    return summary


def after_stage(accuracy: Matrix, stage: int) -> dict[str, float | None]:
    """Return the metrics with `stage` (0-based) as the last one, for a chart over the stages."""
    return summarise([row[: stage + 1] for row in square(accuracy)[: stage + 1]])


def _diagonal(matrix: Matrix) -> list[float | None]:
    return [row[task] for task, row in enumerate(matrix)]


def _mean(values: Iterable[float | None]) -> float | None:
    numbers = []
    for value in values:
        if value is None:
            return None
        numbers.append(value)
    return sum(numbers) / len(numbers) if numbers else None


def _highest(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) and known else None


def _difference(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right
