"""Order of tasks: balanced, deterministic, divided among ranks without gap or overlap."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from cv_lightning.data.sources import RowStream
from cv_lightning.digits.scenes import KINDS, DigitsConfig
from cv_lightning.digits.sources import DEMONSTRATIONS_FROM, DigitTasks, HeldOutScenes, balanced_kinds


@pytest.mark.parametrize(
    ("shares", "count"),
    [
        (dict.fromkeys(KINDS, 1.0), 24),
        (dict.fromkeys(KINDS, 1.0), 10),
        ({"upright": 3.0, "turned": 1.0, "small": 2.0}, 64),
        ({"small": 1.0}, 5),
        ({"upright": 0.1, "turned": 0.7, "small": 0.2}, 1),
    ],
)
def test_each_kind_is_within_one_of_its_share_and_exact_on_average(shares: dict[str, float], count: int) -> None:
    rng = random.Random(0)
    total = Counter()
    for _ in range(600):
        kinds = Counter(balanced_kinds(shares, count, rng))
        assert sum(kinds.values()) == count
        for kind in KINDS:
            assert abs(kinds[kind] - count * shares.get(kind, 0) / sum(shares.values())) < 1 + 1e-9
        total.update(kinds)
    for kind in KINDS:
        assert total[kind] / 600 == pytest.approx(count * shares.get(kind, 0) / sum(shares.values()), abs=0.08)


def test_a_step_has_the_same_tasks_at_every_request() -> None:
    source = DigitTasks(DigitsConfig(seed=3))
    ids = [task.id for task in source.batch(7, 12)]
    source.batch(2, 12)
    assert [task.id for task in DigitTasks(DigitsConfig(seed=3)).batch(7, 12)] == ids
    assert len(set(ids) | {task.id for task in source.batch(8, 12)}) == 24
    assert all(int(name.rsplit("-", 1)[1]) < DEMONSTRATIONS_FROM for name in ids)


def test_ranks_share_a_step_without_gap_or_overlap() -> None:
    source = DigitTasks(DigitsConfig())
    whole = [task.id for task in source.batch(1, 12)]
    parts = [[task.id for task in source.batch(1, 12, rank, 3)] for rank in range(3)]
    assert sorted(name for part in parts for name in part) == sorted(whole)
    assert {len(part) for part in parts} == {4}


class Numbers:
    """Ten rows in shuffled order."""

    num_rows = 10
    num_orders = 0

    def order(self, rng: random.Random) -> list[int]:
        self.num_orders += 1
        return rng.sample(range(10), 10)

    def take_many(self, places: Sequence[tuple[Sequence[int], int]]) -> list[int]:
        return [order[at] for order, at in places]


def test_every_epoch_has_every_row_once() -> None:
    rows = Numbers()
    source = RowStream(rows, seed=1)
    stream = [number for step in range(10) for number in source.batch(step, 4, 0, 1)]
    epochs = [stream[at : at + 10] for at in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert rows.num_orders == 4  # an order is made once an epoch
    assert RowStream(Numbers(), seed=1).batch(5, 4, 0, 1) == stream[20:24]  # nothing but the step's number counts
    assert RowStream(Numbers(), seed=2).batch(0, 10, 0, 1) != epochs[0]
    parts = [source.batch(3, 6, rank, 3) for rank in range(3)]
    assert sorted(number for part in parts for number in part) == sorted(source.batch(3, 6, 0, 1))


def test_held_out_scenes_have_the_asked_number_of_each_kind() -> None:
    counts = {"upright": 5, "turned": 3, "turned_and_small": 2}
    scenes = HeldOutScenes(DigitsConfig(), counts)
    tasks = [scenes.row(at) for at in range(len(scenes))]
    assert Counter(task.metadata["kind"] for task in tasks) == counts
    assert len({task.id for task in tasks}) == 10
    assert [task.metadata["kind"] for task in tasks[:3]] == ["upright", "turned", "turned_and_small"]
    assert min(digit for task in tasks for digit in task.metadata["digits"]) >= 1400


@pytest.mark.parametrize("counts", [{"sideways": 3}, {"upright": -1}])
def test_invalid_counts_name_their_flag(counts: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="test_tasks"):
        HeldOutScenes(DigitsConfig(), counts)
