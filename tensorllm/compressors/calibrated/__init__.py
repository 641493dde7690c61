"""Strategies that are fitted to a calibration text, one file each."""
