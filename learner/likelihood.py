"""Log-density of the stored noise of a soft token under a policy (pure, fp32).

Notation: candidate logits z are already divided by the temperature; l = log_softmax(z) over the *retained* candidates;
g are the stored perturbed values; D = l_new - l_old; n = number retained; s = noise_scale.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Likelihood = Literal["reference", "gumbel", "concrete", "censored", "argmax", "gaussian", "dirichlet"]


def soft_log_density(
    candidate_logits: Tensor,
    perturbed: Tensor,
    retained: Tensor,
    *,
    likelihood: Likelihood,
    noise_scale: float = 1.0,
    threshold: Tensor | None = None,
) -> Tensor:
    """Log-density [T] of `perturbed` [T, K] under `candidate_logits` [T, K].

    `threshold` [T] is the censoring threshold t (required by `censored`).
    """
    raise NotImplementedError


def soft_log_ratio(
    candidate_logits: Tensor,
    old_candidate_logits: Tensor,
    perturbed: Tensor,
    retained: Tensor,
    *,
    likelihood: Likelihood,
    noise_scale: float = 1.0,
    threshold: Tensor | None = None,
) -> Tensor:
    """log q_new - log q_old, [T], computed so that it does not cancel (see the table of the module)."""
    raise NotImplementedError
