"""The tokens that the user names: what is edited or inpainted, say."""

from __future__ import annotations

from .selector import Selector


class Mask(Selector):
    """s = the weights given; equal weights go by age."""

    name = "mask"
    source = "given"
