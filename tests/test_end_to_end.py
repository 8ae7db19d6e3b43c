"""From files to files: what a recipe promises, on tiny real architectures."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import adarank
from adarank.adapt import problem as adapt_problem
from adarank.adapt.objectives import OBJECTIVES
from adarank.adapt.problem import Problem
from adarank.cli.main import main
from adarank.data.task import TaskData
from adarank.models.head_inputs import head_inputs, head_parts
from adarank.recipe.reader import load_recipe
from adarank.spectral.mask_file import FILE
from adarank.workflow import adapt as adaptation
from adarank.workflow import context, problem
from adarank.workflow.build_networks import build_models
from adarank.workflow.context import RecipeContext
from adarank.workflow.evaluate import heads_of
from adarank.workflow.load_tasks import load_tasks
from make import agreeing
from text_zoo import ADAPT, TASKS, make_zoo, recipe


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_zoo(tmp_path_factory.mktemp("zoo"))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "gpt2"])
@pytest.mark.parametrize("bare_base", [True, False])
def test_every_architecture_merges_adapts_and_loads(tmp_path: Path, architecture: str, bare_base: bool) -> None:
    folder = make_zoo(tmp_path, architecture, bare_base)
    out = folder / "out"
    record = adarank.merge_recipe(load_recipe(recipe(folder, **{**ADAPT, "adapt": {"steps": 2, "batch_size": 4}})), out)
    assert record["adaptation"]["steps"] == 2
    merged = transformers.AutoModel.from_pretrained(out)
    stored = weights(out)
    names = {name: name if name in stored else f"{merged.base_model_prefix}.{name}" for name in merged.state_dict()}
    held = {name: tensor for name, tensor in merged.state_dict().items() if names[name] in stored}
    assert len(held) > 10
    assert all(torch.equal(tensor, stored[names[name]]) for name, tensor in held.items())
    for task, classes in TASKS.items():
        model = adarank.load_task(out, task)
        assert model(input_ids=torch.tensor([[2, 6, 7, 3]])).logits.shape == (1, classes)


def test_a_loaded_task_gives_the_scored_logits(zoo: Path, tmp_path: Path) -> None:
    """`load_task` and evaluation are two ways to the same network."""
    loaded = load_recipe(recipe(zoo, **ADAPT))
    out = tmp_path / "out"
    adarank.merge_recipe(loaded, out)
    job = adarank.open_job(loaded)
    models = build_models(job)
    models.fill(weights(out).items())
    batch = {"input_ids": torch.tensor([[2, 6, 7, 8, 3]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    with heads_of(out, models):
        for task in TASKS:
            scored = models.modules[task](**batch).logits
            torch.testing.assert_close(adarank.load_task(out, task)(**batch).logits, scored)


@pytest.mark.parametrize("mask", ["binary", "soft"])
def test_masked_reproduces_the_adapted_weights_bit_for_bit(zoo: Path, tmp_path: Path, mask: str) -> None:
    adapted, again = tmp_path / "adapted", tmp_path / "again"
    changes = {**ADAPT, "parameters": {**ADAPT["parameters"], "mask": mask}}
    adarank.merge_recipe(load_recipe(recipe(zoo, **changes)), adapted)
    stored = adarank.MaskFile.load(adapted / FILE).masks.values()
    assert {own.is_floating_point() for own in stored} == {mask == "soft"}
    changes = {"merge_method": "masked", "parameters": {"masks": str(adapted / FILE)}}
    adarank.merge_recipe(load_recipe(recipe(zoo, "masked.yaml", **changes)), again)
    assert same(weights(adapted), weights(again))


def test_adaptation_moves_masks_and_lambda_and_lowers_the_loss(zoo: Path, tmp_path: Path) -> None:
    settings = {**ADAPT, "adapt": {**ADAPT["adapt"], "steps": 40, "keep": "last"}}
    record = adarank.merge_recipe(load_recipe(recipe(zoo, **settings)), tmp_path / "out")
    losses = record["adaptation"]["losses"]
    total = [sum(values) for values in zip(*losses.values(), strict=True)]
    assert sum(total[-5:]) < sum(total[:5])
    masks = adarank.MaskFile.load(tmp_path / "out" / FILE)
    assert masks.kept_share() != record["adaptation"]["kept"][0]
    assert len({round(float(v), 6) for lam in masks.lam.values() for v in lam}) > 10


def test_self_label_of_one_expert_starts_at_zero(zoo: Path, tmp_path: Path) -> None:
    """One expert with λ = 1 and all components is the expert, so its divergence from itself is 0."""
    only = {"models": [{"model": "models/mood", "task": {"name": "mood", "data": "data/mood.tsv"}}]}
    changes = {**only, "merge_method": "adarank", "parameters": {"origin": "pretrained", "rank": 1.0, "lambda": 1.0},
               "adapt": {"steps": 1, "batch_size": 8, "objective": "self-label"}}  # fmt: skip
    record = adarank.merge_recipe(load_recipe(recipe(zoo, **changes)), tmp_path / "out")
    assert record["adaptation"]["losses"]["mood"][0] == pytest.approx(0.0, abs=1e-6)


def test_a_merge_done_twice_gives_the_same_bytes(zoo: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        adarank.merge_recipe(load_recipe(recipe(zoo)), tmp_path / name)
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()


KILLED = """
import os, sys
from pathlib import Path
from adarank.workflow.merge import merge
from adarank.io.writer import TensorFile
from adarank.recipe.reader import load_recipe
import torch
torch.set_num_threads(1)  # as in this process: the number of threads may change the last bits
stop = int(sys.argv[3])
if sys.argv[4] == "adapt":
    def progress(history, steps):
        if history.step == stop: os.kill(os.getpid(), 9)
else:
    progress, write, count = None, TensorFile.write, [0]
    def dying(self, name, tensor):
        count[0] += 1
        if count[0] == stop: os.kill(os.getpid(), 9)
        write(self, name, tensor)
    TensorFile.write = dying
merge(load_recipe(sys.argv[1]), Path(sys.argv[2]), progress=progress)
"""


@pytest.mark.parametrize(("kind", "changes", "stop"), [("adapt", ADAPT, 7), ("free", {}, 9)])
def test_killed_then_run_again_is_uninterrupted(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, changes: dict, stop: int
) -> None:
    path = recipe(zoo, f"killed-{kind}.yaml", **changes)
    out, whole = tmp_path / "out", tmp_path / "whole"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(path), str(out), str(stop), kind], capture_output=True, check=False
    )
    assert done.returncode == -9
    assert not out.exists()
    with monkeypatch.context() as without:
        if kind == "adapt":  # nothing is decomposed anew
            without.delattr(torch.linalg, "svd")
        record = adarank.merge_recipe(load_recipe(path), out)
    adarank.merge_recipe(load_recipe(path), whole)
    assert same(weights(out), weights(whole))
    if kind == "adapt":
        assert record["adaptation"]["resumed_from"] == [6]
        assert (out / FILE).read_bytes() == (whole / FILE).read_bytes()
        assert record["adaptation"]["heads"].keys() == TASKS.keys()
    for task in TASKS:
        heads = [folder / "heads" / task / "head.safetensors" for folder in (out, whole)]
        assert heads[0].read_bytes() == heads[1].read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_resuming_with_other_settings_is_refused(zoo: Path, tmp_path: Path) -> None:
    path = recipe(zoo, "first.yaml", **ADAPT)
    out = tmp_path / "out"
    subprocess.run([sys.executable, "-c", KILLED, str(path), str(out), "7", "adapt"], capture_output=True, check=False)
    other = recipe(zoo, "other.yaml", **{**ADAPT, "parameters": {"rank": 0.5, "lambda": 1.0}})
    with pytest.raises(adarank.AdaRankError, match="belongs to another run"):
        adarank.merge_recipe(load_recipe(other), out)


def test_evaluate_puts_base_merged_and_experts_in_one_table(zoo: Path, tmp_path: Path) -> None:
    loaded = load_recipe(recipe(zoo))
    adarank.merge_recipe(loaded, tmp_path / "out")
    table = adarank.evaluate_recipe(loaded, [tmp_path / "out"])
    assert list(table.rows) == ["base", str(tmp_path / "out"), "experts"]
    assert table.normalised("experts") == pytest.approx(100)
    assert table.protocol == "disjoint"
    assert all(0 <= score <= 100 for row in table.rows.values() for score in row.values())


def test_one_expert_with_lambda_one_scores_as_the_expert(zoo: Path, tmp_path: Path) -> None:
    only = [{"model": "models/mood", "task": {"name": "mood", "data": "data/mood.tsv"}}]
    loaded = load_recipe(recipe(zoo, merge_method="task_arithmetic", models=only, parameters={"lambda": 1.0}))
    adarank.merge_recipe(loaded, tmp_path / "out")
    table = adarank.evaluate_recipe(loaded, [tmp_path / "out"])
    assert table.rows[str(tmp_path / "out")] == table.rows["experts"]


def test_transductive_is_named_by_record_and_table(zoo: Path, tmp_path: Path) -> None:
    loaded = load_recipe(recipe(zoo, **ADAPT, data={"protocol": "transductive"}))
    record = adarank.merge_recipe(loaded, tmp_path / "out")
    assert record["adaptation"]["protocol"] == "transductive"
    assert adarank.evaluate_recipe(loaded).protocol == "transductive"


def test_the_record_accounts_for_inputs_settings_and_tensors(zoo: Path, tmp_path: Path) -> None:
    adarank.merge_recipe(load_recipe(recipe(zoo, **ADAPT)), tmp_path / "out")
    record = json.loads((tmp_path / "out" / "adarank.json").read_text())
    assert set(record["inputs"]) == {"base", *TASKS}
    assert all(len(digest) == 64 for files in record["inputs"].values() for digest in files.values())
    assert record["settings"]["adapt"]["schedule"] == "cosine"
    assert set(record["plan"]["tensors"]) == set(weights(tmp_path / "out"))
    assert record["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_dtype_is_the_bases_unless_asked(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = make_zoo(tmp_path, dtype=dtype)
    adarank.merge_recipe(load_recipe(recipe(folder)), tmp_path / "own")
    adarank.merge_recipe(load_recipe(recipe(folder, dtype="float32")), tmp_path / "asked")
    floats = {t.dtype for t in weights(tmp_path / "own").values() if t.is_floating_point()}
    assert floats == {dtype}
    assert {t.dtype for t in weights(tmp_path / "asked").values() if t.is_floating_point()} == {torch.float32}


def test_an_output_adapted_on_what_is_scored_says_so_in_its_row(zoo: Path, tmp_path: Path) -> None:
    """The recipe that scores may promise disjoint splits; the output's own record decides."""
    short = {**ADAPT, "adapt": {"steps": 1, "batch_size": 4}}
    disjoint = load_recipe(recipe(zoo, **short))
    for name, data in (("peeked", {"protocol": "transductive"}), ("shifted", {"split_seed": 5}), ("clean", {})):
        adarank.merge_recipe(load_recipe(recipe(zoo, f"{name}.yaml", **short, data=data)), tmp_path / name)
    rows = list(adarank.evaluate_recipe(disjoint, [tmp_path / n for n in ("peeked", "shifted", "clean")]).rows)
    assert rows[1].endswith("[transductive]")
    assert "other splits" in rows[2]
    assert rows[3] == str(tmp_path / "clean")


def test_every_objective_adapts_and_tasks_may_have_their_own(zoo: Path, tmp_path: Path) -> None:
    weights = dict.fromkeys(OBJECTIVES, 0.5)
    adapt = {**ADAPT["adapt"], "steps": 3, "objective": weights, "objectives": {"mood": "entropy"}}
    path = recipe(zoo, "all.yaml", **{**ADAPT, "adapt": adapt})
    record = adarank.merge_recipe(load_recipe(path), tmp_path / "out")
    own = recipe(zoo, "own.yaml", **{**ADAPT, "adapt": {**ADAPT["adapt"], "steps": 3, "objective": "entropy"}})
    alone = adarank.merge_recipe(load_recipe(own), tmp_path / "alone")
    losses = [found["adaptation"]["losses"] for found in (record, alone)]
    assert losses[0]["mood"][0] == losses[1]["mood"][0]
    assert losses[0]["colour"][0] != losses[1]["colour"][0]


def test_masks_weights_and_record_are_of_the_kept_step(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A judge that likes step 4 best: the output is that of stopping there."""

    real_judge = Problem.judge

    def judge(self: Problem, most: int | None = None) -> Any:
        real = real_judge(self, most)
        return lambda step: {t: replace(s, agreed=agreeing(1 - abs(step - 4) / 20)) for t, s in real(step).items()}

    settings = {**ADAPT["adapt"], "schedule": "constant", "check_every": 2, "objective": "infomax"}
    monkeypatch.setattr(Problem, "judge", judge)
    long = recipe(zoo, "long.yaml", **{**ADAPT, "adapt": settings})
    record = adarank.merge_recipe(load_recipe(long), tmp_path / "long")["adaptation"]
    short = recipe(zoo, "short.yaml", **{**ADAPT, "adapt": {**settings, "steps": 4, "keep": "last"}})
    other = adarank.merge_recipe(load_recipe(short), tmp_path / "short")["adaptation"]
    assert (record["step_kept"], record["rolled_back"], record["steps"]) == (4, False, 12)
    assert same(weights(tmp_path / "long"), weights(tmp_path / "short"))
    assert same(load_file(tmp_path / "long" / FILE), load_file(tmp_path / "short" / FILE))
    assert record["components_kept"] == other["components_kept"]
    assert list(record["judged"]) == ["0", "2", "4", "6", "8", "10", "12"]


def test_no_label_is_read_by_adapting_and_judging(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def labels(*_: object) -> None:
        raise AssertionError("a label was read")

    real = adaptation.adapt_job

    def watched(run: RecipeContext, method: Any) -> Any:
        return real(
            replace(run, data={task: replace(own, labels=Unreadable()) for task, own in run.data.items()}), method
        )

    class Unreadable(tuple):
        __getitem__ = __iter__ = __len__ = labels

    monkeypatch.setattr(context, "adapt_job", watched)
    monkeypatch.setattr(TaskData, "targets", labels)
    record = adarank.merge_recipe(
        load_recipe(recipe(zoo, **{**ADAPT, "adapt": {"steps": 1, "batch_size": 4}})), tmp_path / "out"
    )
    assert record["adaptation"]["judged_on"] == dict.fromkeys(TASKS, "select")


def test_a_resumed_run_does_not_run_the_experts_again(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_recipe(recipe(zoo, **{**ADAPT, "adapt": {**ADAPT["adapt"], "objective": "features"}}))
    job = adarank.open_job(loaded)
    data, models = load_tasks(job), build_models(job)
    settings = loaded.method().settings
    first = problem.expert_predictions(job, models, data, settings, "mark", tmp_path)
    again = recipe(zoo, **{**ADAPT, "adapt": {**ADAPT["adapt"], "objective": "features"}})
    monkeypatch.setattr(adapt_problem, "expert_predictions", lambda *_: pytest.fail("run again"))
    second = problem.expert_predictions(adarank.open_job(load_recipe(again)), models, data, settings, "mark", tmp_path)
    for task in TASKS:
        assert torch.equal(first[task].logits, second[task].logits)
        assert torch.equal(first[task].features, second[task].features)
    monkeypatch.undo()
    for damage in (b"", b"noise"):
        (tmp_path / problem.FILE).write_bytes(damage)
        assert torch.equal(
            problem.expert_predictions(job, models, data, settings, "mark", tmp_path)["mood"].logits,
            first["mood"].logits,
        )
    monkeypatch.setattr(adapt_problem, "expert_predictions", boom)
    with pytest.raises(ZeroDivisionError):
        problem.expert_predictions(job, models, data, settings, "another mark", tmp_path)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "gpt2"])
def test_features_are_what_the_head_turns_into_logits(tmp_path: Path, architecture: str) -> None:
    """Equal for one input alone and beside longer ones, and of the body's width."""
    job = adarank.open_job(load_recipe(recipe(make_zoo(tmp_path, architecture), **ADAPT)))
    models = build_models(job)
    module, parts = models.modules["mood"], head_parts(models, "mood")
    short = {"input_ids": torch.tensor([[2, 6, 3]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    padded = {"input_ids": torch.tensor([[2, 6, 3, 0, 0], [2, 7, 8, 9, 3]]),
              "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])}  # fmt: skip
    with torch.no_grad(), head_inputs(module, parts) as seen:
        module(**short)
        module(**padded)
    assert [tuple(own.shape) for own in seen] == [(1, 16), (2, 16)]
    torch.testing.assert_close(seen[0][0], seen[1][0])
    module(**short)
    assert len(seen) == 2  # nothing is taken once it is closed


def boom(*_: object, **__: object) -> None:
    raise ZeroDivisionError


def test_the_command_line_says_which_step_was_kept_and_why(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zero = {**ADAPT["adapt"], "lr_masks": 0.0, "lr_lambda": 0.0, "steps": 2, "check_every": 1}
    assert main(["merge", str(recipe(zoo, **{**ADAPT, "adapt": zero})), str(tmp_path / "still")]) == 0
    shown = capsys.readouterr()
    assert "rolled back to the start: none of 2 judged steps was better" in shown.out
    assert "agreement at step 2: mean" in shown.err
    last = {**zero, "keep": "last"}
    assert main(["merge", str(recipe(zoo, **{**ADAPT, "adapt": last})), str(tmp_path / "last")]) == 0
    assert "kept step 2: the last step" in capsys.readouterr().out
