"""Fixed answers give the trajectories, rewards and stored lines that are recorded in tests/fixtures/rollout.json."""

from __future__ import annotations

from typing import Any

import pytest
from digests import ABSOLUTE, RELATIVE, SHOWN, compare_lines, read_json, timeless
from renames import FIXTURES, differences, flatten, renames
from scripted_rollout import RECIPES, rolled_out

from cv_lightning.agent.dialogue import DialogueEncoder


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return read_json(FIXTURES / "rollout.json.gz")


@pytest.fixture(scope="module")
def found(encoder: DialogueEncoder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return timeless(rolled_out(encoder, tmp_path_factory.mktemp("rollout")))


def test_the_script_shows_what_can_happen(recorded: dict[str, Any]) -> None:
    """Else the tests below would compare little."""
    flat = [flatten(line) for line in recorded["lines"]]
    ends = {v for line in flat for k, v in line.items() if k.endswith(".end_state")}
    assert ends == {"answered", "max_turns", "no_answer"}
    statuses = {v for line in flat for k, v in line.items() if k.endswith(".result.status")}
    assert statuses == {"ok", "error", "refused"}
    for name in ("exact", "mandatory", "spurious", "usage"):
        values = {round(item["components"][name], 3) for item in recorded["rewards"]["reward/paper"]}
        assert len(values) > 1, name


def test_stored_lines_are_those_recorded(recorded: dict[str, Any], found: dict[str, Any]) -> None:
    said = compare_lines(recorded["lines"], found["lines"])
    assert not said, f"{len(said)} differences:\n" + "\n".join(said[:SHOWN])


@pytest.mark.parametrize("recipe", RECIPES)
def test_rewards_are_those_recorded(recorded: dict[str, Any], found: dict[str, Any], recipe: str) -> None:
    settings = [flatten(made["recipes"][recipe], "reward") for made in (recorded, found)]
    said = differences(renames().flat("config_keys", settings[0]), settings[1], 0.0, 0.0)
    old, new = recorded["rewards"][recipe], found["rewards"][recipe]
    assert len(old) == len(new)
    for number, (wanted, got) in enumerate(zip(old, new, strict=True)):
        for part in ("total", "advantage"):
            said += differences({part: wanted[part]}, {part: got[part]}, RELATIVE, ABSOLUTE)
        names = {f"reward/{name}": value for name, value in wanted["components"].items()}
        today = {f"reward/{name}": value for name, value in got["components"].items()}
        said += [f"{number}: {x}" for x in differences(renames().flat("metrics", names), today, RELATIVE, ABSOLUTE)]
    assert not said, "\n".join(said[:SHOWN])
