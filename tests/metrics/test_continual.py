"""The metrics of accuracy matrices that were worked out by hand."""

import pytest

from pipeline.errors import UserError
from pipeline.metrics.continual import Matrix, after_stage, retention_per_task, square, summarise

N = None
FORGETS: Matrix = [[90, N, N], [80, 85, N], [60, 88, 95]]
IMPROVES: Matrix = [[50, N, N], [40, 60, N], [70, 66, 80]]


def test_a_matrix_that_forgets() -> None:
    summary = summarise(FORGETS)
    assert summary["last"] == pytest.approx((60 + 88 + 95) / 3)
    assert summary["average"] == pytest.approx((90 + (80 + 85) / 2 + (60 + 88 + 95) / 3) / 3)
    assert summary["immediate"] == pytest.approx((90 + 85 + 95) / 3)
    assert summary["forgetting"] == pytest.approx(((90 - 60) + (85 - 88)) / 2)
    assert summary["backward_transfer"] == pytest.approx(((60 - 90) + (88 - 85)) / 2)


def test_a_matrix_in_which_later_stages_help() -> None:
    summary = summarise(IMPROVES)
    assert summary["backward_transfer"] == pytest.approx(((70 - 50) + (66 - 60)) / 2)
    assert summary["forgetting"] == pytest.approx(((50 - 70) + (60 - 66)) / 2)


def test_the_coin_sign_is_the_opposite_of_backward_transfer() -> None:
    for matrix in (FORGETS, IMPROVES):
        summary = summarise(matrix)
        assert summary["forgetting_coin"] == -(summary["backward_transfer"] or 0) != 0


def test_forgetting_is_measured_from_the_best_stage_and_coins_from_the_tasks_own() -> None:
    rises_then_falls: Matrix = [[50, N, N], [80, 60, N], [40, 60, 70]]
    summary = summarise(rises_then_falls)
    assert summary["forgetting"] == pytest.approx((80 - 40) / 2)
    assert summary["forgetting_coin"] == pytest.approx((50 - 40) / 2)


def test_one_task_can_neither_forget_nor_transfer() -> None:
    summary = summarise([[75.0]])
    assert (summary["last"], summary["average"], summary["immediate"]) == (75, 75, 75)
    assert summary["forgetting"] is summary["forgetting_coin"] is summary["backward_transfer"] is None


def test_joint_training_knows_only_its_last_row() -> None:
    summary = summarise([[N, N, N], [N, N, N], [60, 70, 80]])
    assert summary["last"] == pytest.approx(70)
    assert summary["average"] is summary["immediate"] is summary["forgetting"] is summary["backward_transfer"] is None


def test_a_run_in_progress_has_no_final_numbers_yet() -> None:
    partials: list[Matrix] = [FORGETS[:2], [*FORGETS[:2], [N, N, N]]]
    for partial in partials:
        assert all(value is None for value in summarise(partial).values())
        assert after_stage(partial, 1)["last"] == pytest.approx((80 + 85) / 2)


def test_the_metrics_after_a_stage_see_nothing_later() -> None:
    assert after_stage(FORGETS, 0)["last"] == 90
    assert after_stage(FORGETS, 1)["forgetting"] == pytest.approx(10)
    assert after_stage(FORGETS, 2) == summarise(FORGETS)


def test_the_mean_average_accuracy_is_the_average_under_coins_name() -> None:
    summary = summarise(IMPROVES)
    assert summary["mean_average_accuracy"] == summary["average"] == pytest.approx((50 + 50 + 72) / 3)


def test_retention_is_the_share_of_the_own_stages_score_that_is_left() -> None:
    assert retention_per_task(FORGETS) == pytest.approx([100 * 60 / 90, 100 * 88 / 85, 100])
    assert summarise(FORGETS)["retention"] == pytest.approx((100 * 60 / 90 + 100 * 88 / 85) / 2)


def test_a_task_that_scored_nothing_has_no_retention() -> None:
    matrix: Matrix = [[0, N, N], [5, 80, N], [5, 40, 90]]
    assert retention_per_task(matrix) == [None, 50, 100]
    assert summarise(matrix)["retention"] is None
    assert summarise([[75.0]])["retention"] is None


def test_the_immediate_gain_compares_a_tasks_own_stage_with_zero_shot() -> None:
    assert summarise(IMPROVES, [10, 20, 30])["immediate_gain"] == pytest.approx((40 + 40 + 50) / 3)


def test_forward_transfer_compares_the_stage_before_a_tasks_own_with_zero_shot() -> None:
    summary = summarise(IMPROVES, [10, 20, 30], ahead=[N, 26, 34])
    assert summary["forward_transfer"] == pytest.approx((6 + 4) / 2)
    assert summarise(IMPROVES, [10, 20, 30], ahead=[N, 14, 28])["forward_transfer"] == pytest.approx((-6 - 2) / 2)
    assert summarise(IMPROVES, [10, 20, 30])["forward_transfer"] is None
    assert summarise([[75.0]], [10], ahead=[N])["forward_transfer"] is None


def test_scores_ahead_of_another_length_are_refused() -> None:
    with pytest.raises(UserError, match="2 ahead scores; expected 3"):
        summarise(FORGETS, [1, 2, 3], ahead=[N, 2])


def test_zero_shot_scores_give_the_gain() -> None:
    summary = summarise(FORGETS, [10, 20, 30])
    assert summary["zero_shot"] == pytest.approx(20)
    assert summary["gain"] == pytest.approx(81 - 20)
    assert summarise(FORGETS, [10, N, 30])["gain"] is None


@pytest.mark.parametrize(
    ("matrix", "sentence"),
    [
        ([], "empty"),
        ([[]], "empty"),
        ([[1, N], [1]], "Row 2 .* has 1 entries; expected 2"),
        ([[1], [2]], "2 rows for 1 tasks"),
        ([[1, 2], [1, 2]], "task 2 after stage 1; expected null"),
        ([[1, N], [1001, 2]], "task 1 after stage 2 is 1001; expected percent"),
        ([[-1, N], [1, 2]], "is -1; expected percent"),
        ([[float("nan")]], "is nan; expected percent"),
    ],
)
def test_a_matrix_of_the_wrong_shape_is_refused(matrix: list[list[float | None]], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        square(matrix)


def test_zero_shot_scores_of_another_length_are_refused() -> None:
    with pytest.raises(UserError, match="2 zero-shot scores; expected 3"):
        summarise(FORGETS, [1, 2])
