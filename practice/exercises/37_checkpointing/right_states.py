"""Inputs and states in two lists; backward goes through the segments by their first layers."""

import numpy as np


def run_forward(x_TD, layers, every, rng):
    inputs, states = [], []
    h = x_TD
    for i in range(len(layers)):
        if not i % every:
            inputs.append(h)
            states.append(dict(rng.bit_generator.state))
        h, saved = layers[i].forward(h, rng)
        del saved
    return h, (inputs, states)


def run_backward(dy_TD, kept, layers, every, rng):
    inputs, states = kept
    before = rng.bit_generator.state
    gradients = {}
    try:
        for first in np.arange(0, len(layers), every)[::-1].tolist():
            rng.bit_generator.state = states[first // every]
            h, records = inputs[first // every], {}
            for i in range(first, min(first + every, len(layers))):
                h, records[i] = layers[i].forward(h, rng)
            while records:
                i, saved = records.popitem()
                dy_TD, gradients[i] = layers[i].backward(dy_TD, saved)
                del saved
    finally:
        rng.bit_generator.state = before
    return dy_TD, [gradients[i] for i in sorted(gradients)]
