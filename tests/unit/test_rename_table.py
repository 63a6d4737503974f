"""The rename table lets names change and nothing else."""

from __future__ import annotations

import pytest
from digests import compare, compare_names, fixed_fields
from renames import SECTIONS, Renames, differences, flatten, renames


def table(**sections: dict[str, str | None]) -> Renames:
    return Renames({name: {} for name in SECTIONS} | sections)


def test_the_table_in_the_repository_is_read() -> None:
    found = renames()
    assert all(found.of(section, "no/such.name[3]") == "no/such.name[3]" for section in SECTIONS)


def test_an_entry_renames_what_is_below_it_and_the_longest_wins() -> None:
    names = table(
        metrics={"rollout": "agent", "rollout/must_use": "rollout/needed", "reward/*/mandatory": "reward/*/must"}
    )
    assert names.of("metrics", "rollout/turns_mean[1]") == "agent/turns_mean[1]"
    assert names.of("metrics", "rollout/must_use[0]") == "rollout/needed[0]"
    assert names.of("metrics", "rollouts/x") == "rollouts/x"
    assert names.of("metrics", "reward/by_source/digits/small/mandatory[0]") == "reward/by_source/digits/small/must[0]"
    assert names.of("stored_fields", "rollout/must_use") == "rollout/must_use", "another section"


def test_lists_keep_their_places_and_null_is_gone() -> None:
    fields: dict[str, str | None] = {"trajectories[].turns[].result": "rollouts[].steps[].outcome", "task.digest": None}
    names = table(stored_fields=fields)
    stored = {"trajectories": [{"turns": [{"result": {"status": "ok"}}]}], "task": {"digest": "x", "id": "t"}}
    flat = names.flat("stored_fields", flatten(stored))
    assert flat == {"rollouts[0].steps[0].outcome.status": "ok", "task.id": "t"}
    with pytest.raises(AssertionError, match="number of lists"):
        table(stored_fields={"turns[].text": "text"}).of("stored_fields", "turns[2].text")


def test_command_lines_get_whole_names_only() -> None:
    names = table(
        config_keys={"trainer.callbacks.init_args": "rollout"}, class_paths={"cv_lightning.a.B": "cv_lightning.B"}
    )
    old = "fit --trainer.callbacks.init_args.sampling.seed 3 --x cv_lightning.a.B cv_lightning.a.Bc"
    assert names.text(old) == "fit --rollout.sampling.seed 3 --x cv_lightning.B cv_lightning.a.Bc"


def test_differences_are_told() -> None:
    old = {"a": 1.0, "b": 2, "c": "x", "d": True, "e": float("nan"), "f": None}
    assert not differences(old, {**old, "a": 1.0 + 1e-7, "new": 0}, 1e-6, 0.0)
    for name, value in {"a": 1.001, "b": 3, "c": "y", "d": False, "e": 0.0, "f": 0.0}.items():
        assert len(differences(old, {**old, name: value}, 1e-6, 0.0)) == 1, name
    assert "gone" in differences(old, {k: v for k, v in old.items() if k != "b"}, 0.0, 0.0)[0]


def test_digests_differ_by_value_and_on_other_machines_by_name() -> None:
    line = {"iteration": 1, "task": {"id": "t"}, "trajectories": [{"sample": 0, "turns": [{"text": "a"}]}]}
    digest = {"metrics": {"sft/loss[0]": 2.0, "other[0]": 1.0}, "weights": {"w": [0.0, 1.0]}, "lines": [line]}
    assert not compare(digest, digest)
    other = {"iteration": 1, "task": {"id": "t"}, "trajectories": [{"sample": 0, "turns": [{"text": "b"}]}]}
    changes = [{"metrics": {**digest["metrics"], "other[0]": 1.1}}, {"weights": {"w": [0.0, 1.1]}}, {"lines": [other]}]
    for change in changes:
        assert len(compare(digest, digest | change)) == 1
        assert not compare_names(digest, digest | change)
    assert fixed_fields([line]) == {"iteration", "task", "task.id", "trajectories[0]", "trajectories[0].sample"} | {
        "trajectories[0].turns[0]",
        "trajectories[0].turns[0].text",
    }
