"""FusionBench's rules where they are other than adarank's, each computed from its formula.

They show that a difference is explained: what FusionBench gives is what its rule gives, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import torch
from fusionbench_models import BATCH, Experts, State, classifier, inputs
from torch import Tensor

import adarank

Rule = Callable[[State, Experts], State]
FLOOR = 1e-6


def ties(density: float, scale: float, mean: bool = False) -> Rule:
    """One entry more than ⌊density·d⌋ is kept; where the sum is 0 the sign is that of the sum of all signs."""

    def rule(base: State, experts: Experts) -> State:
        names = sorted(base)
        flat = torch.stack([torch.cat([(own[n] - base[n]).flatten() for n in names]) for own in experts.values()])
        least = flat.abs().topk(int(density * flat.shape[1]) + 1).values[:, -1:]
        kept = torch.where(flat.abs() >= least, flat, 0.0)
        sign = kept.sum(0).sign()
        sign[sign == 0] = sign.sum().sign()
        agree = kept * (kept.sign() == sign)
        total = agree.sum(0) / ((agree != 0).sum(0).clamp(min=1) if mean else 1)
        parts = total.split([base[n].numel() for n in names])
        return {n: base[n] + scale * part.reshape(base[n].shape) for n, part in zip(names, parts, strict=True)}

    return rule


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
    narrow = {n: tensor for n, tensor in base.items() if tensor.dim() == 2 and min(tensor.shape) < len(experts)}
    return {**adarank.merge(base, experts, "tsv_m"), **narrow}


def tall_masks(alpha: float) -> Rule:
    """m_t = [|θ₀ - τ_t| > α |τ - τ_t|]: the base stands where the zero vector should."""

    def rule(base: State, experts: Experts) -> State:
        found = {}
        for name, start in base.items():
            deltas = {task: own[name] - start for task, own in experts.items()}
            total = sum(deltas.values())
            for task, delta in deltas.items():
                found[f"{task}::{name}"] = start + total * ((start - delta).abs() > alpha * (total - delta).abs())
        return found

    return rule


def squares(state: State, number: int) -> State:
    """F_t = mean_x Σ_y p_y (∂ log p_y / ∂W)², input by input and class by class."""
    module, total = classifier(state), {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    given = inputs(number)
    for own in given.split(1):
        log_p = module(own).logits[0].log_softmax(-1)
        for label, p in enumerate(log_p.detach().exp()):
            gradients = torch.autograd.grad(log_p[label], list(module.parameters()), retain_graph=True)
            for name, gradient in zip(total, gradients, strict=True):
                total[name] += p * gradient**2 / len(given)
    return total


def squares_of_sums(state: State, number: int) -> State:
    """F_t = Σ_batches (Σ_{x, y} √p_y ∂ log p_y / ∂W)² / n: the square is of a batch's sum over inputs and classes."""
    module, total = classifier(state), {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    given = inputs(number)
    for batch in given.split(BATCH):
        log_p = module(batch).logits.log_softmax(-1)
        gradients = torch.autograd.grad((log_p.detach().exp().sqrt() * log_p).sum(), list(module.parameters()))
        for name, gradient in zip(total, gradients, strict=True):
            total[name] += gradient**2 / len(given)
    return total


def fisher(information: Callable[[State, int], State]) -> Rule:
    """W = Σ_t c_t (F_t + 1e-6) W_t / Σ_t c_t (F_t + 1e-6), c_t = 1 / (‖F_t‖₂ + 1e-6): the floor is not of the normalised F."""

    def rule(base: State, experts: Experts) -> State:
        found = [information(own, number) for number, own in enumerate(experts.values())]
        scales = [1 / (float(torch.cat([f.flatten() for f in own.values()]).norm()) + FLOOR) for own in found]

        def mean(name: str) -> Tensor:
            weights = [scale * (own[name] + FLOOR) for scale, own in zip(scales, found, strict=True)]
            return sum(w * own[name] for w, own in zip(weights, experts.values(), strict=True)) / sum(weights)

        return {name: mean(name) for name in base}

    return rule
