"""Single precision."""

from __future__ import annotations

from accel.interfaces import Precision


class FP32(Precision):
    """Parameters, gradients and arithmetic in float32, as torch does it by itself."""
