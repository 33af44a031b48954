"""Loss weights per noise level."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from sdtrain.diffusion.targets import PredictionType


def min_snr(snr: Float[Tensor, " batch"], gamma: float, prediction_type: PredictionType) -> Float[Tensor, " batch"]:
    """Min-SNR-gamma weight of the mean squared error of a prediction.

    The paper bounds the weight of the clean item's error, min(SNR, gamma). The error of the noise is that of the clean
    item times SNR, that of the velocity times (SNR + 1), and that of the flow times (sqrt(SNR) + 1)^2 = 1 / t^2, so
    the same objective is

        sample:  min(SNR, gamma)          v_prediction: min(SNR, gamma) / (SNR + 1)
        epsilon: min(SNR, gamma) / SNR    flow:         min(SNR, gamma) / (sqrt(SNR) + 1)^2

    All are finite from SNR 0 to infinity. At SNR 0 all but epsilon's are 0: the objective asks nothing of pure noise.

    Args:
        snr: alpha_bar / (1 - alpha_bar) at each item's timestep, float32, in [0, inf].
        gamma: The bound, 5 in the paper.

    Source: Hang et al. 2023, arXiv:2303.09556, section 3.4.
    """
    match prediction_type:
        case "sample":
            return snr.clamp(max=gamma)
        case "epsilon":
            return (gamma / snr).clamp(max=1.0)  # no 0/0 where the signal ends
        case "v_prediction":
            return snr.clamp(max=gamma) / (snr + 1)
        case "flow":
            return snr.clamp(max=gamma) / (snr.sqrt() + 1).square()
