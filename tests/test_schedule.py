"""How a run goes: when it is judged, when its steps end, when a repair begins and from where."""

from __future__ import annotations

import random

import pytest

from adarank.adapt import AdaptSettings
from adarank.adapt.agreement import Judged, Signals, mean_signal, worse
from adarank.adapt.choice import best_step
from adarank.adapt.schedule import Schedule

SETTINGS = AdaptSettings(steps=200)


def told(*shares: float) -> Judged:
    """Judged tasks with these agreements."""
    return {f"t{i}": Signals(share, 0.1, 0.1, 0.1, 0.5, 0.5, 100) for i, share in enumerate(shares)}


@pytest.mark.parametrize(
    ("one_pass", "every"), [(None, 40), (1000, 40), (20, 40), (19, 38), (7, 14), (3, 6), (2, 5), (1, 5)]
)
def test_few_inputs_are_judged_more_often(one_pass: int | None, every: int) -> None:
    schedule = Schedule(SETTINGS, one_pass)
    assert schedule.every == every
    assert [step for step in range(201) if schedule.due(step, {})] == sorted({*range(0, 201, every), 200})


@pytest.mark.parametrize("one_pass", [None, 1, 500])
def test_an_interval_that_was_given_is_taken(one_pass: int | None) -> None:
    assert Schedule(SETTINGS.model_copy(update={"check_every": 7}), one_pass).every == 7


@pytest.mark.parametrize(("every", "round_"), [(40, 10), (100, 25), (20, 5), (10, 5), (4, 4), (1, 1)])
def test_rounds_of_repair_are_quarters_but_not_too_short(every: int, round_: int) -> None:
    schedule = Schedule(SETTINGS.model_copy(update={"check_every": every, "repair": 3}))
    assert (schedule.round, schedule.longest) == (round_, 200 + 3 * round_)


def test_patience_counts_judgements_since_the_best_one() -> None:
    schedule = Schedule(SETTINGS.model_copy(update={"patience": 2}))
    judged = {0: told(0.5, 0.5), 40: told(0.6, 0.4), 80: told(0.8, 0.4)}  # nearer, though the second task fell
    assert schedule.ended(judged) is None
    judged |= {120: told(0.6, 0.6)}
    assert schedule.ended(judged) is None
    judged |= {160: told(0.6, 0.6)}
    assert schedule.ended(judged) == 160
    assert (schedule.leader(judged), best_step(judged, "agreement", 0.0)) == (80, 120)
    assert Schedule(schedule.settings.model_copy(update={"keep": "last"})).ended(judged) is None
    assert Schedule(schedule.settings.model_copy(update={"patience": None})).ended(judged) is None


def test_a_repair_counts_the_judgements_that_it_comes_from() -> None:
    schedule = Schedule(SETTINGS.model_copy(update={"patience": 2}))
    judged = {0: told(0.5, 0.5), 40: told(0.8, 0.4), 80: told(0.5, 0.3), 120: told(0.5, 0.3), 130: told(0.7, 0.5)}
    assert (schedule.ended(judged), schedule.source(judged)) == (120, 40)
    assert list(schedule.counts(judged)) == [0, 40, 130]


@pytest.mark.parametrize(
    ("later", "source"), [(told(0.8, 0.4), 80), (told(0.79, 0.38), 80), (told(0.7, 0.4), 40), (told(0.9, 0.3), 80)]
)
def test_a_repair_goes_on_from_the_latest_step_as_near(later: Judged, source: int) -> None:
    judged = {0: told(0.5, 0.5), 40: told(0.8, 0.4), 80: later}  # noise of the mean: √(0.16 + 0.24) / 2 / 10 = 0.032
    assert Schedule(SETTINGS).source(judged) == source
    assert Schedule(SETTINGS.model_copy(update={"signal": "divergence"})).source(judged) == 80  # all are level there


@pytest.mark.parametrize("seed", range(30))
def test_any_run_ends_with_a_step_that_leaves_no_task_behind(seed: int) -> None:
    """A walk over random judgements: bounds, and that a repair begins only where something would be gained."""
    draw = random.Random(seed)
    chosen = {"patience": draw.choice([None, 1, 3]), "repair": draw.choice([0, 2, 8]), "check_every": draw.choice([7, 40, "auto"])}  # fmt: skip
    schedule = Schedule(AdaptSettings(steps=draw.choice([1, 30, 200]), **chosen), draw.choice([None, 2, 30]))
    judged: dict[int, Judged] = {}
    sources: list[int] = []
    step = 0
    while True:
        if schedule.due(step, judged) and step not in judged:
            judged[step] = told(*(draw.randrange(45, 60) / 100 for _ in range(3)))
        if schedule.over(step, judged):
            break
        before = schedule.ended(judged)
        if step == before:
            source = schedule.source(judged)
            kept = best_step(judged, "agreement", 0.0)
            assert mean_signal(judged[source], "agreement") > mean_signal(judged[kept], "agreement")
            assert worse(judged[source], judged[0], 0.0)
        assert step < schedule.longest
        assert step <= schedule.planned(step, judged) <= schedule.longest
        sources.append(schedule.source(judged))
        step += 1
        assert before is None or schedule.ended(judged) == before  # what ended does not begin again
    assert sources == sorted(sources)  # so only what was learned at the newest one has to be remembered
    assert step in judged  # the last step always is judged
    ended = schedule.ended(judged)
    assert ended is not None
    assert max(own for own in judged if own <= ended) == ended
    best = mean_signal(judged[best_step(judged, "agreement", 0.0)], "agreement")
    for end, share in schedule.line_points(judged):  # from where something would be gained, but for a task
        assert end in (schedule.source(judged), step)
        assert share in (0.8, 0.6, 0.4, 0.2)
        assert worse(judged[end], judged[0], 0.0)
        assert mean_signal(judged[end], "agreement") > best
