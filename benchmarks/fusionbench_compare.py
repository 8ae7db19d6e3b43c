"""adarank beside FusionBench: the same models and settings merged by both, method by method, compared tensor by tensor.

    python benchmarks/fusionbench_compare.py --venv VENV [--records FILE]

VENV is an environment of its own; it is made, and torch and fusion-bench are installed there from the registry with
all their dependencies, if it is not there yet. `fusionbench_driver.py` runs in it and calls FusionBench's own
algorithms on its own model pools. The models are made by `fusionbench_models.py`: a base and two, three or four experts
of 32-bit floats, which are the base plus seeded noise, part of it shared; matrices wide, tall and square, biases, norms,
a table of positions, a kernel. A few are made to show one thing.

What is compared is the change from the base, relative to the largest change of the tensor (`peers.relative`). Where
the two differ by more than rounding, FusionBench's rule is computed from its formula as well (`fusionbench_rules.py`),
and the difference from that shows whether the explanation is the whole of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fusionbench_rules as rules
import torch
from fusionbench_models import NOISE, SHAPES, SHARED, SPREAD, Experts, Models, State, classifier, inputs, models
from fusionbench_rules import Rule
from peers import environment, head, largest, last_line
from records import FOLDER, Records
from safetensors.torch import load_file, save_file
from torch import Tensor

import adarank
from adarank.spectral.mask_file import MaskFile

REQUIREMENTS = ("torch==2.13.0", "fusion-bench==0.2.33")
COUNTED = ("fusion-bench", "torch", "numpy", "lightning", "transformers")
ROUNDING = 1e-5
WEIGHTS = (0.2, 0.5, 1.0, 0.7)
DENSITY, DROP, TALL = 0.2, 0.3, 0.4
EXPERTS = ("two", "three", "four")


@dataclass(frozen=True)
class Row:
    """One method as both have it.

    Attributes:
        name: as the table calls it.
        models: which of `models()` it is merged on.
        call, settings: FusionBench's algorithm, and its settings from (base, experts).
        ours: adarank's merge of (base, experts).
        rule: FusionBench's formula, where it is another one.
        why: whose choice the difference is, with the formula.
        entries: compare only what both changed (what is dropped at random differs).
    """

    name: str
    models: tuple[str, ...]
    call: str
    settings: Callable[[State, Experts], dict[str, Any]]
    ours: Callable[[State, Experts], State]
    rule: Rule | None = None
    why: str = ""
    entries: bool = False


def fixed(**settings: Any) -> Callable[[State, Experts], dict[str, Any]]:
    return lambda base, experts: settings


def by(method: str, **parameters: Any) -> Callable[[State, Experts], State]:
    """adarank's method with these parameters; `scale` stands for lambda, which Python reserves."""
    given = {"lambda" if key == "scale" else key: value for key, value in parameters.items()}
    return lambda base, experts: adarank.merge(base, experts, method, given)


def each(method: str, **parameters: Any) -> Callable[[State, Experts], State]:
    """A task-aware method of adarank's: every task's tensors as TASK::TENSOR."""

    def merged(base: State, experts: Experts) -> State:
        found = adarank.merge_each(base, experts, method, parameters)
        return {f"{task}::{name}": tensor for task, own in found.items() for name, tensor in own.items()}

    return merged


def informed(method: str, silent: bool = False, **parameters: Any) -> Callable[[State, Experts], State]:
    """A method from statistics, of each classifier on its own inputs."""

    def merged(base: State, experts: Experts) -> State:
        batches = {task: [inputs(number, silent)] for number, task in enumerate(experts)}
        modules = {task: classifier(own) for task, own in experts.items()}
        return adarank.merge(classifier(base), modules, method, parameters, batches=batches)

    return merged


def weights(experts: Experts) -> dict[str, float]:
    return dict(zip(experts, WEIGHTS, strict=False))


def coefficients(base: State, experts: Experts) -> dict[str, list[float]]:
    """Tensor -> a coefficient of every expert, each another one."""
    return {name: [((7 * t + 3 * i) % 10 + 1) / 20 for t in range(len(experts))] for i, name in enumerate(base)}


def layer_wise(base: State, experts: Experts) -> State:
    """The method `masked` on what adamerging would save."""
    lam = {name: torch.tensor(values) for name, values in coefficients(base, experts).items()}
    return adarank.merge(base, experts, "masked", {"masks": MaskFile("pretrained", tuple(experts), lam, {}, {}, {})})


TIES_SETTINGS = {"threshold": 100 * DENSITY, "remove_keys": []}
ONE_MORE = (
    "FusionBench, like the TIES authors' code, keeps ⌊density·d⌋ + 1 entries: all that are ≥ the (d - k)-th smallest"
    " |τ|, k = ⌊density·d⌋. adarank keeps k, as Algorithm 1 says."
)
STOCK = (
    "FusionBench: c = cos(mean of the angles), t = T·c / ((T - 1)·c + 1 + 1e-8), and 1e-8 beside ‖τ_a‖‖τ_b‖. adarank and"
    " mergekit: c = mean of the cosines. The paper's Eq. 4 takes all angles as equal and says neither."
)
ROWS = (
    Row("average", EXPERTS, "average", fixed(), by("average")),
    Row("weighted average", EXPERTS, "weighted_average",
        lambda b, e: {"normalize": True, "weights": list(weights(e).values())},
        lambda b, e: adarank.merge(b, e, "linear", {"weight": weights(e)})),
    Row("linear interpolation", ("pair",), "interpolation", fixed(t=0.3),
        lambda b, e: adarank.merge(None, {"base": b, **e}, "linear", {"weight": {"base": 0.7, "expert0": 0.3}}),
        why="FusionBench 0.2.33 cannot run it: it asserts that the list of the models' names equals 2, not its length."),
    Row("slerp", ("pair",), "slerp", fixed(t=0.3), by("slerp", t=0.3)),
    Row("model_stock, two experts", ("two",), "model_stock", fixed(), by("model_stock"), rules.model_stock, STOCK),
    Row("model_stock, three and four", EXPERTS[1:], "model_stock", fixed(), by("model_stock"), rules.model_stock, STOCK),
    Row("model_stock, a tensor of one value", ("scalar",), "model_stock", fixed(), by("model_stock"), rules.model_stock,
        "Task vectors at 180° with two experts: 1 + (T - 1)·c is 0. adarank, like mergekit, stays at the base (t = 0);"
        " FusionBench divides by what rounding and 1e-8 leave, here t ≈ -1e6."),
    Row("task_arithmetic", EXPERTS, "task_arithmetic", fixed(scaling_factor=0.3), by("task_arithmetic", scale=0.3)),
    Row("ties_merging, sum", EXPERTS, "ties", fixed(scaling_factor=0.3, merge_func="sum", **TIES_SETTINGS),
        by("ties_merging", density=DENSITY), rules.ties(DENSITY, 0.3), ONE_MORE),
    Row("ties_merging, mean", EXPERTS, "ties", fixed(scaling_factor=1.0, merge_func="mean", **TIES_SETTINGS),
        by("ties_merging", density=DENSITY, combine="mean"), rules.ties(DENSITY, 1.0, mean=True), "As for the sum."),
    Row("ties_merging, entries that cancel", ("cancelling",), "ties",
        fixed(scaling_factor=0.3, merge_func="sum", **TIES_SETTINGS), by("ties_merging", density=DENSITY), rules.ties(DENSITY, 0.3),
        "Where Σ_t s_t = 0, FusionBench, like the TIES authors' code, takes the sign that most entries of the model have;"
        " adarank takes γ = sign(0) = 0, as the formula says, and adds nothing."),
    Row("dare, nothing dropped", EXPERTS, "dare",
        fixed(scaling_factor=0.3, sparsity_ratio=0.0, only_on_linear_weights=False), by("dare", drop=0.0, scale=0.3)),
    Row("dare, entries that both keep", ("pair",), "dare",
        fixed(scaling_factor=1.0, sparsity_ratio=DROP, only_on_linear_weights=False), by("dare", drop=DROP, scale=1.0),
        entries=True),
    Row("dare_ties_merging, nothing dropped", EXPERTS, "dare_ties",
        fixed(sparsity_ratio=0.0, only_on_linear_weights=False, rescale=True, scaling_factor=0.3, merge_func="sum",
              **TIES_SETTINGS),
        by("dare_ties_merging", drop=0.0, density=DENSITY, scale=0.3), rules.ties(DENSITY, 0.3), "As for ties_merging."),
    Row("tsv_m", EXPERTS, "tsv_m", fixed(alpha=1.0), by("tsv_m")),
    Row("tsv_m, rank below the number of tasks", ("narrow",), "tsv_m", fixed(alpha=1.0), by("tsv_m"), rules.tsv_m,
        "k = ⌊r/T⌋ = 0: FusionBench, like the authors' code, leaves such a matrix at the base. adarank keeps max(1, k)"
        " components of each task while there is room for orthogonal ones."),
    Row("iso_c", EXPERTS, "iso_c", fixed(scaling_factor=1.0), by("iso_c")),
    Row("iso_cts", EXPERTS, "iso_cts", fixed(scaling_factor=1.0, common_space_fraction=0.8), by("iso_cts")),
    Row("adamerging, task-wise λ given", EXPERTS, "task_wise", lambda b, e: {"weights": list(weights(e).values())},
        lambda b, e: adarank.merge(b, e, "task_arithmetic", {"weight": weights(e)})),
    Row("adamerging, layer-wise λ given", EXPERTS, "layer_wise", lambda b, e: {"weights": coefficients(b, e)}, layer_wise),
    Row("tall_masks", EXPERTS, "tall_masks", fixed(tall_mask_lambda=TALL), each("tall_masks", lambda_mask=TALL),
        why="FusionBench 0.2.33 cannot run it on modules with parameters: it subtracts tensors from parameters, which its own"
        " check of equal types refuses."),
    Row("tall_masks, all tensors as buffers", EXPERTS, "tall_masks, buffers", fixed(tall_mask_lambda=TALL),
        each("tall_masks", lambda_mask=TALL), rules.tall_masks(TALL),
        "FusionBench's mask is [|θ₀ - τ_t| > α |τ - τ_t|]: it hands the pretrained weights θ₀ to a formula in task vectors,"
        " where the base is 0. adarank's is the paper's [|τ_t| > α |τ - τ_t|]."),
    Row("regmean", ("classifier",), "regmean", fixed(reduce_non_diagonal_ratio=0.95), informed("regmean", off_diagonal=0.95),
        why="FusionBench inverts Σ Ĝ_t in float32, adarank solves in float64."),
    Row("regmean, an input that is always 0", ("classifier",), "regmean, silent", fixed(reduce_non_diagonal_ratio=0.95),
        informed("regmean", True, off_diagonal=0.95),
        why="Σ Ĝ_t has a row of zeros, and FusionBench inverts it. adarank keeps the mean of the experts there."),
    Row("fisher", ("classifier",), "fisher", fixed(), informed("fisher"), rules.fisher(rules.squares_of_sums),
        "FusionBench squares the gradient of a whole batch, summed over inputs and classes, (Σ_x Σ_y √p_y ∂ log p_y)² / n; the"
        " Fisher information is the mean over inputs of Σ_y p_y (∂ log p_y)², which adarank takes. And the floor, below."),
    Row("fisher, information given", ("classifier",), "fisher, given", fixed(), informed("fisher"), rules.fisher(rules.squares),
        "The floor: FusionBench weighs by (F_t + 1e-6) / (‖F_t‖ + 1e-6), adarank by max(F_t / rms(F_t), 1e-6), the same"
        " share for gradients of every size. They part the more, the smaller F is beside 1e-6."),
    Row("emr", EXPERTS, "emr", fixed(), each("emr")),
    Row("tsv_c", ("three",), "tsv_c", fixed(), each("tsv_c"), why="FusionBench 0.2.33 names it and has not written it."),
)  # fmt: skip


def jobs(made_models: Mapping[str, Models]) -> list[dict[str, Any]]:
    """Every row on each of its models, as the driver takes them."""
    return [
        {"row": row.name, "models": name, "call": row.call, "settings": row.settings(*made_models[name]),
         "out": f"{number}-{name}.safetensors"}
        for number, row in enumerate(ROWS) for name in row.models
    ]  # fmt: skip


def write_models(folder: Path, given: Mapping[str, Models]) -> None:
    """As the driver reads them; beside the classifiers, what `fisher, given` is given."""
    for name, (base, experts) in given.items():
        (folder / name).mkdir()
        for file, state in {"base": base, **experts}.items():
            save_file(dict(state), folder / name / f"{file}.safetensors")
    (folder / "information").mkdir()
    for number, (task, state) in enumerate(given["classifier"][1].items()):
        save_file(dict(rules.squares(state, number)), folder / "information" / f"{task}.safetensors")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    python = environment(arguments.venv, REQUIREMENTS)
    record = head(
        "FusionBench",
        "the same models and settings merged by adarank and by FusionBench's algorithms",
        "python benchmarks/fusionbench_compare.py --venv VENV",
        {"shapes": SHAPES, "spread": SPREAD, "noise": NOISE, "shared_noise": SHARED, "rounding": ROUNDING},
        arguments.seed, python, COUNTED,
    )  # fmt: skip
    given = models(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_models(folder, given)
        todo = jobs(given)
        (folder / "jobs.json").write_text(json.dumps(todo))
        driver = Path(__file__).with_name("fusionbench_driver.py")
        errors = last_line([str(python), str(driver.absolute()), str(folder)], folder)
        found = {
            (job["row"], job["models"]): (folder / job["out"], error) for job, error in zip(todo, errors, strict=True)
        }
        record["rows"] = [summary(row, given, {name: found[row.name, name] for name in row.models}) for row in ROWS]
    return record


def summary(row: Row, given: Mapping[str, Models], theirs: Mapping[str, tuple[Path, str | None]]) -> dict[str, Any]:
    """A row's largest difference over its models, and what else there is to say of it."""
    refused = next((error for _, error in theirs.values() if error), None)
    result: dict[str, Any] = {"name": row.name, "models": row.models, "algorithm": row.call,
                              "settings": row.settings(*given[row.models[0]])}  # fmt: skip
    if refused:
        result["refused"] = refused
    else:
        by_models = {name: difference(row, given[name], load_file(theirs[name][0])) for name in row.models}
        for key in ("max_relative_difference", "values_unequal", "values", "with_their_rule"):
            every = [found[key] for found in by_models.values() if key in found]
            if every:
                result[key] = sum(every) if key.startswith("values") else max(every)
        result["by_models"] = by_models
        for shares in (found["share_kept"] for found in by_models.values() if "share_kept" in found):
            seen = " and ".join(f"{100 * share:.1f}% by {side}" for side, share in shares.items())
            result["note"] = f"Each draws its own entries: kept are {seen}, {100 * (1 - DROP):.0f}% expected."
    if refused or result["max_relative_difference"] > ROUNDING:
        result["why"] = row.why
    print(
        f"{row.name:40s} {refused or result['max_relative_difference']} {result.get('with_their_rule', '')}", flush=True
    )
    return result


def difference(row: Row, given: Models, theirs: State) -> dict[str, Any]:
    """Of the changes from the base; also from FusionBench's rule as computed here."""
    base, experts = given
    ours, changed = changes(row.ours(base, experts), base), changes(theirs, base)
    shares: dict[str, float] = {}
    if row.entries:
        shares = {side: kept(own) for side, own in (("adarank", ours), ("fusion-bench", changed))}
        both = {name: (own != 0) & (changed[name] != 0) for name, own in ours.items()}
        ours, changed = ({name: own[name][where] for name, where in both.items()} for own in (ours, changed))
    worst, where = largest(ours, changed)
    found = {"max_relative_difference": worst, "in": where, "values_unequal": unequal(ours, changed),
             "values": sum(own.numel() for own in ours.values())}  # fmt: skip
    if shares:
        found["share_kept"] = shares
    if row.rule is not None:
        found["with_their_rule"] = largest(changes(row.rule(base, experts), base), changed)[0]
    return found


def unequal(ours: State, theirs: State) -> int:
    """How many values differ by more than rounding."""
    return sum(
        int(((ours[n] - own).abs() > ROUNDING * own.abs().max()).sum()) for n, own in theirs.items() if own.numel()
    )


def changes(state: State, base: State) -> dict[str, Tensor]:
    """Tensor, or TASK::TENSOR, less the base's."""
    return {name: tensor - base[name.split("::")[-1]] for name, tensor in state.items()}


def kept(change: State) -> float:
    return sum(int((own != 0).sum()) for own in change.values()) / sum(own.numel() for own in change.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, required=True, help="FusionBench's environment; made if it is not there")
    parser.add_argument("--records", type=Path, metavar="FILE", default=FOLDER / "peers.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    Records(arguments.records).write(run(arguments))


if __name__ == "__main__":
    sys.exit(main())
