"""origin + Σ λ U diag(b s) Vᵀ: decompositions, bases, masks, and the sum with its gradient."""
