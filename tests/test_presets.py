"""Presets as a whole: every setting beside the released one's, and whole runs beside AdaRank written down with autograd."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.func import functional_call

import adarank
import image_zoo
import text_zoo
from adarank.adapt import ADAPTIVE, PRESETS, AdaptSettings, LiveWeights, adapt
from adarank.adapt.agreement import Signals
from adarank.adapt.learner import Loss
from adarank.adapt.presets import with_preset
from adarank.recipe.reader import load_recipe
from adarank.workflow.load_tasks import load_tasks
from make import agreeing, generator, network, randn

# Of the configurations released with AdaRank (arXiv:2503.22178), directories vision/ and lm/ of its repository:
# origin, λ, share of components kept, inputs per task and step, steps, Adam's step size of λ and masks.
RELEASED: Mapping[str, tuple[str, float, float, int, int, float]] = {
    "vit-b32-8-ta": ("pretrained", 0.3, 1.0, 16, 10_000, 1e-3),
    "vit-b32-8-cart": ("average", 2.3, 0.16, 16, 10_000, 1e-3),
    "vit-b32-14-ta": ("pretrained", 0.3, 1.0, 16, 10_000, 1e-3),
    "vit-b32-14-cart": ("average", 2.8, 0.32, 16, 10_000, 1e-3),
    "vit-b32-20-ta": ("pretrained", 0.05, 1.0, 16, 10_000, 1e-3),
    "vit-b32-20-cart": ("average", 2.4, 0.32, 16, 10_000, 1e-3),
    "vit-l14-8-ta": ("pretrained", 0.3, 1.0, 4, 10_000, 1e-3),
    "vit-l14-8-cart": ("average", 3.0, 0.16, 4, 10_000, 1e-3),
    "vit-l14-14-ta": ("pretrained", 0.3, 1.0, 2, 100_000, 1e-3),
    "vit-l14-14-cart": ("average", 1.25, 0.16, 2, 100_000, 1e-3),
    "vit-l14-20-ta": ("pretrained", 1.0, 0.3, 2, 100_000, 1e-3),
    "vit-l14-20-cart": ("average", 1.0, 0.16, 2, 100_000, 1e-3),
    "roberta-7-ta": ("pretrained", 0.3, 1.0, 8, 5_000, 5e-5),
    "roberta-7-cart": ("average", 1.6, 0.04, 8, 5_000, 1e-4),
    "gpt2-7-ta": ("pretrained", 0.3, 1.0, 8, 5_000, 5e-5),
    "gpt2-7-cart": ("average", 1.3, 0.01, 8, 5_000, 5e-5),
}
# All of them: Adam without weight decay, a sum of entropies over tasks, no schedule and no clamp, masks by a sigmoid of
# temperature 10 from logits of ±0.1, a λ for each task and tensor (also Section 6.1 and Appendix A of the paper).
MASKS: Mapping[str, Any] = {
    "lambda_per": "tensor", "clamp": None, "learn_masks": True, "learn_lambda": True,
    "basis": "task_vectors", "returnable": True, "mask": "binary", "first": "top", "seed": 0, "precision": "float32",
}  # fmt: skip
LOOP: Mapping[str, Any] = {
    "by": "model", "objective": "entropy", "objectives": {}, "schedule": "constant", "learn_heads": False, "keep": "last",
}  # fmt: skip
# Nothing that a preset gives depends on these: how steps are judged, and settings of another objective.
IDLE: Mapping[str, Any] = {
    "check_every": 2, "check_inputs": 1, "tolerance": 9.0, "self_label": {"temperature": 3.0},
}  # fmt: skip
# AdaMerging (arXiv:2310.02575): λ from 0.3 used within [0, 1], 500 steps of two batches of 16; ++ on the top fifth of
# each task vector. CART++ (arXiv:2412.12153): about the mean, of a rank of 8%.
LAMBDA_ONLY: Mapping[str, Any] = {"lambda_per": "tensor", "clamp": None, "learn_masks": False, "learn_lambda": True}
ABOUT_BASE: Mapping[str, Any] = {"origin": "pretrained", "rank": 1.0, "lambda": 0.3}
ABOUT_MEAN: Mapping[str, Any] = {"origin": "average", "rank": 0.16, "lambda": 2.3}
CART: Mapping[str, Any] = {"origin": "average", "rank": 0.08, "lambda": 1.0}
ADAMERGING: Mapping[str, Any] = {
    "batch_size": 32,
    "steps": 500,
    "lr_masks": 1e-3,
    "lr_lambda": 1e-3,
}
CLAMPED: Mapping[str, Any] = {**LAMBDA_ONLY, "clamp": (0.0, 1.0)}
PAPER: Mapping[str, Any] = {"batch_size": 16, "steps": 200, "lr_masks": 1e-3, "lr_lambda": 1e-3}
OF_ADARANK: Mapping[str, Any] = {**PAPER, "steps": 10_000}
OTHERS: list[tuple[str, str, dict[str, Any], dict[str, Any], Mapping[str, Any]]] = [
    ("adarank", "paper", {}, {**ABOUT_MEAN, **MASKS}, OF_ADARANK),
    ("adarank", "paper", {"origin": "pretrained"}, {**ABOUT_BASE, **MASKS}, OF_ADARANK),
    ("adarank", "paper", {"basis": "tsv_m"}, {**ABOUT_BASE, **MASKS, "lambda": 1.0, "basis": "tsv_m"}, OF_ADARANK),
    ("adamerging", "paper", {}, {**ABOUT_BASE, **LAMBDA_ONLY}, PAPER),
    ("adamerging++", "paper", {}, {**ABOUT_BASE, **LAMBDA_ONLY, "density": 0.2}, PAPER),
    ("cart++", "paper", {}, {**CART, **LAMBDA_ONLY}, PAPER),
    ("adamerging", "adamerging", {}, {**ABOUT_BASE, **CLAMPED}, ADAMERGING),
    ("adamerging", "adamerging-task", {}, {**ABOUT_BASE, **CLAMPED, "lambda_per": "task"}, ADAMERGING),
    ("adamerging++", "adamerging", {}, {**ABOUT_BASE, **CLAMPED, "density": 0.2}, ADAMERGING),
    ("adamerging++", "adamerging-task", {}, {**ABOUT_BASE, **CLAMPED, "lambda_per": "task", "density": 0.2}, ADAMERGING),
]  # fmt: skip


def compare(
    name: str, preset: str, given: Mapping[str, Any], method: Mapping[str, Any], loop: Mapping[str, Any]
) -> None:
    """What a preset resolves to, against all that is expected of the method and, but for `IDLE`, of the loop."""
    resolved, settings = with_preset(ADAPTIVE[name], given, {}, preset)
    assert resolved.model_dump(by_alias=True) == method
    assert settings.model_dump(exclude=set(IDLE)) == {**LOOP, **loop}


def test_every_preset_is_in_the_tables() -> None:
    assert PRESETS.keys() == RELEASED.keys() | {preset for _, preset, *_ in OTHERS}


@pytest.mark.parametrize("preset", RELEASED)
def test_a_released_preset_is_as_released(preset: str) -> None:
    origin, scale, rank, inputs, steps, rate = RELEASED[preset]
    method = {"origin": origin, "lambda": scale, "rank": rank, **MASKS}
    loop = {"batch_size": inputs, "steps": steps, "lr_masks": rate, "lr_lambda": rate}
    compare("adarank", preset, {}, method, loop)


@pytest.mark.parametrize(("name", "preset", "given", "method", "loop"), OTHERS)
def test_a_preset_is_its_papers(
    name: str, preset: str, given: dict[str, Any], method: dict[str, Any], loop: Mapping[str, Any]
) -> None:
    compare(name, preset, given, method, loop)


@pytest.mark.parametrize("given", [{}, {"origin": "pretrained"}, {"basis": "tsv_m"}])
def test_the_papers_preset_on_texts_has_the_language_settings(given: dict[str, Any]) -> None:
    """Steps and batches as released, the step size of the paper, and the start of RoBERTa's released file."""
    found, loop = with_preset(ADAPTIVE["adarank"], given, {}, "paper", text=True)
    released = "roberta-7-ta" if given else "roberta-7-cart"
    beside, of_loop = with_preset(ADAPTIVE["adarank"], given, {}, released)
    assert found == (beside if "basis" not in given else with_preset(ADAPTIVE["adarank"], given, {}, "paper")[0])
    assert loop == of_loop.model_copy(update={"lr_masks": 5e-5, "lr_lambda": 5e-5})


@pytest.mark.parametrize("kind", [text_zoo, image_zoo])
def test_a_recipes_paper_preset_is_that_of_its_tasks(kind: Any, tmp_path: Path) -> None:
    folder = kind.make_zoo(tmp_path)
    recipe = load_recipe(
        kind.recipe(folder, "paper.yaml", merge_method="adarank", adapt={"preset": "paper"}, parameters={})
    )
    method = adarank.open_job(recipe).method
    of_text = kind is text_zoo
    assert (method.rank, method.scale) == ((0.04, 1.6) if of_text else (0.16, 2.3))
    assert (method.settings.steps, method.settings.lr_masks) == ((5_000, 5e-5) if of_text else (10_000, 1e-3))


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_leaves_nothing_to_defaults(preset: str, name: str) -> None:
    method, settings = with_preset(ADAPTIVE[name], {}, {}, preset)
    assert method.model_fields_set == type(method).model_fields.keys()
    assert settings.model_fields_set == AdaptSettings.model_fields.keys() - IDLE.keys()


class Layers(torch.nn.Module):
    """Two matrices, a norm and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = torch.nn.Linear(5, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).tanh())


def adapted(idle: Mapping[str, Any]) -> LiveWeights:
    """A preset's run of ten steps with a judge, other settings beside it."""
    net = Layers()
    shapes = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}
    base = {name: randn(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    experts = {task: {n: t + 0.3 * randn(20 + i, *t.shape) for n, t in base.items()} for i, task in enumerate("ab")}
    method, settings = with_preset(ADAPTIVE["adarank"], {}, {"steps": 10, "lr_masks": 0.05, **idle}, "vit-b32-8-cart")
    live = method.start(network(base, experts), dict(net.named_parameters()), settings, "cpu")

    def loss(step: int) -> Tensor:
        return entropy(net(torch.randn(settings.batch_size, 5, generator=generator(step))))

    def falling(step: int) -> dict[str, Signals]:
        return dict.fromkeys("ab", Signals(agreeing(1 - step / 20), step / 20, 0.0, 0.5, 0.5, 0.5))

    losses: dict[str, Loss] = {"a": loss, "b": lambda step: loss(100 + step)}
    history = adapt(live, losses, settings, judge=falling)
    assert max(history.judged) == history.step == 10
    return live


def test_idle_settings_change_nothing_of_a_presets_result() -> None:
    plain, changed = adapted({}), adapted(IDLE)
    assert torch.equal(plain.lam, changed.lam)
    assert torch.equal(plain.logits, changed.logits)


# AdaRank with autograd, in float64: nothing of adarank's but what reads the batches


def entropy(logits: Tensor) -> Tensor:
    """Mean entropy of predictions: Equation 6 of the paper."""
    p = logits.softmax(dim=-1)
    return -(p * p.log()).sum(dim=-1).mean()


class Hard(torch.autograd.Function):
    """σ(logit/τ) rounded at ½, with the slope of σ(logit/τ): Appendix A of the paper."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        probabilities = torch.sigmoid(logits / 10.0)
        ctx.save_for_backward(probabilities)
        return (probabilities >= 0.5).to(logits)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (probabilities,) = ctx.saved_tensors
        return slope * probabilities * (1 - probabilities) / 10.0


def body(folder: Path) -> dict[str, Tensor]:
    """A body's tensors as `transformers` calls them in memory."""
    return transformers.AutoModel.from_pretrained(folder).double().state_dict()


class Reference:
    """W = W_o + Σ_t λ_t U_t diag(b_t∘s_t) V_tᵀ for matrices of the layers, W_o + Σ_t λ_t δ_t for all else; heads are the experts'."""

    def __init__(self, folder: Path, tasks: list[str], auto: Any, origin: str, scale: float, rank: float) -> None:
        self.modules = {t: auto.from_pretrained(folder / "models" / t).double().eval() for t in tasks}
        prefix = self.modules[tasks[0]].base_model_prefix
        bodies = {t: getattr(module, prefix).state_dict() for t, module in self.modules.items()}
        base = body(folder / "models" / "base")
        self.prefix, names = prefix, [name for name in bodies[tasks[0]] if name in base]
        mean = {name: torch.stack([bodies[t][name] for t in tasks]).mean(dim=0) for name in names}
        self.origin = mean if origin == "average" else {name: base[name] for name in names}
        self.deltas = {name: [bodies[t][name] - self.origin[name] for t in tasks] for name in names}
        matrices = [name for name in names if "layer" in name and self.origin[name].dim() == 2]
        self.spectra = {n: [torch.linalg.svd(d, full_matrices=False) for d in self.deltas[n]] for n in matrices}
        self.lam = {n: torch.full((len(tasks),), scale, dtype=torch.float64, requires_grad=True) for n in names}
        self.logits = {n: [self.start(s, rank) for _, s, _ in spectra] for n, spectra in self.spectra.items()}

    def start(self, s: Tensor, rank: float) -> Tensor:
        kept = torch.arange(len(s)) < max(1, int(rank * len(s)))
        return torch.where(kept, 0.1, -0.1).double().requires_grad_()

    def masks(self, name: str) -> list[Tensor]:
        return [Hard.apply(logits) for logits in self.logits[name]]

    def merged(self) -> dict[str, Tensor]:
        blocks = {n: [u @ torch.diag(b * s) @ vh for (u, s, vh), b in zip(spectra, self.masks(n), strict=True)]
                  for n, spectra in self.spectra.items()}  # fmt: skip
        return {
            name: origin + sum(lam * block for lam, block in zip(self.lam[name], blocks.get(name, self.deltas[name]), strict=True))
            for name, origin in self.origin.items()
        }  # fmt: skip

    def snapshot(self) -> tuple[dict[str, Tensor], Tensor]:
        """Merged weights and all masks of this moment."""
        masks = [mask for name in self.spectra for mask in self.masks(name)]
        return {name: tensor.detach() for name, tensor in self.merged().items()}, torch.cat(masks).detach()

    def adapt(self, batches: Mapping[str, list[Mapping[str, Tensor]]], lr_masks: float, lr_lambda: float) -> None:
        logits = [part for parts in self.logits.values() for part in parts]
        groups = [{"params": list(self.lam.values()), "lr": lr_lambda}, {"params": logits, "lr": lr_masks}]
        adam = torch.optim.Adam(groups, betas=(0.9, 0.999))
        for step in range(len(next(iter(batches.values())))):
            adam.zero_grad()
            weights = {f"{self.prefix}.{name}": tensor for name, tensor in self.merged().items()}
            total = torch.zeros((), dtype=torch.float64)
            for task, module in self.modules.items():
                inputs = {k: v.double() if v.is_floating_point() else v for k, v in batches[task][step].items()}
                total = total + entropy(functional_call(module, weights, (), inputs).logits)
            total.backward()
            adam.step()


AUTO = {"vit": transformers.AutoModelForImageClassification, "roberta": transformers.AutoModelForSequenceClassification}


@pytest.fixture(scope="module", params=["vit", "roberta"])
def zoo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    kind = {"vit": image_zoo, "roberta": text_zoo}[request.param]
    return request.param, kind, kind.make_zoo(tmp_path_factory.mktemp(request.param), request.param)


STEPS = 50


@pytest.mark.parametrize("lr_masks", [None, 0.01])
@pytest.mark.parametrize("start", ["ta", "cart"])
def test_a_presets_weights_are_autograds(
    zoo: tuple[str, Any, Path], tmp_path: Path, start: str, lr_masks: float | None
) -> None:
    """As released, and with steps of the logits that flip masks within the fifty."""
    architecture, kind, folder = zoo
    preset = {"vit": "vit-b32-8-", "roberta": "roberta-7-"}[architecture] + start
    changes = {"steps": STEPS} | ({} if lr_masks is None else {"lr_masks": lr_masks})
    given = {"merge_method": "adarank", "adapt": {"preset": preset, **changes}, "seed": 3}
    recipe = load_recipe(kind.recipe(folder, f"{preset}.yaml", **given))
    adarank.merge_recipe(recipe, tmp_path / "out")
    merged = body(tmp_path / "out")

    origin, scale, rank, inputs, _, rate = RELEASED[preset]
    reference = Reference(folder, list(kind.TASKS), AUTO[architecture], origin, scale, rank)
    start_weights, start_masks = reference.snapshot()
    tasks = load_tasks(adarank.open_job(recipe))
    batches = {name: [task.adapt_batch(step, inputs) for step in range(STEPS)] for name, task in tasks.items()}
    reference.adapt(batches, lr_masks or rate, rate)
    weights, masks = reference.snapshot()

    # a key's bias cancels in the softmax: its slope is the rounding of each side, of which Adam makes whole steps
    compared = [name for name in weights if not name.endswith(("key.bias", "k_proj.bias"))]
    for name in compared:
        torch.testing.assert_close(merged[name], weights[name], rtol=0, atol=1e-5)
    assert max(float((weights[name] - start_weights[name]).abs().max()) for name in compared) > 10 * 1e-5
    assert torch.equal(masks, start_masks) == (lr_masks is None)
