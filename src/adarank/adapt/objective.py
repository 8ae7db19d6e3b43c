"""What adaptation minimises: pure functions of a batch's logits. The engine knows none of them."""

from __future__ import annotations

from torch import Tensor


def self_label(logits: Tensor, expert: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence from the expert's predictions on the same inputs, in nats.

        KL = mean_x Σ_c q(c|x) (log q(c|x) - log p(c|x))        q = softmax(expert), p = softmax(logits)

    Unlike entropy it cannot be lowered by predicting one class always, nor by one task at another's cost: it is 0
    only where the merged model says what the expert says. Needs no labels, and one pass of each expert over its inputs.

    Arguments:
        logits, expert: (batch, classes), float.

    Returns:
        A scalar, 0 or more.

    Source: Hinton et al. 2015, arXiv:1503.02531, without labels.
    """
    log_q = expert.log_softmax(dim=-1)
    return (log_q.exp() * (log_q - logits.log_softmax(dim=-1))).sum(dim=-1).mean()


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
