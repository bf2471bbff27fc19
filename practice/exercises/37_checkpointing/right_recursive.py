"""A stack of segments that is popped; the generator is copied for each segment, so that the caller's is never touched in backward."""

import copy


def run_forward(x_TD, layers, every, rng):
    stack = []
    for i, layer in enumerate(layers):
        if i % every == 0:
            stack.append((i, x_TD, copy.deepcopy(rng)))
        x_TD = layer.forward(x_TD, rng)[0]
    return x_TD, {"stack": stack}


def run_backward(dy_TD, kept, layers, every, rng):
    gradients = []

    def segment(i, end, x, own, dy):
        """Forward on the way in, backward on the way out."""
        if i == end:
            return dy
        y, saved = layers[i].forward(x, own)
        dx, dW = layers[i].backward(segment(i + 1, end, y, own, dy), saved)
        gradients.append(dW)
        return dx

    for first, x, then in kept["stack"][::-1]:
        dy_TD = segment(first, min(first + every, len(layers)), x, copy.deepcopy(then), dy_TD)
    return dy_TD, gradients[::-1]
