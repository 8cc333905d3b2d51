"""Probability paths, time grids, Gaussians and flow-map adapters: the mathematics everything else is built on.

Importing this package does not import torch, because recipes need the grids; torch-backed names resolve on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fmg.flow.grids import GridSpec, grid_names, make_grid

if TYPE_CHECKING:
    from fmg.flow.analytic import GaussianMap, MixtureMap
    from fmg.flow.gaussian import Gaussian, UnscaledGaussian
    from fmg.flow.maps import SingleTimeMap, TrigFlowMap, TwoTimeMap, VelocityMap
    from fmg.flow.path import AffinePath, LinearPath, TrigPath, expand, path_by_name

_HOMES = {
    "AffinePath": "path",
    "LinearPath": "path",
    "TrigPath": "path",
    "expand": "path",
    "path_by_name": "path",
    "Gaussian": "gaussian",
    "UnscaledGaussian": "gaussian",
    "SingleTimeMap": "maps",
    "TrigFlowMap": "maps",
    "TwoTimeMap": "maps",
    "VelocityMap": "maps",
    "GaussianMap": "analytic",
    "MixtureMap": "analytic",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


__all__ = [
    "AffinePath",
    "Gaussian",
    "GaussianMap",
    "GridSpec",
    "LinearPath",
    "MixtureMap",
    "SingleTimeMap",
    "TrigFlowMap",
    "TrigPath",
    "TwoTimeMap",
    "UnscaledGaussian",
    "VelocityMap",
    "expand",
    "grid_names",
    "make_grid",
    "path_by_name",
]
