"""Fitting a compression to text: token sequences, second moments, and the fit itself."""

from tensorllm.calibration.fit import fit
from tensorllm.calibration.sequences import Calibration, read_calibration

__all__ = ["Calibration", "fit", "read_calibration"]
