"""What rounding may do to rows and losses: how close numbers have to be that are held against each other."""

from __future__ import annotations

import torch

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}  # of a row's norm; half precision: 0.2


def tolerance(*dtypes: torch.dtype) -> float:
    """That of the coarsest type that takes part, autocast included."""
    cast = [torch.get_autocast_dtype(d) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]
    return max(TOLERANCE.get(d.to_real(), 0.2) for d in (*dtypes, *cast))


def slack(dtype: torch.dtype) -> float:
    """Of all rows together: what rounding may do to a parameter whose own gradient is tiny."""
    return 1e-5 if dtype.to_real() is torch.float64 else 1e-3
