"""Two-layer MLP, forward.

    a = x W1 + b1        h = GELU(a)        y = h W2 + b2

GELU in the tanh form: GELU(a) = a/2 (1 + tanh(sqrt(2/pi) (a + 0.044715 a^3))).
T tokens, D model width, F hidden width. Weights are stored (in, out). T may be 0.
Keep the inputs' dtype, float32 or float64, and leave the arguments as they are.
"""

import math

import numpy as np


def mlp_forward(x_TD, W1_DF, b1_F, W2_FD, b2_D):
    """x (T, D), W1 (D, F), b1 (F), W2 (F, D), b2 (D) -> y (T, D), saved; saved: whatever your backward would need."""
    # --- yours ---
    a_TF = x_TD @ W1_DF + b1_F
    u_TF = math.sqrt(2 / math.pi) * (a_TF + 0.044715 * a_TF**3)
    h_TF = 0.5 * a_TF * (1 + np.tanh(u_TF))
    y_TD = h_TF @ W2_FD + b2_D
    return y_TD, (x_TD, a_TF, h_TF)
    # --- end ---
