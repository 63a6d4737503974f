"""Flat settings and their differences: one rule for ranks, checkpoints and evaluations."""

from __future__ import annotations

from cv_lightning.settings import changed, flatten


def test_flatten_names_leaves_by_dots_and_list_entries_by_class() -> None:
    callbacks = [{"class_path": "x.First", "init_args": {"n": 1}}, {"class_path": "y.Second"}]
    flat = flatten({"trainer": {"callbacks": callbacks, "devices": [0, 1]}, "empty": {}, "seed": 1})
    assert flat == {
        "trainer.callbacks.First.class_path": "x.First",
        "trainer.callbacks.First.init_args.n": 1,
        "trainer.callbacks.Second.class_path": "y.Second",
        "trainer.devices": [0, 1],
        "empty": {},
        "seed": 1,
    }
    twice = [{"class_path": "x.Same", "init_args": {"n": 1}}, {"class_path": "x.Same"}]
    assert flatten({"callbacks": twice}) == {"callbacks": twice}, "none of two equal names may hide the other"


def test_changed_names_what_differs_or_is_only_on_one_side() -> None:
    assert changed({"a": 1, "b": 2, "c": None}, {"a": 1, "b": 3, "d": 4}) == ["b", "c", "d"]
    assert changed({"a": 1}, {"a": 1}) == []
