"""Loops that train: the step, the text and the digits that are learnt from."""
