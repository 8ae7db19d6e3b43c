"""Rows: read whole or refused, split without leaks, batched without a state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adarank.data.read import Table
from adarank.data.spec import Columns, DataSettings, SplitData, TaskSpec
from adarank.data.splits import Splits, budgeted, by_file, by_fraction, limited
from adarank.data.task import Batch, TaskData
from adarank.errors import DataError, RecipeError
from adarank.models.family import Family
from adarank.settings import parse
from adarank.workflow.load_tasks import TaskReader
from make import write_rows

# Splits

KEYS = st.lists(st.integers(0, 30), min_size=1, max_size=80)


@st.composite
def fractions(draw: st.DrawFn) -> DataSettings:
    adapt = draw(st.floats(0, 1))
    select = draw(st.floats(0, 1)) * (1 - adapt)
    test = draw(st.floats(0, 1)) * max(0.0, 1 - adapt - select)
    return DataSettings(adapt=adapt, select=select, test=test, split_seed=draw(st.integers(0, 99)))


@given(KEYS, fractions())
def test_fractions_split_into_disjoint_rows_and_inputs(keys: list[int], settings: DataSettings) -> None:
    rows = by_fraction(keys, settings).rows
    placed = [row for own in rows.values() for row in own]
    assert len(placed) == len(set(placed))
    assert set(placed) <= set(range(len(keys)))
    inputs = [key for own in rows.values() for key in {keys[row] for row in own}]
    assert len(inputs) == len(set(inputs))


@given(KEYS)
def test_rows_with_equal_inputs_stay_together(keys: list[int]) -> None:
    rows = by_fraction(keys, DataSettings(adapt=0.5, select=0.2, test=0.3)).rows
    assert sorted(row for own in rows.values() for row in own) == list(range(len(keys)))


@given(st.integers(20, 300), fractions())
def test_fractions_of_distinct_inputs_are_kept_to_one_row(count: int, settings: DataSettings) -> None:
    rows = by_fraction(range(count), settings).rows
    for split, share in (("adapt", settings.adapt), ("select", settings.select), ("test", settings.test)):
        assert abs(len(rows[split]) - share * count) <= 1


def test_splits_are_a_function_of_the_seed() -> None:
    first, again, other = (by_fraction(range(90), DataSettings(split_seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("values", [{"adapt": 0.9}, {"test": 1.2}, {"select": -0.1}])
def test_fractions_beyond_one_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"more than 1|less than or equal to 1|greater than or equal to 0"):
        DataSettings(**values)


@given(KEYS, st.data())
def test_files_lose_the_rows_that_later_splits_have_too(keys: list[int], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(keys)))
    second = data.draw(st.integers(first, len(keys)))
    counts = {"adapt": first, "select": second - first, "test": len(keys) - second}
    splits = by_file(keys, counts, DataSettings())
    adapt, select, test = keys[:first], keys[first:second], keys[second:]
    assert splits.rows["test"] == tuple(range(second, len(keys)))
    assert [keys[r] for r in splits.rows["select"]] == [k for k in select if k not in test]
    assert [keys[r] for r in splits.rows["adapt"]] == [k for k in adapt if k not in test and k not in select]
    lost = {split: counts[split] - len(splits.rows[split]) for split in counts}
    assert dict(splits.dropped) == {split: count for split, count in lost.items() if count}


def test_a_split_without_file_is_empty() -> None:
    splits = by_file([1, 2, 3], {"test": 3}, DataSettings())
    assert dict(splits.rows) == {"adapt": (), "select": (), "test": (0, 1, 2)}


TRANSDUCTIVE = DataSettings(protocol="transductive")


def test_transductive_adapts_on_the_test_rows() -> None:
    for splits in (by_fraction(range(50), TRANSDUCTIVE), by_file(range(9), {"adapt": 4, "test": 5}, TRANSDUCTIVE)):
        assert splits.rows["adapt"] == splits.rows["test"]
        assert splits.rows["test"]


def test_transductive_adapts_on_the_test_rows_under_a_limit_too() -> None:
    splits = limited(by_fraction(range(100), TRANSDUCTIVE), 10, 0)
    assert splits.rows["adapt"] == splits.rows["test"]


@given(st.integers(1, 300), st.sampled_from(["1%", "12.5%", 0.5, "100%", 1]), st.none() | st.integers(1, 40))
def test_a_budget_adapts_on_a_share_of_the_scored_rows(count: int, budget: float | str, limit: int | None) -> None:
    settings = DataSettings(protocol="transductive", budget=budget)
    whole = limited(by_fraction(range(count), settings), limit, 0)
    few = budgeted(whole, settings)
    share = float(budget[:-1]) / 100 if isinstance(budget, str) else budget
    assert (few.rows["test"], few.rows["select"]) == (whole.rows["test"], whole.rows["select"])
    assert set(few.rows["adapt"]) <= set(whole.rows["test"])
    scored = len(whole.rows["test"])
    assert len(few.rows["adapt"]) == min(scored, max(1, round(share * scored)))
    assert few == budgeted(whole, settings)


@pytest.mark.parametrize("budget", ["0%", "101%", 0, 2, True, "half", "1.2.3%", "1"])
def test_a_budget_that_is_no_share_is_refused(budget: Any) -> None:
    with pytest.raises(RecipeError, match="budget: a share above 0 and at most 1"):
        parse(DataSettings, {"protocol": "transductive", "budget": budget}, "data")


def test_a_budget_of_inputs_that_are_not_adapted_on_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"budget.*transductive.*adapt says"):
        parse(DataSettings, {"budget": "1%"}, "data")


@given(st.integers(1, 60), st.integers(1, 40))
def test_a_limit_chooses_a_seeded_subset_of_each_split(count: int, limit: int) -> None:
    whole = by_fraction(range(count), DataSettings())
    few = limited(whole, limit, 3)
    assert few == limited(whole, limit, 3)
    for split, rows in whole.rows.items():
        assert set(few.rows[split]) <= set(rows)
        assert len(few.rows[split]) == min(limit, len(rows))


# Batches


class Numbers:
    """Inputs that are their row numbers, of given lengths."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = lengths

    def batch(self, rows: Sequence[int]) -> Batch:
        return {"row": torch.tensor(list(rows))}

    def content(self) -> bytes:
        return repr(self.lengths).encode()


def task(adapt: Sequence[int], test: Sequence[int] = (), seed: int = 0, top: int = 7, name: str = "t") -> TaskData:
    count = max([*adapt, *test], default=0) + 1
    lengths = [1 + row * 13 % top for row in range(count)]
    splits = Splits({"adapt": tuple(adapt), "select": (), "test": tuple(test)}, {})
    return TaskData(name, "accuracy", Numbers(lengths), tuple(r % 3 for r in range(count)), splits, seed)


@given(st.integers(1, 90), st.integers(1, 20), st.integers(0, 99))
def test_a_pass_covers_every_row_in_full_batches(count: int, size: int, seed: int) -> None:
    data, steps = task(range(5, 5 + count), seed=seed), -(-count // size)
    for number in range(2):
        batches = [data.adapt_rows(number * steps + step, size) for step in range(steps)]
        seen = Counter(row for batch in batches for row in batch)
        assert all(len(batch) == size for batch in batches)
        assert set(seen) == set(range(5, 5 + count))
        assert max(seen.values()) - min(seen.values()) <= 1


def test_a_batch_is_a_function_of_seed_name_and_step_alone() -> None:
    first, again = task(range(40), seed=3), task(range(40), seed=3)
    forwards = [first.adapt_rows(step, 4) for step in range(30)]
    backwards = [again.adapt_rows(step, 4) for step in reversed(range(30))]
    assert forwards == backwards[::-1]
    assert forwards[0] != task(range(40), seed=4).adapt_rows(0, 4)
    assert forwards[0] != task(range(40), seed=3, name="u").adapt_rows(0, 4)
    assert forwards[:10] != forwards[10:20]
    torch.manual_seed(77)
    assert task(range(40), seed=3).adapt_batch(7, 4)["row"].tolist() == list(forwards[7])


def test_nothing_to_adapt_on_is_refused() -> None:
    with pytest.raises(DataError, match="'t'"):
        task([]).adapt_batch(0, 4)


@given(st.integers(1, 60), st.integers(1, 64), st.integers(1, 30), st.none() | st.integers(1, 9))
def test_scored_batches_cover_the_split_once_within_the_budget(
    count: int, budget: int, top: int, most: int | None
) -> None:
    data = task([], range(3, 3 + count), top=top)
    batches = list(data.scored_batches("test", budget, most))
    assert max(len(rows) for rows, _ in batches) <= (most or count)
    assert sorted(row for rows, _ in batches for row in rows) == list(range(3, 3 + count))
    for rows, batch in batches:
        assert batch["row"].tolist() == rows
        assert len(rows) == 1 or len(rows) * max(data.examples.lengths[row] for row in rows) <= budget


def test_batches_never_hold_labels() -> None:
    data = task(range(9), range(9))
    assert set(data.adapt_batch(0, 2)) == {"row"}
    assert all(set(batch) == {"row"} for _, batch in data.scored_batches("test", 9))


def test_rows_without_labels_cannot_be_scored() -> None:
    data = TaskData("t", "accuracy", Numbers([1, 1]), (1, None), Splits({}, {}), 0)
    assert data.targets([0]) == [1]
    with pytest.raises(DataError, match="'t'"):
        data.targets([0, 1])


def test_fingerprints_tell_inputs_and_splits_apart() -> None:
    prints = [task(range(9)), task(range(8)), task(range(9), range(2)), task(range(9), top=3), task(range(9), name="u")]
    assert len({data.fingerprint() for data in prints}) == 5
    assert task(range(9)).fingerprint() == task(range(9)).fingerprint()


# Readers


# Tasks


class Words(Family):
    """A family whose inputs are their words."""

    kind, keep_embeddings, paths, token_budget, cpu_token_budget = "text-classification", True, False, 64, 64

    def columns(self, spec: TaskSpec) -> list[str]:
        return [spec.columns.text, *([spec.columns.text_pair] if spec.columns.text_pair else [])]

    def key(self, value: Any) -> str:
        return str(value)

    def encode(self, table: Table, spec: TaskSpec, folder: Path) -> tuple[Numbers, list[str]]:
        return Numbers([len(str(text).split()) for text in table[spec.columns.text]]), ["a note"]

    def load(self, folder: Path) -> Any:
        raise NotImplementedError

    def logits(self, module: Any, batch: Batch) -> Any:
        raise NotImplementedError


CONFIG = {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}}


def load(
    folder: Path, spec: TaskSpec, config: dict[str, Any] | None = None, settings: DataSettings | None = None
) -> TaskData:
    own = CONFIG if config is None else config
    return TaskReader(Words(), settings or DataSettings(), folder, seed=1).load("sst", spec, folder, own)


def labelled(folder: Path, labels: list[Any], suffix: str = "jsonl") -> TaskSpec:
    return TaskSpec(
        data=write_rows(folder, suffix, {"text": [f"text {i}" for i in range(len(labels))], "label": labels})
    )


@pytest.mark.parametrize(("labels", "config"), [
    ([0, 1, 1], CONFIG), (["0", "1", "1"], CONFIG), (["bad", "good", "good"], CONFIG), ([0.0, 1.0, 1.0], CONFIG),
    (["bad", 1, "1"], CONFIG), ([0, 1, 1], {}), ([0, 1, 1], {"id2label": {"0": "x", "1": "y"}}),
])  # fmt: skip
def test_labels_are_numbers_or_the_experts_names(tmp_path: Path, labels: list[Any], config: dict[str, Any]) -> None:
    assert load(tmp_path, labelled(tmp_path, labels), config).labels == (0, 1, 1)


@pytest.mark.parametrize("label", [2, -2, "2", "great", 0.5, "Good", float("inf"), [1]])
def test_a_label_that_the_expert_lacks_is_named_with_its_row(tmp_path: Path, label: Any) -> None:
    with pytest.raises(DataError, match=r"'sst': row 2 has label .*bad, good"):
        load(tmp_path, labelled(tmp_path, [0, label, 1]))


def test_the_classes_are_told_by_number_when_they_have_no_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="0 to 2"):
        load(tmp_path, labelled(tmp_path, [0, 3]), {"id2label": {"0": "x", "1": "y", "2": "z"}})


def test_a_label_without_known_classes_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(tmp_path, labelled(tmp_path, ["good"]), {})
    assert "None" not in str(caught.value)


def test_data_without_labels_can_be_adapted_on(tmp_path: Path) -> None:
    spec = TaskSpec(data=write_rows(tmp_path, "jsonl", {"text": ["a", "b", "c"]}))
    data = load(tmp_path, spec, settings=DataSettings(adapt=1, select=0, test=0))
    assert data.labels == (None, None, None)
    assert sorted(data.splits.rows["adapt"]) == [0, 1, 2]


def test_files_per_split_are_stacked_and_overlaps_noted(tmp_path: Path) -> None:
    for split, texts in (("adapt", ["a", "b", "c"]), ("test", ["c", "d"])):
        (tmp_path / split).mkdir()
        write_rows(tmp_path / split, "tsv", {"text": texts, "label": ["0"] * len(texts)})
    spec = TaskSpec(data=SplitData(adapt="adapt/rows.tsv", test="test/rows.tsv"))
    data = load(tmp_path, spec)
    assert dict(data.splits.rows) == {"adapt": (0, 1), "select": (), "test": (3, 4)}
    assert any(note.startswith("1 adapt input") for note in data.notes)
    assert "a note" in data.notes
    assert len(data.labels) == 5


def test_pairs_are_the_same_input_only_when_both_parts_are(tmp_path: Path) -> None:
    table = {"text": ["a", "a", "a"] * 20, "pair": ["x", "y", "x"] * 20, "label": [0, 0, 0] * 20}
    spec = TaskSpec(data=write_rows(tmp_path, "jsonl", table), columns=Columns(text_pair="pair"))
    rows = load(tmp_path, spec, settings=DataSettings(adapt=0.5, select=0.1, test=0.4)).splits.rows
    kinds = {split: {table["pair"][row] for row in own} for split, own in rows.items() if own}
    assert sorted(pair for own in kinds.values() for pair in own) == ["x", "y"]


def test_a_task_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'sst': no data"):
        load(tmp_path, TaskSpec())
    with pytest.raises(DataError, match="'sst': none of adapt"):
        load(tmp_path, TaskSpec(data=SplitData()))


def test_a_limit_caps_every_split(tmp_path: Path) -> None:
    spec = labelled(tmp_path, [0, 1] * 30).model_copy(update={"limit": 5})
    assert {len(rows) for rows in load(tmp_path, spec).splits.rows.values()} == {5}


@pytest.mark.parametrize("label", [None, "", float("nan"), -1])
def test_an_empty_label_is_withheld(tmp_path: Path, label: Any) -> None:
    assert load(tmp_path, labelled(tmp_path, [0, label, 1])).labels == (0, None, 1)


def test_minus_one_is_a_withheld_label_and_scoring_it_is_refused(tmp_path: Path) -> None:
    data = load(tmp_path, labelled(tmp_path, [-1, 1, "-1"]))
    assert data.labels == (None, 1, None)
    with pytest.raises(DataError, match="no labels"):
        data.targets([0])


def test_names_that_look_like_numbers_are_names_as_text(tmp_path: Path) -> None:
    stars = {"id2label": {"0": "1", "1": "2"}, "label2id": {"1": 0, "2": 1}}
    assert load(tmp_path, labelled(tmp_path, ["1", "2"]), stars).labels == (0, 1)
    assert load(tmp_path, labelled(tmp_path, [0, 1]), stars).labels == (0, 1)
