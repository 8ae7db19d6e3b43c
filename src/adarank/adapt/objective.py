"""What adaptation minimises: pure functions of a batch's logits. The engine knows none of them."""

from __future__ import annotations

from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    """Mean Shannon entropy of the predictions, in nats.

        H = mean_x -Σ_c p(c|x) log p(c|x)        p = softmax(logits)

    Arguments:
        logits: (batch, classes), float.

    Returns:
        A scalar between 0 and log(classes).

    Source: AdaMerging (arXiv:2310.02575) and AdaRank (arXiv:2503.22178), Equation 6.
    """
    log_p = logits.log_softmax(dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1).mean()
