"""The yardstick: whole arrays, one process, forward only. Imports NumPy and nothing of ours.

Gradients come from the complex step (Squire and Trapp, 1998): for analytic f, `f(x + ih).imag / h` is f'(x) without a
difference, so that h = 1e-30 makes it exact to rounding. No backward pass is written here, so none can share a mistake.
"""
