"""How `toca eval` measures digits: the judge's features, and the real digits to compare with.

`toca eval examples/digits/sampler.py` finds this file beside the sampler.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from digits import load_images, load_judge

SPATIAL_CHANNELS = 7  # as many as sFID keeps of Inception's map
MIDDLE = 4  # layers of the judge up to its second map, 64 channels of 8 x 8


def features() -> Callable[[Tensor], dict[str, Tensor]]:
    """The judge as a feature extractor, of pictures (B, 1, 32, 32) in [0, 1].

    pool is its second map, averaged over places: 64 numbers, which can be told from a few hundred
    samples.  A classifier's last map is made not to see what caching leaves, grain: under noise of
    22 dB the distance to real digits stayed at 1.2 by that map and rose from 0.06 to 0.32 by this
    one.  spatial is some channels of the same map at 4 x 4 places: 112 numbers.
    """
    layers = list(load_judge())
    start, rest = nn.Sequential(*layers[:MIDDLE]), nn.Sequential(*layers[MIDDLE:])

    def extract(images: Tensor) -> dict[str, Tensor]:
        middle = start(images * 2 - 1)
        logits = rest(middle)
        spatial = F.avg_pool2d(middle[:, :SPATIAL_CHANNELS], 2)
        return {
            "pool": middle.mean((2, 3)),
            "spatial": spatial.flatten(1),
            "logits": logits,
            "classes": logits.argmax(1),
        }

    return extract


def reference() -> Tensor:
    """All 1797 real digits, in [0, 1]."""
    images, _ = load_images()
    return images / 2 + 0.5
