"""Fitting a compression to text: token sequences, covariances, and the fit itself."""

from tensorllm.calibration.fit import fit, fit_folder
from tensorllm.calibration.sequences import Calibration, read_calibration

__all__ = ["Calibration", "fit", "fit_folder", "read_calibration"]
