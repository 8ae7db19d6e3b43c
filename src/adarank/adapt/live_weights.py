"""The live merged weights: λ and masks on one side, a network's parameters on the other.

Merged weights are ordinary leaf parameters of the network. `write` composes them from λ and the masks, in place;
after any number of backward passes `pull_back` turns the parameters' accumulated gradients into the gradients of λ
and of the mask logits, in closed form. Only one task's graph need be alive at a time, and no U or V ever enters one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adarank.adapt.exchange import Exchange
from adarank.adapt.settings import AdaptSettings
from adarank.adapt.tying import LambdaPer, tie
from adarank.errors import RecipeError
from adarank.io import processes
from adarank.spectral.bases import BASES, Basis
from adarank.spectral.blocks import Blocks
from adarank.spectral.half import HalfFactors
from adarank.spectral.mask_file import MaskFile
from adarank.spectral.masks import First, MaskKind, first_mask, hard, pace, soft, straight_through

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Learn:
    """What is learned, and how its gradient is taken.

    Attributes:
        masks, lam: learn the masks, learn the coefficients.
        temperature: τ of a binary mask's sigmoid.
        clamp: λ is used clamped to this range; its gradient is zero outside.
        per: what has a λ of its own.
        returnable: components pruned at the start may come back. If not, their logits have no gradient.
        mask: `binary` or `soft`, where masks are learned.
        first: which components the start keeps, the `top` ones or `random` ones; `seed` of the latter.
        sam: ρ of sharpness-aware steps: how far uphill gradients are taken, relative to each number. 0: not at all.
        precision: of the products with components while steps are taken, where soft masks are learned.
    """

    masks: bool = True
    lam: bool = True
    temperature: float = 10.0
    clamp: tuple[float, float] | None = None
    per: LambdaPer = "tensor"
    returnable: bool = True
    mask: MaskKind = "binary"
    first: First = "top"
    seed: int = 0
    sam: float = 0.0
    precision: Precision = "float32"


class LiveWeights:
    """Merged weights of a network as a function of λ and mask logits.

    Arguments:
        parameters: tensor name -> the network's parameter (or buffer), written in place.
        blocks: the same names -> origin, task vectors and spectra, on the parameter's device.
        scale: λ at the start, for every task and tensor.
        rank: share of components kept at the start; their logits are +`logit`, all others -`logit`.
        basis: how task vectors are decomposed into blocks.

    Attributes:
        lam: the coefficients, on the CPU: (tensors, tasks), or fewer rows and columns where they are tied.
        logits: (all components,) mask logits, on the CPU, matrix after matrix in the order of `blocks`. Soft masks move
            `pace` times as far from their start: steps count in weights.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        blocks: Mapping[str, Blocks],
        learn: Learn,
        scale: float,
        rank: float = 1.0,
        logit: float = 0.1,
        basis: Basis = BASES["task_vectors"],
    ) -> None:
        self.parameters, self.blocks, self.learn, self.basis = dict(parameters), dict(blocks), learn, basis
        first = next(iter(self.blocks.values()))
        dtype = first.origin.dtype
        self._tying = tie(list(self.blocks), len(first.sizes), learn.per)
        self.lam = torch.empty(self._tying.shape, dtype=dtype)
        self._parts = [sum(block.sizes) for block in self.blocks.values()]
        self.logits = torch.empty(sum(self._parts), dtype=dtype)
        self._logit = logit
        self._exchange = Exchange(self.parameters, [name for name, block in self.blocks.items() if block.here])
        self._in_halves = learn.precision == "bfloat16" and self.mask_kind == "soft"
        self._halves = {
            name: HalfFactors.of(block) for name, block in self._composed() if self._in_halves and block.components
        }
        self._pace = self._paces() if self.mask_kind == "soft" else None
        self.reset(scale, rank)
        # buffers such as running statistics are written, but have no gradient
        for parameter in self.parameters.values():
            parameter.requires_grad_(isinstance(parameter, nn.Parameter))

    def optimiser(self, settings: AdaptSettings) -> torch.optim.Optimizer:
        """Adam over λ and mask logits, each with its own step size."""
        groups = []
        if self.learn.lam:
            groups.append({"params": [self.lam], "lr": settings.lr_lambda, "start": settings.lr_lambda})
        if self.learn.masks and self.logits.numel():
            step = settings.mask_step(self._pace is not None)
            groups.append({"params": [self.logits], "lr": step, "start": step})
        if not groups:
            raise RecipeError("adapt: neither λ nor masks are learned. Use a data-free method, or learn one of them.")
        return torch.optim.Adam(groups)

    def learned(self) -> dict[str, Tensor]:
        """λ and mask logits, also those that are not learned."""
        return {"lam": self.lam, "logits": self.logits}

    @torch.no_grad()
    def reset(self, scale: float, rank: float) -> None:
        """Go back to a start: λ `scale` everywhere, `rank` of each matrix's and task's components kept."""
        first, seed = self.learn.first, self.learn.seed
        kept = torch.cat([first_mask(b.sizes, rank, first, seed, name, b.counts) for name, b in self.blocks.items()])
        self.lam.fill_(scale)
        self.logits.fill_(-self._logit)
        self.logits[kept] = self._logit
        self._start = self.logits.clone()
        self._free = kept | self.learn.returnable

    @torch.no_grad()
    def write(self) -> None:
        """Compose every merged tensor from the current λ and masks, into the network's parameters. Of several processes each
        composes those whose factors it holds, and sends them to the others."""
        lam, masks = dict(zip(self.blocks, self.used_lam(), strict=True)), self.masks()
        for name, block in self._composed():
            self.parameters[name].copy_((self._halves.get(name) or block).compose(lam[name], masks[name]))
        self._exchange.send()

    @property
    def factors(self) -> Mapping[str, Blocks]:
        """The same as `blocks`."""
        return self.blocks

    def settle(self) -> None:
        """Compose every merged tensor in float32, as the method `masked` will. Steps are over."""
        if self._in_halves:
            self._in_halves, self._halves = False, {}
            self.write()

    @torch.no_grad()
    def pull_back(self) -> None:
        """Set `lam.grad` and `logits.grad` from the parameters' accumulated gradients."""
        self._exchange.add_gradients()
        lam = self.used_lam()
        device = next(iter(self.blocks.values())).s.device
        grad_lam = torch.zeros_like(lam, device=device)
        grad_mask = torch.zeros_like(self.logits, device=device)
        slots = grad_mask.split(self._parts)
        for row, (name, mask) in enumerate(self.masks().items()):
            grad = self.parameters[name].grad
            if grad is None:  # the tensor takes no part in any task's output, or another process holds its factors
                continue
            half = self._halves.get(name)
            if half is None:
                gradient = self.blocks[name].gradient(grad, lam[row], mask, self.learn.masks)
            else:
                gradient = half.gradient(grad, lam[row], mask)
            grad_lam[row] = gradient.lam
            slots[row].copy_(gradient.mask)
        learned = torch.cat([grad_lam.flatten(), grad_mask]).cpu()
        total = processes.add_up(learned)  # of several processes, their tensors' or their tasks'
        self._set_gradients(total[: lam.numel()].view_as(lam), total[lam.numel() :])

    @torch.no_grad()
    def ascend(self) -> bool:
        """Add ε = ρ p² ∘ g / ‖ |p| ∘ g ‖ to λ and logits p with gradient g (adaptive SAM, Kwon et al. 2021)."""
        learned = [tensor for tensor in (self.lam, self.logits) if tensor.grad is not None]
        if not self.learn.sam or not learned:
            return False
        self._before = [(tensor, tensor.clone()) for tensor in learned]
        squares = [(p * p.grad).square().sum() for p in learned if p.grad is not None]
        norm = torch.stack(squares).sum().sqrt().clamp_min(1e-12)
        for tensor, step in [(p, p.square() * p.grad) for p in learned if p.grad is not None]:
            tensor += self.learn.sam / norm * step
        self.write()
        return True

    @torch.no_grad()
    def descend(self) -> None:
        """Go back to before `ascend`."""
        for tensor, before in self._before:
            tensor.copy_(before)

    def zero_grad(self) -> None:
        """Forget the gradients of the network's parameters."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def used_lam(self) -> Tensor:
        """λ as the merged weights use it, (tensors, tasks): clamped if a range is set."""
        return self._tying.spread(self.lam.clamp(*self.learn.clamp) if self.learn.clamp else self.lam)

    def masks(self) -> dict[str, Tensor]:
        """Tensor name -> (components,) bool, or float where masks are soft."""
        logits = self._used_logits()
        values = soft(logits, self._logit) if self.mask_kind == "soft" else hard(logits)
        return dict(zip(self.blocks, values.split(self._parts), strict=True))

    @property
    def mask_kind(self) -> MaskKind:
        """Binary where masks are not learned: then they are what they start as, 0 and 1."""
        return self.learn.mask if self.learn.masks else "binary"

    def mask_file(self, tasks: tuple[str, ...], origin: str, about: Mapping[str, Any]) -> MaskFile:
        """The current masks and λ, as the file that the method `masked` applies."""
        lam = dict(zip(self.blocks, self.used_lam().detach().float().clone(), strict=True))
        sizes = {name: block.sizes for name, block in self.blocks.items() if block.components}
        masks = {name: mask.clone() for name, mask in self.masks().items() if name in sizes}
        basis = self.basis
        return MaskFile(origin, basis.groups(tasks), lam, masks, sizes, about, basis.name, basis.thresholds)

    def kept_share(self) -> float | None:
        """Share of all components that are kept now (of soft masks: that are at ½ or above); None if nothing is decomposed."""
        return float(hard(self._used_logits()).double().mean()) if self.logits.numel() else None

    def _composed(self) -> Iterator[tuple[str, Blocks]]:
        """The tensors that this process composes."""
        return ((name, block) for name, block in self.blocks.items() if self._exchange.holds(name))

    def _used_logits(self) -> Tensor:
        """The logits that masks are made of. At the start exactly `logits`, so that masks of 0 and 1 stay exact."""
        return self.logits if self._pace is None else self._start + (self.logits - self._start) * self._pace

    def _paces(self) -> Tensor:
        parts = [pace(values) for block in self.blocks.values() for values in block.s.split(block.sizes)]
        return torch.cat(parts).to(self.logits)

    def _set_gradients(self, grad_lam: Tensor, grad_mask: Tensor) -> None:
        grad_lam = self._tying.gather(grad_lam)
        if self.learn.clamp:
            low, high = self.learn.clamp
            grad_lam = grad_lam * ((self.lam >= low) & (self.lam <= high))
        if self.learn.lam:
            self.lam.grad = grad_lam
        if self.learn.masks:
            grad = grad_mask.where(self._free, 0.0)
            if self.mask_kind == "soft":
                grad = grad if self._pace is None else grad * self._pace
                self.logits.grad = grad / (2 * self._logit)
            else:
                self.logits.grad = straight_through(grad, self.logits, self.learn.temperature)
