"""Passes over calibration text that leave the weights alone."""
