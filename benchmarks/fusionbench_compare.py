"""adarank beside FusionBench: the same models and settings merged by both, method by method, compared tensor by tensor.

    python benchmarks/fusionbench_compare.py --venv VENV [--record records/peers/fusion-bench.json]

VENV is an environment of its own; it is made, and torch and fusion-bench are installed there from the registry with
all their dependencies, if it is not there yet. `fusionbench_driver.py` runs in it and calls FusionBench's own
algorithms on its own model pools. The models are made here: a base and two, three or four experts of 32-bit floats,
which are the base plus seeded noise, part of it shared; matrices wide, tall and square, biases, norms, a table of
positions, a kernel. A few are made to show one thing (`models`).

What is compared is the change from the base, relative to the largest change of the tensor (`peers.relative`). Where
the two differ by more than rounding, FusionBench's rule is reckoned here from its formula as well, and the difference
from that shows whether the explanation is the whole of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from peers import State, environment, head, largest, last_line
from safetensors.torch import load_file, save_file
from torch import Tensor

import adarank
from adarank.masks import MaskFile
from adarank.writer import write_json

REQUIREMENTS = ("torch==2.13.0", "fusion-bench==0.2.33")
COUNTED = ("fusion-bench", "torch", "numpy", "lightning", "transformers")
SHAPES: dict[str, tuple[int, ...]] = {
    "positions": (1, 9, 12),
    "patches.weight": (12, 3, 4, 4),
    "patches.bias": (12,),
    "words.weight": (40, 12),
    "layers.0.norm.weight": (12,),
    "layers.0.qkv.weight": (36, 12),
    "layers.0.qkv.bias": (36,),
    "layers.0.out.weight": (12, 12),
    "layers.1.up.weight": (24, 16),
    "layers.1.up.bias": (24,),
    "layers.1.down.weight": (16, 24),
    "layers.1.mix.weight": (32, 32),
}
SPREAD, NOISE, SHARED = 0.05, 0.02, 0.02
ROUNDING = 1e-5
WEIGHTS = (0.2, 0.5, 1.0, 0.7)
DENSITY, DROP = 0.2, 0.3
EXPERTS = ("two", "three", "four")
Experts = Mapping[str, State]
Models = tuple[State, Experts]


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
    rule: Callable[[State, Experts], State] | None = None
    why: str = ""
    entries: bool = False


def fixed(**settings: Any) -> Callable[[State, Experts], dict[str, Any]]:
    return lambda base, experts: settings


def by(method: str, **parameters: Any) -> Callable[[State, Experts], State]:
    """adarank's method with these parameters; `scale` stands for lambda, which Python reserves."""
    given = {"lambda" if key == "scale" else key: value for key, value in parameters.items()}
    return lambda base, experts: adarank.merge(base, experts, method, given)


def models(seed: int) -> dict[str, Models]:
    """Name -> base and experts.

    pair, two, three, four: one to four experts. narrow: three, with a matrix of two rows. scalar: two, with a tensor of
    one value that they move apart. cancelling: two, with a bias that they move by opposite amounts, exactly.
    """
    sizes = {"pair": 1, "two": 2, "three": 3, "four": 4, "narrow": 3, "scalar": 2, "cancelling": 2}
    extra = {"narrow": {"last.weight": (2, 16)}, "scalar": {"temperature": ()}, "cancelling": {"last.bias": (8,)}}
    found: dict[str, Models] = {}
    for number, (name, tasks) in enumerate(sizes.items()):
        found[name] = made(
            {**SHAPES, **extra.get(name, {})}, tasks, torch.Generator().manual_seed(1000 * seed + number)
        )
    for name, tensor, moves in (("scalar", "temperature", (0.1, -0.05)), ("cancelling", "last.bias", (0.5, -0.5))):
        base, experts = found[name]
        base[tensor].zero_()
        for own, move in zip(experts.values(), moves, strict=True):
            own[tensor].fill_(move)
    return found


def made(shapes: Mapping[str, tuple[int, ...]], tasks: int, source: torch.Generator) -> Models:
    def noise(scale: float) -> dict[str, Tensor]:
        return {name: scale * torch.randn(shape, generator=source) for name, shape in shapes.items()}

    base, shared = noise(SPREAD), noise(SHARED)
    own = {f"expert{i}": noise(NOISE) for i in range(tasks)}
    return base, {task: {n: base[n] + shared[n] + noisy[n] for n in shapes} for task, noisy in own.items()}


def weights(experts: Experts) -> dict[str, float]:
    return dict(zip(experts, WEIGHTS, strict=False))


def coefficients(base: State, experts: Experts) -> dict[str, list[float]]:
    """Tensor -> a coefficient of every expert, each another one."""
    return {name: [((7 * t + 3 * i) % 10 + 1) / 20 for t in range(len(experts))] for i, name in enumerate(base)}


def layer_wise(base: State, experts: Experts) -> State:
    """The method `masked` on what adamerging would save."""
    lam = {name: torch.tensor(values) for name, values in coefficients(base, experts).items()}
    return adarank.merge(base, experts, "masked", {"masks": MaskFile("pretrained", tuple(experts), lam, {}, {}, {})})


# FusionBench's rules, where they are others


def ties(base: State, experts: Experts, mean: bool = False, scale: float = 0.3) -> State:
    """One entry more than ⌊density·d⌋ is kept; where the sum is 0 the sign is that of the sum of all signs."""
    names = sorted(base)
    flat = torch.stack([torch.cat([(own[n] - base[n]).flatten() for n in names]) for own in experts.values()])
    least = flat.abs().topk(int(DENSITY * flat.shape[1]) + 1).values[:, -1:]
    kept = torch.where(flat.abs() >= least, flat, 0.0)
    sign = kept.sum(0).sign()
    sign[sign == 0] = sign.sum().sign()
    agree = kept * (kept.sign() == sign)
    total = agree.sum(0) / ((agree != 0).sum(0).clamp(min=1) if mean else 1)
    parts = total.split([base[n].numel() for n in names])
    return {n: base[n] + scale * part.reshape(base[n].shape) for n, part in zip(names, parts, strict=True)}


def model_stock(base: State, experts: Experts) -> State:
    """The mean of the angles, not of their cosines; 1e-8 is added to both divisors."""
    count, found = len(experts), {}
    for name, start in base.items():
        deltas = [own[name] - start for own in experts.values()]
        angles = [
            torch.acos(((a * b).sum() / (((a**2).sum() * (b**2).sum()).sqrt() + 1e-8)).clamp(-1, 1)).double()
            for a, b in combinations(deltas, 2)
        ]
        cosine = float(torch.stack(angles).mean().cos())
        share = count * cosine / ((count - 1) * cosine + 1 + 1e-8)
        found[name] = share * sum(own[name] for own in experts.values()) / count + (1 - share) * start
    return found


def tsv_m(base: State, experts: Experts) -> State:
    """⌊r/T⌋ = 0 components where the rank is below the number of tasks: the base."""
    found = dict(adarank.merge(base, experts, "tsv_m"))
    narrow = [n for n, tensor in base.items() if tensor.dim() == 2 and min(tensor.shape) < len(experts)]
    return {**found, **{name: base[name] for name in narrow}}


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
    Row("model_stock, two experts", ("two",), "model_stock", fixed(), by("model_stock"), model_stock, STOCK),
    Row("model_stock, three and four", EXPERTS[1:], "model_stock", fixed(), by("model_stock"), model_stock, STOCK),
    Row("model_stock, a tensor of one value", ("scalar",), "model_stock", fixed(), by("model_stock"), model_stock,
        "Task vectors at 180° with two experts: 1 + (T - 1)·c is 0. adarank, like mergekit, stays at the base (t = 0);"
        " FusionBench divides by what rounding and 1e-8 leave, here t ≈ -1e5."),
    Row("task_arithmetic", EXPERTS, "task_arithmetic", fixed(scaling_factor=0.3), by("task_arithmetic", scale=0.3)),
    Row("ties_merging, sum", EXPERTS, "ties", fixed(scaling_factor=0.3, merge_func="sum", **TIES_SETTINGS),
        by("ties_merging", density=DENSITY), ties, ONE_MORE),
    Row("ties_merging, mean", EXPERTS, "ties", fixed(scaling_factor=1.0, merge_func="mean", **TIES_SETTINGS),
        by("ties_merging", density=DENSITY, combine="mean"), lambda b, e: ties(b, e, True, 1.0), ONE_MORE),
    Row("ties_merging, entries that cancel", ("cancelling",), "ties",
        fixed(scaling_factor=0.3, merge_func="sum", **TIES_SETTINGS), by("ties_merging", density=DENSITY), ties,
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
        by("dare_ties_merging", drop=0.0, density=DENSITY, scale=0.3), ties, ONE_MORE),
    Row("tsv_m", EXPERTS, "tsv_m", fixed(alpha=1.0), by("tsv_m")),
    Row("tsv_m, rank below the number of tasks", ("narrow",), "tsv_m", fixed(alpha=1.0), by("tsv_m"), tsv_m,
        "k = ⌊r/T⌋ = 0: FusionBench, like the authors' code, leaves such a matrix at the base. adarank keeps max(1, k)"
        " components of each task while there is room for orthogonal ones."),
    Row("iso_c", EXPERTS, "iso_c", fixed(scaling_factor=1.0), by("iso_c")),
    Row("iso_cts", EXPERTS, "iso_cts", fixed(scaling_factor=1.0, common_space_fraction=0.8), by("iso_cts")),
    Row("adamerging, task-wise λ given", EXPERTS, "task_wise", lambda b, e: {"weights": list(weights(e).values())},
        lambda b, e: adarank.merge(b, e, "task_arithmetic", {"weight": weights(e)})),
    Row("adamerging, layer-wise λ given", EXPERTS, "layer_wise", lambda b, e: {"weights": coefficients(b, e)}, layer_wise),
)  # fmt: skip


def jobs(made_models: Mapping[str, Models]) -> list[dict[str, Any]]:
    """Every row on each of its models, as the driver takes them."""
    return [
        {"row": row.name, "models": name, "call": row.call, "settings": row.settings(*made_models[name]),
         "out": f"{number}-{name}.safetensors"}
        for number, row in enumerate(ROWS) for name in row.models
    ]  # fmt: skip


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    python = environment(arguments.venv, REQUIREMENTS)
    record = head(
        "the same models and settings merged by adarank and by FusionBench's algorithms",
        "python benchmarks/fusionbench_compare.py --venv VENV",
        {"shapes": SHAPES, "spread": SPREAD, "noise": NOISE, "shared_noise": SHARED, "rounding": ROUNDING},
        arguments.seed, python, COUNTED,
    )  # fmt: skip
    given = models(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, (base, experts) in given.items():
            (folder / name).mkdir()
            for file, state in {"base": base, **experts}.items():
                save_file(dict(state), folder / name / f"{file}.safetensors")
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
    if refused or result["max_relative_difference"] > ROUNDING:
        result["why"] = row.why
    print(
        f"{row.name:40s} {refused or result['max_relative_difference']} {result.get('with_their_rule', '')}", flush=True
    )
    return result


def difference(row: Row, given: Models, theirs: State) -> dict[str, Any]:
    """Of the changes from the base; also from FusionBench's rule as reckoned here."""
    base, experts = given
    ours, changed = changes(row.ours(base, experts), base), changes(theirs, base)
    shares = {}
    if row.entries:
        shares = {"share_kept": {side: kept(own) for side, own in (("adarank", ours), ("fusion-bench", changed))},
                  "share_expected": 1 - DROP}  # fmt: skip
        both = {name: (ours[name] != 0) & (changed[name] != 0) for name in base}
        ours, changed = ({name: own[name][both[name]] for name in base} for own in (ours, changed))
    worst, where = largest(ours, changed)
    found = {"max_relative_difference": worst, "in": where, "values_unequal": unequal(ours, changed),
             "values": sum(own.numel() for own in ours.values()), **shares}  # fmt: skip
    if row.rule is not None:
        found["with_their_rule"] = largest(changes(row.rule(base, experts), base), changed)[0]
    return found


def unequal(ours: State, theirs: State) -> int:
    """How many values differ by more than rounding."""
    return sum(
        int(((ours[n] - own).abs() > ROUNDING * own.abs().max()).sum()) for n, own in theirs.items() if own.numel()
    )


def changes(state: State, base: State) -> dict[str, Tensor]:
    return {name: state[name] - base[name] for name in base}


def kept(change: State) -> float:
    return sum(int((own != 0).sum()) for own in change.values()) / sum(own.numel() for own in change.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, required=True, help="FusionBench's environment; made if it is not there")
    parser.add_argument("--record", type=Path, default=Path("records/peers/fusion-bench.json"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    record = run(arguments)
    arguments.record.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.record, record)


if __name__ == "__main__":
    sys.exit(main())
