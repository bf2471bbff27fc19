"""The scale goes into the small matrix; backward computes z again; einsum."""

import numpy as np


def lora_forward(x_TD, W_DF, A_DR, B_RF, alpha):
    scaled = A_DR * (alpha / len(B_RF))
    return np.einsum("td,df->tf", x_TD, W_DF) + np.einsum("tr,rf->tf", x_TD @ scaled, B_RF), x_TD


def lora_backward(dy_TF, saved, W_DF, A_DR, B_RF, alpha):
    s = alpha / len(B_RF)
    scaled_A, scaled_B = A_DR * s, B_RF * s
    back = np.einsum("tf,rf->tr", dy_TF, B_RF)
    dx = np.einsum("tf,df->td", dy_TF, W_DF)
    dx += np.einsum("tr,dr->td", back, scaled_A)
    return (
        dx,
        np.einsum("td,tf,rf->dr", saved, dy_TF, scaled_B, optimize=["einsum_path", (1, 2), (0, 1)]),
        (saved @ scaled_A).T @ dy_TF,
    )


def merge(W_DF, A_DR, B_RF, alpha):
    merged = np.array(W_DF)
    merged += np.einsum("dr,rf->df", A_DR * (alpha / len(B_RF)), B_RF)
    return merged
