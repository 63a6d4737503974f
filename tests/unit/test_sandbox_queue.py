"""The fair queue, without processes."""

from hypothesis import given
from hypothesis import strategies as st

from cv_lightning.sandbox.fair_queue import FairQueue


def test_owners_take_turns() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "a3", "b1", "c1", "c2"):
        queue.push(item[0], item)
    queue.push("c", "c0", front=True)
    assert queue.peek() == "a1"
    assert [queue.pop() for _ in range(len(queue))] == ["a1", "b1", "c0", "a2", "c1", "a3", "c2"]


@given(st.lists(st.tuples(st.sampled_from(["push", "pop"]), st.sampled_from("abc"))))
def test_nothing_is_lost_or_doubled(moves: list[tuple[str, str]]) -> None:
    queue: FairQueue[int] = FairQueue()
    inside: dict[int, str] = {}
    for number, (move, owner) in enumerate(moves):
        if move == "push":
            queue.push(owner, number)
            inside[number] = owner
        elif move == "pop" and queue:
            item = queue.peek()
            assert queue.pop() == item
            # First in, first out for each owner.
            assert item == min(n for n, o in inside.items() if o == inside[item])
            del inside[item]
        assert len(queue) == len(inside)
    assert sorted(queue.clear()) == sorted(inside) and not queue
