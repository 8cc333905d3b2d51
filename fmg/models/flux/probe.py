"""Does a time embedder fit the time scale that a config states? Keys and shapes cannot tell; its response can."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding

from fmg.models.flux.transformer import SINUSOID_CHANNELS

STOCK_SCALE = 1000.0
_POINTS = 101
# Mean step between times 0.01 apart, over the distance of unrelated times. Embedders that were trained on times scaled
# by 1000 are smooth in them (0.09 to 0.16 on the embedded models); others turn at random (0.7).
_SMOOTH, _ROUGH = 0.3, 0.5
# At unscaled times an embedder of scaled ones hardly moves: 0.07 of its range on the embedded models.
_NARROW = 0.2


@torch.no_grad()
def time_scale_doubt(embedder: TimestepEmbedding, time_scale: float) -> str | None:
    """Why the embedder's response does not fit times in [0, 1] multiplied by `time_scale`; None when it does.

    A heuristic: it compares the response over [0, 1] at the stated scale with that at FLUX's own scale of 1000.
    """
    roughness, spread = _response(embedder, time_scale)
    if time_scale >= STOCK_SCALE / 10:
        if roughness > _ROUGH:
            return (
                f"the weights respond to times multiplied by {time_scale:g} without any smoothness ({roughness:.2f}),"
                " as weights of unscaled times do; if pictures are noise, set model.time_scale to 1"
            )
        return None
    stock_roughness, stock_spread = _response(embedder, STOCK_SCALE)
    if stock_roughness < _SMOOTH and spread < _NARROW * stock_spread:
        return (
            f"the weights hardly respond to times multiplied by {time_scale:g}, and smoothly to times multiplied by"
            f" {STOCK_SCALE:g}, as stock FLUX weights do; if pictures are noise, set model.time_scale to"
            f" {STOCK_SCALE:g}"
        )
    return None


def _response(embedder: TimestepEmbedding, time_scale: float) -> tuple[float, float]:
    """Roughness over [0, 1], and the root mean square distance of two embeddings."""
    weight = embedder.linear_1.weight
    times = torch.linspace(0, 1, _POINTS, device=weight.device)
    sinusoids = get_timestep_embedding(
        time_scale * times, SINUSOID_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    embedded = embedder(sinusoids.to(weight.dtype)).float()
    spread = (2 * (embedded - embedded.mean(0)).square().sum(1).mean()).sqrt()
    step = embedded.diff(dim=0).norm(dim=1).mean()
    return float(step / spread.clamp_min(torch.finfo(torch.float32).tiny)), float(spread)
