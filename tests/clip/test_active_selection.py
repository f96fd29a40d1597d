"""What selections promise on any pool: no row twice, the same whatever the order, and what released code gets wrong."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from pipeline.clip.active import acquire
from pipeline.clip.active.balance import pcb
from pipeline.clip.active.class_guided import (
    Clusters,
    class_guided,
    clusters_of,
    free_labels,
    guided_features,
    kmeans,
    pick_from_clusters,
)
from pipeline.clip.active.pool import PoolView, unit_length
from pipeline.errors import UserError

POOL, WIDTH, CLASSES, LABELLED, COUNT = 90, 12, 6, (5, 17, 33, 71), 15


def view(seed: int = 0, order: list[int] | None = None) -> PoolView:
    """A random pool; with `order` row r is what row order[r] was."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(POOL, WIDTH))
    logits = 2 * generator.normal(size=(POOL, CLASSES))
    if order is None:
        return PoolView.of(features, logits, LABELLED)
    return PoolView.of(features[order], logits[order], [order.index(row) for row in LABELLED])


def texts() -> np.ndarray:
    return unit_length(np.random.default_rng(9).normal(size=(CLASSES, WIDTH)))


def selections(pool: PoolView) -> dict[str, list[int]]:
    count = COUNT
    return {
        "random": acquire.sample(pool.unlabelled, count, random.Random(3)),
        "entropy": acquire.entropy(pool, count),
        "coreset": acquire.coreset(pool, count),
        "badge": acquire.badge(pool, count, np.random.RandomState(3)),
        "class_guided": class_guided(pool, texts(), count, clusters_of(count, len(LABELLED), False)),
    }


@pytest.mark.parametrize("acquisition", ["random", "entropy", "coreset", "badge", "class_guided"])
def test_takes_as_many_as_asked_none_twice_and_none_that_is_labelled(acquisition: str) -> None:
    for seed in range(5):
        picked = selections(view(seed))[acquisition]
        assert len(set(picked)) == len(picked) == COUNT
        assert not set(picked) & set(LABELLED)


@pytest.mark.parametrize("acquisition", ["entropy", "coreset"])
def test_the_order_of_the_pool_changes_nothing(acquisition: str) -> None:
    order = random.Random(1).sample(range(POOL), POOL)
    picked, of_other = selections(view())[acquisition], selections(view(order=order))[acquisition]
    assert [order[row] for row in of_other] == picked


def test_clusters_of_another_order_give_the_same_picks() -> None:
    pool = view()
    rows = [*pool.labelled, *pool.unlabelled]
    guided = unit_length(guided_features(pool.features[rows], pool.logits[rows], texts()))
    found = kmeans(guided, COUNT + len(LABELLED))
    picked = pick_from_clusters(guided, found, len(LABELLED), COUNT)
    head = list(range(len(LABELLED)))
    order = [*reversed(head), *random.Random(2).sample(range(len(head), POOL), POOL - len(head))]
    other = Clusters(found.numbers[order], found.centres)
    of_other = pick_from_clusters(guided[order], other, len(LABELLED), COUNT)
    sizes = np.bincount(found.numbers)  # both members of a cluster of two are equally near: the first row is taken
    clear = {place for place in range(POOL) if sizes[found.numbers[place]] > 2}
    assert {order[place] for place in of_other} & clear == set(picked) & clear
    assert len(set(picked) & clear) > COUNT // 2


def test_equal_scores_go_by_row() -> None:
    flat = PoolView.of(np.eye(4), np.zeros((4, 3)), [])
    assert acquire.entropy(flat, 3) == [0, 1, 2]
    assert acquire.coreset(flat, 2) == [0, 1]


def test_factorised_badge_equals_the_written_out_one() -> None:
    for seed in range(4):
        pool = view(seed)
        rows = np.array(pool.unlabelled)
        factors = acquire.gradient_factors(pool.probabilities(pool.unlabelled))
        gradients = (factors[:, :, None] * pool.features[rows][:, None, :]).reshape(len(rows), -1)
        generator = np.random.RandomState(seed)
        picked = [int((gradients**2).sum(axis=1).argmax())]
        while len(picked) < COUNT:
            distances = np.min([((gradients - gradients[p]) ** 2).sum(axis=1) for p in picked], axis=0)
            sums = np.cumsum(distances) / distances.sum()
            place = picked[0]
            while place in picked:
                place = int((sums >= generator.uniform()).argmax())
            picked.append(place)
        found = acquire.badge(pool, COUNT, np.random.RandomState(seed))
        assert found == rows[picked].tolist()


def test_badge_on_a_pool_of_one_and_the_same_image_ends() -> None:
    same = PoolView.of(np.ones((5, 3)), np.tile([1.0, 0.0], (5, 1)), [])
    assert sorted(acquire.badge(same, 4, np.random.RandomState(0))) == [0, 1, 2, 3]


def test_released_badge_depends_on_the_batch_and_ours_does_not() -> None:
    """The defect: rows of a smaller last batch overwrite earlier ones, so that other images are picked."""
    whole = acquire.released_sources(86, 43)
    assert whole == list(range(86))
    ragged = acquire.released_sources(86, 20)
    assert ragged.count(-1) == 6  # zeros where the last rows belong
    assert ragged[24:30] == list(range(80, 86))
    pool, changed = view(), 0
    for seed in range(10):
        right = acquire.badge(pool, COUNT, np.random.RandomState(seed))
        assert acquire.badge(pool, COUNT, np.random.RandomState(seed), released_batch=43) == right
        changed += acquire.badge(pool, COUNT, np.random.RandomState(seed), released_batch=20) != right
    assert changed == 10


def balanced(seed: int, guesses: list[int], counts: list[int], count: int, released: bool) -> list[int]:
    return pcb(range(len(guesses)), guesses, counts, count, random.Random(seed), released)


def test_balancing_equals_the_released_rule_while_no_class_runs_out() -> None:
    for seed in range(20):
        guesses = [row % CLASSES for row in range(60)]
        counts = [random.Random(seed).randint(0, 3) for _ in range(CLASSES)]
        assert balanced(seed, guesses, counts, 12, True) == balanced(seed, guesses, counts, 12, False)


def test_a_scarcer_class_with_a_free_candidate_is_never_passed_over() -> None:
    for seed in range(20):
        generator = random.Random(seed)
        guesses = [generator.choice([0, 0, 0, 1, 1, 2, 4]) for _ in range(40)]
        counts = [generator.randint(0, 4) for _ in range(CLASSES)]
        picked = balanced(seed, guesses, counts, 30, False)
        now = list(counts)
        for place, row in enumerate(picked):
            free = {guesses[other] for other in range(40) if other not in picked[:place]}
            assert now[guesses[row]] == min(now[c] for c in free)
            now[guesses[row]] += 1


def test_released_balancing_starves_and_ours_does_not() -> None:
    """A class without candidates: the released rule picks at random for ever, ours balances the others."""
    guesses = [0] * 60 + [1] * 6 + [2] * 6 + [3] * 6  # no candidate is guessed as class 4
    spreads = {}
    for released in (True, False):
        rounds = [balanced(seed, guesses, [1, 1, 1, 1, 0], 16, released) for seed in range(20)]
        assert all(len(set(picked)) == 16 for picked in rounds)
        counts = [Counter(guesses[row] for row in picked) for picked in rounds]
        spreads[released] = float(np.mean([max(c.values()) - min(c[k] for k in range(4)) for c in counts]))
    assert spreads[False] == 0  # 4 of each class that has candidates
    assert spreads[True] > 8  # 60 of 78 candidates are of class 0


def test_more_picks_than_candidates_are_refused() -> None:
    with pytest.raises(UserError, match="5 images cannot be picked from 3 candidates"):
        balanced(0, [0, 1, 2], [0, 0, 0], 5, False)


def test_kmeans_finds_separate_groups_and_fills_every_cluster() -> None:
    generator = np.random.default_rng(0)
    centres = 10 * np.eye(4)
    points = np.concatenate([centre + 0.1 * generator.normal(size=(20, 4)) for centre in centres])
    found = kmeans(points, 4)
    assert sorted(Counter(found.numbers.tolist()).values()) == [20] * 4
    assert len({found.numbers[20 * k] for k in range(4)}) == 4
    again = kmeans(points, 4)
    assert (again.numbers == found.numbers).all()
    same = kmeans(np.ones((6, 2)), 3)  # every image the same: no cluster may stay empty
    assert set(same.numbers.tolist()) == {0, 1, 2}
    with pytest.raises(UserError, match="6 images cannot form 7 clusters"):
        kmeans(np.ones((6, 2)), 7)


def test_free_labels_need_the_confidence_of_the_labelled_images_of_their_class() -> None:
    logits = np.log(np.array([[0.8, 0.2], [0.6, 0.4], [0.75, 0.25], [0.65, 0.35], [0.01, 0.99]]))
    pool = PoolView.of(np.eye(5), logits, [0, 1])  # class 0 at 0.8 and 0.6: threshold 0.7; class 1 has none
    assert free_labels(pool, [0, 0], [2, 3, 4]) == {2: 0}
    assert free_labels(PoolView.of(np.eye(5), logits, []), [], [2]) == {}


def test_a_broken_image_is_named() -> None:
    logits = np.zeros((3, 2))
    logits[1, 0] = np.nan
    with pytest.raises(UserError, match=r"first is b\.png"):
        PoolView.of(np.eye(3), logits, []).refuse_broken(["a.png", "b.png", "c.png"])
