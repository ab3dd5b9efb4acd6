"""Better rounding to 4 bits, from what the model computes on a calibration text."""
