"""A reward term of a user's own that asks the judge about every trajectory of a group, and compares them."""

from __future__ import annotations

from collections.abc import Sequence

from cv_lightning.rewards import AnsweredGroup, RewardTerm

PROMPT = "Does the last turn say what is seen in the image? Reply 1 or 0.\n\n{text}"


class Grounded(RewardTerm):
    """1 where the judge says that the last turn describes the image, halved where all of the group do."""

    async def values(self, group: AnsweredGroup) -> Sequence[float | None]:
        replies = await group.ask_each([PROMPT.format(text=t.turns[-1].text) for t in group.trajectories])
        found = [None if reply is None else float(reply.strip().startswith("1")) for reply in replies]
        everyone = all(value == 1.0 for value in found)
        return [value if value is None else value / 2 if everyone else value for value in found]
