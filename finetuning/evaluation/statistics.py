"""What may be concluded from scores: means and their confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# Student's t at 97.5 %, for 1 to 30 degrees of freedom: a table, because SciPy would be installed for this alone.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % confidence interval by Student's t.

    The values must be independent of each other: means of subjects, for example, and not pictures of one subject.

    Returns:
        (mean, half width). The half width is nan for a single value; both are nan for none.
    """
    x = np.asarray(values, dtype=float)
    n = len(x)
    if n < 2:
        return float(x.mean()) if n else math.nan, math.nan
    t = _T[n - 2] if n - 2 < len(_T) else 1.96 + 2.4 / (n - 1)
    return float(x.mean()), float(t * x.std(ddof=1) / math.sqrt(n))
