"""Operators of the decode chain; imported as `minidsv.kernels`, never as `kernels`."""
