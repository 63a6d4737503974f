"""Images of tasks made ahead are shared by the samples of a task, made once, and only a fixed number ahead."""

from __future__ import annotations

import pytest
from trajectory_samples import digit_task

from cv_lightning.agent import views as module
from cv_lightning.agent.dialogue import DialogueEncoder
from cv_lightning.agent.request import requests_of
from cv_lightning.agent.views import TaskViews
from cv_lightning.types import Task, TrajectoryImage


def test_views_are_made_only_a_fixed_number_of_tasks_ahead(
    encoder: DialogueEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AHEAD", 3)
    made: list[str] = []
    whole = module._views_of

    def noted(encoder: DialogueEncoder, task: Task) -> list[TrajectoryImage]:
        made.append(task.id)
        return whole(encoder, task)

    monkeypatch.setattr(module, "_views_of", noted)
    tasks = [digit_task(index, "small") for index in range(8)]
    requests = requests_of(tasks, 2)
    views = TaskViews(encoder, requests)
    for at, task in enumerate(tasks):
        first, again = views.of(requests[2 * at]), views.of(requests[2 * at + 1])
        assert first is again and first[0].original is task.images[0]
        assert len(made) <= at + 1 + 3
    views.close()
    assert sorted(made) == sorted(task.id for task in tasks), "each once"
