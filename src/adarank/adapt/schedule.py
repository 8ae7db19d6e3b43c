"""How a run proceeds: steps, then rounds of repair, then a line search towards the start.

Steps end at the last one, or once they no longer come nearer to the experts.

All of it is a function of the settings and of what was judged, so of the saved state: an interrupted run continues as it
would have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from adarank.adapt.agreement import Judged, mean_error, mean_signal, worse
from adarank.adapt.choice import best_step
from adarank.adapt.settings import AUTO, AdaptSettings

EVERY = 40  # steps between two judgements, at most
PASSES = 2  # over the inputs of the task that has fewest: from few inputs a model learns, and overfits, sooner
SHORTEST = 5  # steps between two judgements, and steps of a round, at least
REPAIR_FACTOR = 0.2  # of the step sizes: enough to move a task by some inputs, too little to undo the others
Seen = Mapping[int, Judged]


@dataclass(frozen=True)
class Schedule:
    """When a run is judged, when its steps end, and when it is repaired.

    Attributes:
        one_pass: steps after which the task with the fewest inputs has seen each of them; None if that is not known.
    """

    settings: AdaptSettings
    one_pass: int | None = None

    @property
    def every(self) -> int:
        """Steps between two judgements."""
        if self.settings.check_every != AUTO:
            return self.settings.check_every
        return EVERY if self.one_pass is None else min(EVERY, max(SHORTEST, PASSES * self.one_pass))

    @property
    def round(self) -> int:
        """Steps of a round of repair."""
        return min(self.every, max(SHORTEST, self.every // 4))

    @property
    def rounds(self) -> int:
        """Rounds of repair, at most."""
        return self.settings.repair if self.settings.steps and self.settings.keep == "best" else 0

    @property
    def longest(self) -> int:
        """How many steps a run takes at most."""
        return self.settings.steps + self.rounds * self.round

    def due(self, step: int, judged: Seen) -> bool:
        """True if the weights after so many steps are judged."""
        ended = self.ended(judged)
        if ended is None or step <= ended:
            return step % self.every == 0 or step == self.settings.steps
        return (step - ended) % self.round == 0

    def ended(self, judged: Seen) -> int | None:
        """The judged step after which only steps of a repair are taken; None while other steps remain."""
        patience = self.settings.patience if self.settings.patience and self.settings.keep == "best" else math.inf
        leader, since = 0, 0
        for step in sorted(judged):
            nearer = self._value(judged[step]) > self._value(judged[leader])
            leader, since = (step, 0) if nearer else (leader, since + (step > 0))
            if step >= self.settings.steps or since >= patience:
                return step
        return None

    def leader(self, judged: Seen) -> int:
        """Of the judged steps before any repair, the one nearest to the experts, whichever tasks fell behind; of equals the earliest."""
        ended = self.ended(judged)
        return max((s for s in judged if ended is None or s <= ended), key=lambda s: (self._value(judged[s]), -s))

    def source(self, judged: Seen) -> int:
        """The judged step that a repair starts from: the latest that is as near to the experts as the leader, within noise.

        Later ones have settled more. Noise is one standard error of the leader's mean agreement. Once a step is the
        source, only a later one can take its place.
        """
        ended, leader = self.ended(judged), judged[self.leader(judged)]
        noise = mean_error(leader) if self.settings.signal == "agreement" else 0.0
        near = self._value(leader) - noise
        return max(
            step
            for step, judgement in judged.items()
            if (ended is None or step <= ended) and self._value(judgement) >= near
        )

    def over(self, step: int, judged: Seen) -> bool:
        """True if nothing is left to do after so many steps."""
        if not judged:
            return step >= self.settings.steps
        ended = self.ended(judged)
        if ended is None or step < ended:
            return False
        return step >= ended + self.rounds * self.round or not self._in_need_of_repair(judged, ended)

    def line_points(self, judged: Seen) -> list[tuple[int, float]]:
        """(step, share of the way to it from the start): the points to judge once a run is over, the farthest first.

        Lines lead to where the repair began and to where it ended, if they are nearer to the experts than what would be
        kept. There are none if a repair succeeded.
        """
        ended, last = self.ended(judged) if judged else None, max(judged, default=0)
        if ended is None or self.settings.keep != "best" or (last > ended and not self._fallen(judged, last)):
            return []
        best = self._value(judged[best_step(judged, self.settings.signal, self.settings.tolerance)])
        steps = [step for step in dict.fromkeys((self.source(judged), last)) if self._value(judged[step]) > best]
        count = self.settings.retreat
        return [(step, (count - place) / (count + 1)) for place in range(count) for step in steps]

    def planned(self, step: int, judged: Seen) -> int:
        """How many steps the run is to take, as far as is known: more once a repair has begun."""
        ended = self.ended(judged)
        if ended is None:
            return self.settings.steps
        return ended if step <= ended else ended + self.rounds * self.round

    def factor(self, step: int, judged: Seen) -> float:
        """What step sizes are multiplied by at a step, counted from 0."""
        return self.settings.factor(step) if self.ended(judged) is None else REPAIR_FACTOR

    def counts(self, judged: Seen) -> Seen:
        """The judgements that the weights of this moment come from."""
        ended, source = self.ended(judged), self.source(judged) if judged else 0
        return {
            step: judgement for step, judgement in judged.items() if ended is None or step <= source or step > ended
        }

    def _in_need_of_repair(self, judged: Seen, ended: int) -> bool:
        """True if the step that a round would start from is nearer to the experts than the kept one, but leaves a task behind."""
        now = self.source(judged) if max(judged) == ended else max(judged)
        best = best_step(judged, self.settings.signal, self.settings.tolerance)
        return self._fallen(judged, now) and self._value(judged[now]) > self._value(judged[best])

    def _fallen(self, judged: Seen, step: int) -> bool:
        """True if some task is behind its start there."""
        return bool(worse(judged[step], judged[0], self.settings.tolerance))

    def _value(self, judgement: Judged) -> float:
        return mean_signal(judgement, self.settings.signal)
