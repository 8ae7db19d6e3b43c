"""One adaptation step by adarank's engine beside the same step by plain autograd: time and peak memory.

    python benchmarks/step_vs_autograd.py FOLDER [--masks binary] [--steps 20] [--threads 2] [--records FILE]

FOLDER holds `models/` and `text/` as examples/minilm-8/README.md describes. Both sides adapt the recipes
adarank-cart.yaml (few components kept) and adarank-ta.yaml (all kept) of that folder, on the same batches.

The autograd side is the formula written down: masks by a straight-through function, every merged tensor

    W = origin + Σ_t λ_t U_t diag(b_t∘s_t) V_tᵀ        other tensors: origin + Σ_t λ_t δ_t

built in the graph, each task's network called with the same W, the entropies summed, one backward, Adam. By default
the sum over tasks is one product of all tasks' components side by side, the faster way to write it; --by-task writes
one product per task. Times are the processor's, of all threads, in one process, steps of the two sides and of the networks alone (every task's
forward and backward pass, no masks) in turn; memory in a process per side. Masks are binary, by a straight-through function, or soft.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from adarank.cli.threads import wait_passively

wait_passively()  # before PyTorch is loaded

import torch
from records import FOLDER, Records
from torch import Tensor
from torch.func import functional_call

from adarank.adapt.history import History
from adarank.adapt.live_weights import Learn, LiveWeights, Precision
from adarank.adapt.loop import adapt
from adarank.adapt.objectives import entropy
from adarank.adapt.settings import AdaptSettings
from adarank.io.record import machine, versions
from adarank.models import TaskModels
from adarank.models.tied import module_keys
from adarank.recipe.job import Job, open_job
from adarank.recipe.reader import load_recipe, parse_recipe
from adarank.spectral.blocks import Blocks, build_blocks
from adarank.spectral.masks import MaskKind, pace, top_mask
from adarank.spectral.svd import as_matrix
from adarank.workflow.build_networks import build_models
from adarank.workflow.load_tasks import load_tasks
from adarank.workflow.problem import problem_of

EXAMPLES = Path(__file__).parent.parent / "examples" / "minilm-8"
STARTS = {"CART": "adarank-cart", "TA": "adarank-ta"}
SAMPLE_SECONDS = 0.005
CHECKED_STEPS = 2


class Setup:
    """A recipe's job, data, networks and spectra: what both sides work on."""

    def __init__(self, start: str, cache: Path, arguments: argparse.Namespace) -> None:
        self.masks: MaskKind = arguments.masks
        self.precision: Precision = arguments.precision
        given = load_recipe(EXAMPLES / f"{STARTS[start]}.yaml").model_dump(
            mode="json", by_alias=True, exclude_unset=True
        )
        self.job: Job = open_job(parse_recipe(given, arguments.folder.resolve()))
        self.method, settings = self.job.method, self.job.method.settings
        size = {"batch_size": arguments.batch_size} if arguments.batch_size else {}
        self.settings: AdaptSettings = settings.model_copy(update={"objective": "entropy", **size})
        torch.manual_seed(self.job.recipe.seed)
        self.data = load_tasks(self.job)
        self.models: TaskModels = build_models(self.job)
        self.blocks: dict[str, Blocks] = self._blocks(cache)

    def _blocks(self, cache: Path) -> dict[str, Blocks]:
        """The spectra, which the first process computes and the next ones read."""
        if not cache.exists():
            torch.save(build_blocks(self.job.network, self.method.origin), cache)
        with torch.serialization.safe_globals([Blocks]):
            found: dict[str, Blocks] = torch.load(cache, weights_only=True)
        return found

    def live(self) -> LiveWeights:
        learn = Learn(clamp=self.method.clamp, mask=self.masks, precision=self.precision)
        merged = {name: self.models.shared[name] for name in self.job.network.merged()}
        return LiveWeights(merged, self.blocks, learn, self.method.scale, self.method.rank)

    def run_engine(self, steps: int, progress: Any = None) -> LiveWeights:
        live = self.live()
        settings = self.settings.model_copy(update={"steps": steps})
        losses = problem_of(self.job, self.models, self.data, settings, {}).losses()
        adapt(live, losses, settings, progress=progress and (lambda history, _: progress(live, history)))
        return live


class StraightThrough(torch.autograd.Function):
    """1 where the logit is not negative, else 0; backward as if it were σ(logit/τ)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.temperature = temperature
        return (torch.sigmoid(logits / temperature) >= 0.5).to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        soft = torch.sigmoid(logits / ctx.temperature)
        return grads[0] * soft * (1 - soft) / ctx.temperature, None


class Autograd:
    """The reference: λ and mask logits are the leaves of one graph over all tasks."""

    def __init__(self, setup: Setup, by_task: bool) -> None:
        self.setup, self.by_task, settings = setup, by_task, setup.settings
        if setup.method.clamp is not None or settings.schedule != "constant":
            raise ValueError("The reference has no clamp and no schedule.")
        self.parts = {name: _parts(block) for name, block in setup.blocks.items()}
        self.sizes = {name: block.sizes for name, block in setup.blocks.items()}
        masks = torch.cat([top_mask(sizes, setup.method.rank) for sizes in self.sizes.values()])
        self.first = torch.where(masks, 0.1, -0.1)
        self.logits = self.first.clone().requires_grad_()
        self.pace = torch.cat(
            [pace(values) for block in setup.blocks.values() for values in block.s.split(block.sizes)]
        )
        tasks = len(setup.job.network.tasks)
        self.lam = torch.full((len(self.sizes), tasks), setup.method.scale, requires_grad=True)
        self.optimiser = torch.optim.Adam(
            [
                {"params": [self.lam], "lr": settings.lr_lambda},
                {"params": [self.logits], "lr": settings.mask_step(setup.masks == "soft")},
            ]
        )
        self.keys = {task: self._keys(task) for task in setup.job.network.tasks}

    def step(self, number: int) -> Tensor:
        """One Adam step; the summed entropy before it."""
        weights = self._weights()
        loss = torch.stack([self._loss(task, weights, number) for task in self.keys]).sum()
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return loss.detach()

    def _weights(self) -> dict[str, Tensor]:
        counts = [sum(sizes) for sizes in self.sizes.values()]
        paced = self.first + (self.logits - self.first) * self.pace  # as far as soft masks move
        binary = StraightThrough.apply(self.logits, 10.0)
        masks = ((paced + 0.1) / 0.2 if self.setup.masks == "soft" else binary).split(counts)
        return {name: self._compose(name, self.lam[row], masks[row]) for row, name in enumerate(self.sizes)}

    def _compose(self, name: str, lam: Tensor, mask: Tensor) -> Tensor:
        origin, dense, u, s, v = self.parts[name]
        sizes = self.sizes[name]
        flat = as_matrix(origin)
        if dense is not None:
            return (flat + (lam[:, None, None] * dense).sum(0)).reshape(origin.shape)
        if self.by_task:
            for task, (b, u_t, s_t, v_t) in enumerate(
                zip(mask.split(sizes), u.split(sizes, 1), s.split(sizes), v.split(sizes, 1), strict=True)
            ):
                flat = flat + lam[task] * ((u_t * (b * s_t)) @ v_t.T)
            return flat.reshape(origin.shape)
        factors = lam.repeat_interleave(torch.tensor(sizes)) * mask * s
        return (flat + (u * factors) @ v.T).reshape(origin.shape)

    def _loss(self, task: str, weights: Mapping[str, Tensor], number: int) -> Tensor:
        setup = self.setup
        own = {key: weights[name] for name, key in self.keys[task].items()}
        batch = setup.data[task].adapt_batch(number, setup.settings.batch_size)
        return entropy(functional_call(setup.models.modules[task], own, (), dict(batch)).logits)

    def _keys(self, task: str) -> dict[str, str]:
        """Merged tensor -> its name in the task's network."""
        network, module = self.setup.job.network, self.setup.models.modules[task]
        held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        return module_keys(network, task, list(self.sizes), module, held)


def _parts(block: Blocks) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """origin, task vectors (of a tensor without components only), u, s, v."""
    return (
        block.origin,
        None if block.components else torch.stack([w for w in block.wholes if w is not None]),
        block.u,
        block.s,
        block.v,
    )


class SideBySide:
    """Called after each of the engine's steps: takes the reference's step, times it and compares."""

    def __init__(self, reference: Autograd) -> None:
        self.reference = reference
        self.seconds: dict[str, list[float]] = {"engine": [], "autograd": [], "networks": []}
        self._engine_since = time.process_time()
        setup = reference.setup
        self._losses = problem_of(setup.job, setup.models, setup.data, setup.settings, {}).losses()
        self.checks: list[dict[str, float]] = []

    def __call__(self, live: LiveWeights, history: History) -> None:
        number = history.step - 1
        self.seconds["engine"].append(time.process_time() - self._engine_since)
        started = time.process_time()
        loss = self.reference.step(number)
        self.seconds["autograd"].append(time.process_time() - started)
        live.zero_grad()
        started = time.process_time()
        for of_task in self._losses.values():
            of_task(number).backward()
        self.seconds["networks"].append(time.process_time() - started)
        if number < CHECKED_STEPS:
            engine_loss = sum(values[-1] for values in history.losses.values())
            self.checks.append(self._check(live, engine_loss, float(loss)))
        self._engine_since = time.process_time()

    def _check(self, live: LiveWeights, engine_loss: float, loss: float) -> dict[str, float]:
        reference, settings = self.reference, self.reference.setup.settings
        moved = (live.logits - reference.logits.detach()).abs() / settings.mask_step(reference.setup.masks == "soft")
        return {
            "loss_engine": engine_loss,
            "loss_autograd": loss,
            "lambda_gradient_relative_difference": _relative(_grad(live.lam), _grad(reference.lam)),
            "logit_gradient_relative_difference": _relative(_grad(live.logits), _grad(reference.logits)),
            "lambda_max_difference": float((live.lam - reference.lam.detach()).abs().max()),
            "logits_max_difference": float((live.logits - reference.logits.detach()).abs().max()),
            "share_of_logits_apart_by_over_1_percent_of_a_step": float((moved > 0.01).double().mean()),
            "masks_unequal": float(((live.logits >= 0) != (reference.logits >= 0)).sum()),
        }


def _grad(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).double().norm() / theirs.double().norm())


def side_by_side(start: str, cache: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Equality and times; the first steps, which warm up, are checked but not counted."""
    setup = Setup(start, cache, arguments)
    both = SideBySide(Autograd(setup, arguments.by_task))
    setup.run_engine(CHECKED_STEPS + arguments.steps, both)
    timed = {side: seconds[CHECKED_STEPS:] for side, seconds in both.seconds.items()}
    ratios = [b / a for a, b in zip(timed["engine"], timed["autograd"], strict=True)]
    _assert_equal(both.checks[0], 1e-3 if arguments.precision == "float32" else 3e-2)
    return {
        "checks": both.checks[:1],
        "seconds": {side: spread(seconds) for side, seconds in timed.items()},
        "autograd_over_engine": spread(ratios),
        "engine_over_networks": spread([a / b for a, b in zip(timed["engine"], timed["networks"], strict=True)]),
        "settings": settings_of(setup),
    }


def settings_of(setup: Setup) -> dict[str, Any]:
    return {"parameters": setup.method.model_dump(by_alias=True), "adapt": setup.settings.model_dump(mode="json")}


def _assert_equal(check: Mapping[str, float], tolerance: float) -> None:
    assert abs(check["loss_engine"] - check["loss_autograd"]) < 1e-4 * abs(check["loss_autograd"]), check
    assert check["lambda_gradient_relative_difference"] < tolerance, check
    assert check["logit_gradient_relative_difference"] < tolerance, check
    assert check["masks_unequal"] == 0, check


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": median(values), "max": max(values), "count": len(values)}


class Memory:
    """Samples this process's anonymous memory in a thread."""

    def __init__(self) -> None:
        self.peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.is_set():
            self.peak = max(self.peak, status("RssAnon"))
            self._stop.wait(SAMPLE_SECONDS)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def status(field: str) -> int:
    """A size of this process in bytes, from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def one_side(arguments: argparse.Namespace) -> dict[str, int]:
    """Peak memory of a few steps of one side, in this process. The reference holds no task vectors of matrices."""
    setup = Setup(arguments.start, arguments.cache, arguments)
    reference = Autograd(setup, arguments.by_task) if arguments.side == "autograd" else None
    if reference:
        setup.blocks = {}
    loaded = status("RssAnon")
    with Memory() as memory:
        if reference:
            for number in range(CHECKED_STEPS):
                reference.step(number)
        else:
            setup.run_engine(CHECKED_STEPS)
    return {"loaded": loaded, "peak_in_steps": memory.peak, "peak_of_process": status("VmHWM")}


def memory(start: str, side: str, cache: Path, arguments: argparse.Namespace) -> dict[str, int]:
    """`one_side` in a process of its own."""
    command = [sys.executable, __file__, str(arguments.folder), "--threads", str(arguments.threads)]
    command += ["--masks", arguments.masks, "--precision", arguments.precision]
    command += ["--batch-size", str(arguments.batch_size)] if arguments.batch_size else []
    command += ["--side", side, "--start", start, "--cache", str(cache), *(["--by-task"] if arguments.by_task else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{start} {side}: {done.stderr[-2000:]}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    record: dict[str, Any] = {
        "kind": "cost",
        "name": " ".join(["step", *([arguments.masks] if arguments.masks == "soft" else []), *([arguments.precision] if arguments.precision != "float32" else [])]),
        "what": "one adaptation step of AdaRank on minilm-8: engine beside plain autograd",
        "command": " ".join(
            ["python benchmarks/step_vs_autograd.py FOLDER --steps", str(arguments.steps), "--threads",
             str(arguments.threads), "--masks", arguments.masks, "--precision", arguments.precision,
             *(["--batch-size", str(arguments.batch_size)] if arguments.batch_size else []),
             "--starts", *arguments.starts, *(["--by-task"] if arguments.by_task else [])]
        ),
        "autograd_sums": "one product per task" if arguments.by_task else "one product of all tasks' components",
        "note": arguments.note,
        "seed": 0,
        "versions": versions(),
        "machine": machine(),
    }  # fmt: skip
    for start in arguments.starts:
        with tempfile.TemporaryDirectory() as temporary:
            cache = Path(temporary) / "blocks.pt"
            found = side_by_side(start, cache, arguments)
            found["memory_bytes"] = {side: memory(start, side, cache, arguments) for side in ("engine", "autograd")}
        peaks = {side: sizes["peak_in_steps"] for side, sizes in found["memory_bytes"].items()}
        found["peak_autograd_over_engine"] = peaks["autograd"] / peaks["engine"]
        record[start] = found
        print(start, json.dumps({k: v for k, v in found.items() if k != "settings"}, indent=1), flush=True)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each side, in turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--masks", choices=["binary", "soft"], default="binary")
    parser.add_argument(
        "--precision", choices=["float32", "bfloat16"], default="float32", help="of the engine, with soft masks"
    )
    parser.add_argument("--batch-size", type=int, help="inputs per task and step; without it the recipe's")
    parser.add_argument("--starts", nargs="+", choices=list(STARTS), default=list(STARTS))
    parser.add_argument("--by-task", action="store_true", help="reference: one product per task")
    parser.add_argument("--records", type=Path, metavar="FILE", default=FOLDER / "costs.jsonl")
    parser.add_argument("--note", default="", help="kept in the record, such as what else the machine did")
    parser.add_argument("--start", choices=list(STARTS), help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=["engine", "autograd"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.side:
        print(json.dumps(one_side(arguments)))
        return
    Records(arguments.records).write(run(arguments))


if __name__ == "__main__":
    sys.exit(main())
