"""Gradient checkpointing: keep the inputs of segments only, and run each segment again for its backward (1604.06174).

A stack of layers, each with dropout, is cut into segments of `every` layers; the last one may be shorter.
    layer.forward(x_TD, rng) -> y_TD, saved            layer.backward(dy_TD, saved) -> dx_TD, dW
forward draws from rng, a NumPy Generator, once a layer; what backward needs is in `saved`, an object that holds arrays.
run_forward runs each layer once and keeps, of all arrays, the input of each segment only, none of the layers' saved. run_backward runs each
layer once more, and never holds the saved of more than two segments. A layer that is run again must draw what it drew before:
rng.bit_generator.state can be read and set. After run_backward the generator is where the caller left it.
`kept` is yours; other runs may come between. Leave the arguments as they are.
"""


def run_forward(x_TD, layers, every, rng):
    """x (T, D), a list of layers, layers a segment, a Generator -> y (T, D), kept."""
    # --- yours ---
    kept = []
    for first in range(0, len(layers), every):
        kept.append((x_TD, rng.bit_generator.state))
        for layer in layers[first : first + every]:
            x_TD, _ = layer.forward(x_TD, rng)
    return x_TD, kept
    # --- end ---


def run_backward(dy_TD, kept, layers, every, rng):
    """dy (T, D), kept, the same layers, `every` and Generator -> dx (T, D), a list of each layer's dW."""
    # --- yours ---
    now = rng.bit_generator.state
    dWs = [None] * len(layers)
    for n in reversed(range(len(kept))):
        x_TD, state = kept[n]
        rng.bit_generator.state = state
        first = n * every
        saved = []
        for layer in layers[first : first + every]:
            x_TD, one = layer.forward(x_TD, rng)
            saved.append(one)
        for i in reversed(range(len(saved))):
            dy_TD, dWs[first + i] = layers[first + i].backward(dy_TD, saved[i])
    rng.bit_generator.state = now
    return dy_TD, dWs
    # --- end ---
