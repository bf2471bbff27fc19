"""Content and rotary parts joined into one product of width E + R or C + R."""

import numpy as np


def attend(q_HF, k_HSF, v_HSG, scale):
    score_HS = np.einsum("hf,hsf->hs", q_HF, k_HSF) * scale
    w_HS = np.exp(score_HS - score_HS.max(axis=-1, keepdims=True))
    return np.einsum("hs,hsg->hg", w_HS, v_HSG) / w_HS.sum(axis=-1, keepdims=True)


def scale_of(qn_HE, qr_HR):
    return float((qn_HE.shape[1] + qr_HR.shape[1]) ** -0.5)


def mla_expanded(qn_HE, qr_HR, c_SC, kr_SR, Wuk_CHE, Wuv_CHE):
    k_HSE = np.tensordot(c_SC, Wuk_CHE, axes=1).transpose(1, 0, 2)
    kr_HSR = np.broadcast_to(kr_SR, (len(qn_HE), *kr_SR.shape))
    v_HSE = np.tensordot(c_SC, Wuv_CHE, axes=1).transpose(1, 0, 2)
    q_HF = np.concatenate([qn_HE, qr_HR], axis=1)
    return attend(q_HF, np.concatenate([k_HSE, kr_HSR], axis=2), v_HSE, scale_of(qn_HE, qr_HR))


def mla_absorbed(qn_HE, qr_HR, c_SC, kr_SR, Wuk_CHE, Wuv_CHE):
    qc_HC = np.matmul(Wuk_CHE.transpose(1, 0, 2), qn_HE[:, :, None])[:, :, 0]
    key_SF = np.concatenate([c_SC, kr_SR], axis=1)
    score_HS = np.concatenate([qc_HC, qr_HR], axis=1) @ key_SF.T * scale_of(qn_HE, qr_HR)
    w_HS = np.exp(score_HS - score_HS.max(axis=-1, keepdims=True))
    oc_HC = w_HS @ c_SC / w_HS.sum(axis=-1, keepdims=True)
    return np.matmul(oc_HC[:, None], Wuv_CHE.transpose(1, 0, 2))[:, 0]
