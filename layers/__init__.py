"""The model: forward directly above backward. `y, saved = layer.forward(x)`; `dx = layer.backward(dy, saved)`."""
