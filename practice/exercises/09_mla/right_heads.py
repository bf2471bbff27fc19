"""Head by head; the absorbed form online, token by token."""

import math

import numpy as np


def mla_expanded(qn_HE, qr_HR, c_SC, kr_SR, Wuk_CHE, Wuv_CHE):
    o_HE = np.empty_like(qn_HE)
    for h, (qn_E, qr_R) in enumerate(zip(qn_HE, qr_HR, strict=True)):
        score_S = ((c_SC @ Wuk_CHE[:, h]) @ qn_E + kr_SR @ qr_R) / math.sqrt(len(qn_E) + len(qr_R))
        p_S = np.exp(score_S - np.logaddexp.reduce(score_S))
        o_HE[h] = p_S @ (c_SC @ Wuv_CHE[:, h])
    return o_HE


def mla_absorbed(qn_HE, qr_HR, c_SC, kr_SR, Wuk_CHE, Wuv_CHE):
    o_HE = np.empty_like(qn_HE)
    for h, (qn_E, qr_R) in enumerate(zip(qn_HE, qr_HR, strict=True)):
        q_C = Wuk_CHE[:, h] @ qn_E
        top, total, o_C = -math.inf, 0.0, np.zeros_like(c_SC[0])
        for c_C, kr_R in zip(c_SC, kr_SR, strict=True):
            score = float(q_C @ c_C + qr_R @ kr_R) / math.sqrt(len(qn_E) + len(qr_R))
            new = max(top, score)
            shrink, weight = math.exp(top - new), math.exp(score - new)
            total, o_C, top = total * shrink + weight, o_C * shrink + c_C * weight, new
        o_HE[h] = o_C / total @ Wuv_CHE[:, h]
    return o_HE
