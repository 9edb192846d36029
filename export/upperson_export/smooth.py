"""Fold smoothing factors into a plain tower, exactly.

At a site, what Linears read is divided by s_c in channel c, by changing the weights that compute
it, and row c of each reader is multiplied by s_c; see `upperson_calibration.smoothing`.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from upperson_export.plain import PlainTower
from upperson_rt.errors import InputError

AnyPlainTower = TypeVar("AnyPlainTower", bound=PlainTower)


@torch.no_grad()
def smooth(tower: AnyPlainTower, factors: Mapping[str, npt.NDArray[np.float32]]) -> AnyPlainTower:
    """Return a copy of a folded tower that computes the same from smoother activations.

    Args:
        tower: A folded tower; left as it is.
        factors: s by channel [C] for each site; one that is missing stays.

    Raises:
        InputError: A site is not in the tower, or its factors do not fit.
    """
    smoothed = deepcopy(tower)
    sites = smoothed.sites()
    if unknown := [name for name in factors if name not in sites]:
        raise InputError(
            f"smoothing factors for '{unknown[0]}', but the tower has {len(smoothed.blocks)} "
            "blocks and no such site: calibrate this model again"
        )
    for name, site in sites.items():
        if (s_C := factors.get(name)) is None:
            continue
        width = len(site.readers[0].weight)
        if s_C.shape != (width,) or not (np.isfinite(s_C) & (s_C > 0)).all():
            raise InputError(
                f"smoothing factors of '{name}' must be {width} positive numbers, found shape "
                f"{s_C.shape}: calibrate this model again"
            )
        factors_C = torch.from_numpy(s_C.astype(np.float32))
        site.divide(factors_C)
        for reader in site.readers:
            reader.weight.mul_(factors_C[:, None])
    return smoothed
