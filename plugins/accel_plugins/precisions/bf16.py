"""bfloat16: float32's range in half the width, so losses need no scaling (Kalamkar et al. 2019)."""

from __future__ import annotations

from .autocast import Autocast


class BF16(Autocast):
    """bfloat16 arithmetic by autocast; parameters, gradients and optimizer state stay float32."""

    dtype = "bfloat16"
