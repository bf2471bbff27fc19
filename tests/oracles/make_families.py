"""Make families/: tiny random models of each family, saved by Transformers as models are published, and what they must compute.

    pip install torch==2.13.0 transformers==5.23.0
    python tests/oracles/make_families.py [NAME ...]     # by default all of family_configs.py

Each folder holds config.json, safetensors in float32, and expected.npz: `ids` (B, S); `logits` (B, S, V) of them; `loss`, the
mean over the B * (S - 1) predictions of the next token; its gradients, `grad.NAME` by the names and in the layouts of the
safetensors file; `prompt`, and `greedy`, the 24 tokens that follow it, each the argmax of a whole forward pass.

All of it is computed in float64 from the float32 weights. Transformers computes some things in float32 whatever the dtype (RMS
norms, tables of cos and sin, DeepSeek-V2's rotation, routers' products and softmax). It names float32 anew each time it needs
it, so while a model runs here `torch.float32`, `torch.float` and `Tensor.float` stand for float64 (`wide`), and rotary
frequencies are computed again under the same names. That nothing escapes is checked, not believed:
* every operation of forward and backward is watched, and one that takes or gives a float narrower than float64 is an error;
* with Transformers' other implementations of attention and of experts, logits and gradients agree to rounding;
* each tensor of the file is moved in float64 along a random direction, the file loaded again, and the loss's difference
  quotient of sixth order is the inner product with `grad.NAME`: so gradients bear the right names, too.

Seeds are tried in turn until nothing is trivial or near a tie: see `clear`.
"""

import itertools
import json
import logging
import math
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import transformers
from family_configs import FAMILIES
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

FOLDER = Path(__file__).with_name("families")
B, S, PROMPT, GREEDY = 3, 9, 5, 24
TIE = 1e-3  # no decision (a token, an expert, a group of experts) is closer than this
EPS = np.finfo(np.float64).eps


@contextmanager
def wide():
    """While it lasts, what Transformers writes as float32 is float64."""
    with (
        mock.patch.multiple(torch, float=torch.float64, float32=torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


class Float64Only(TorchDispatchMode):
    """Raises at an operation, forward or backward, that takes or gives a narrower float."""

    narrow = (torch.float32, torch.float16, torch.bfloat16, torch.complex64)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor) and leaf.dtype in self.narrow:
                raise TypeError(f"{operation} computes in {leaf.dtype}")
        return result


def save(name, seed):
    """A model with random weights in FOLDER/name."""
    torch.manual_seed(seed)
    settings = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **FAMILIES[name]}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    first_is_in = {id(m.weight) for m in model.modules() if type(m).__name__ == "Conv1D"}
    with torch.no_grad():
        for n, p in itertools.chain(model.named_parameters(), model.named_buffers()):
            if "inv_freq" in n:
                continue
            if p.ndim == 1:
                p.copy_(0.3 * torch.randn_like(p) + (0.0 if "bias" in n else 1.0))
            else:
                embeds = n.split(".")[-2] in ("wte", "wpe", "embed_tokens")
                wide_in = p.shape[0 if id(p) in first_is_in else -1]
                p.copy_(torch.randn_like(p) * (0.6 if embeds else 1.5 * wide_in**-0.5))
    shutil.rmtree(FOLDER / name, ignore_errors=True)
    model.save_pretrained(FOLDER / name, **({"max_shard_size": "8KB"} if name == "llama-tied-odd" else {}))
    if name == "llama-tied-odd":  # as configurations were written before Transformers 5
        config = json.loads((FOLDER / name / "config.json").read_text())
        rope = config.pop("rope_parameters")
        config |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": rope["rope_type"], "factor": rope["factor"]}}
        config["torch_dtype"] = config.pop("dtype")
        (FOLDER / name / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load(folder, attention="sdpa", experts="eager"):
    """The model of a folder in float64; to be run inside `wide`."""
    kinds = {"attn_implementation": attention, "experts_implementation": experts}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **kinds).double().eval()
    if hasattr(model.base_model, "rotary_emb"):
        with wide(), Float64Only():
            model.base_model.rotary_emb = type(model.base_model.rotary_emb)(model.config)
    return model


def loss_of(model, ids):
    logits = model(ids, use_cache=False).logits
    return logits, torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def state_of(folder):
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def by_saved_names(model, tensors):
    """Tensors in place of a model's parameters, by the names and in the layouts that save_pretrained writes.

    What is no parameter (DeepSeek-V3's e_score_correction_bias) is left out.
    """
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        kept = [p.clone() for p in model.parameters()]
        for p, t in zip(model.parameters(), tensors, strict=True):
            p.copy_(t)
        model.save_pretrained(folder)
        for p, t in zip(model.parameters(), kept, strict=True):
            p.copy_(t)
        return {n: t for n, t in state_of(Path(folder)).items() if not n.endswith("e_score_correction_bias")}


def difference(name, direction, ids):
    """Derivative of the loss as the tensors of the file move: central differences of sixth order."""

    def moved(by):
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(FOLDER / name / "config.json", folder)
            state = {n: t.double() + by * direction[n] if n in direction else t for n, t in state_of(FOLDER / name).items()}
            save_file(state, Path(folder) / "model.safetensors", {"format": "pt"})
            model = load(folder)
        with wide(), torch.no_grad():
            return loss_of(model, ids)[1].item()

    h = 1e-3
    return sum(w * (moved(k * h) - moved(-k * h)) for k, w in ((1, 45), (2, -9), (3, 1))) / (60 * h)


def gap(scores, k):
    """How much the k largest exceed the others, at the closest."""
    ordered = scores.sort(-1, descending=True)[0]
    return math.inf if k == scores.shape[-1] else (ordered[..., k - 1] - ordered[..., k]).min().item()


def routed(router, logits):
    """Experts of each token, in order; the smallest gap; and whether each limit on the choice changes it for some token."""
    top = lambda s: s.topk(router.top_k)[1].sort()[0]  # noqa: E731
    kind = type(router).__name__
    if kind in ("MixtralTopKRouter", "Qwen3MoeTopKRouter"):
        scores = logits.softmax(-1)
        return top(scores), gap(scores, router.top_k), True
    v3 = kind == "DeepseekV3TopkRouter"
    plain = logits.sigmoid() if v3 else logits.softmax(-1)

    def limited(scores):
        grouped = scores.view(len(scores), router.num_group, -1)
        worth = grouped.topk(2)[0].sum(-1) if v3 else grouped.max(-1)[0]
        allowed = torch.zeros_like(worth).scatter(1, worth.topk(router.topk_group)[1], 1.0).bool()
        scores = grouped.masked_fill(~allowed[..., None], -math.inf).flatten(1)
        return scores, min(gap(worth, router.topk_group), gap(scores, router.top_k))

    scores = plain + router.e_score_correction_bias if v3 else plain
    masked, closest = limited(scores)
    chosen = top(masked)
    matters = not torch.equal(chosen, top(scores)) and not (v3 and torch.equal(chosen, top(limited(plain)[0])))
    return chosen, closest, matters


def clear(model, ids, text, margins):
    """Whether no decision is near a tie and none is trivial.

    In each routed layer every expert serves some token of ids, and for some token the limit to groups and the correction bias
    change the choice. The continuation has at least six different tokens.
    """
    seen = []
    hooks = [
        m.register_forward_hook(lambda router, _, result: seen.append((router, *result)))
        for m in model.modules()
        if type(m).__name__.endswith("Router")
    ]
    with wide(), torch.no_grad():
        model(ids, use_cache=False)
        layers = len(seen)
        model(text, use_cache=False)
    for hook in hooks:
        hook.remove()
    good = min(margins) > TIE and len(set(text[0, PROMPT:].tolist())) >= 6
    for n, (router, logits, _, indices) in enumerate(seen):
        chosen, closest, matters = routed(router, logits)
        assert torch.equal(chosen, indices.sort()[0]), "the routing is not what `routed` says"
        good &= closest > TIE
        good &= n >= layers or (matters and len(chosen.unique()) == router.num_experts)
    return good


def continuation(model, prompt):
    """The prompt and its greedy continuation, by whole forward passes; and the leads of the best logit over the second."""
    text, margins = prompt, []
    with wide(), torch.no_grad():
        for _ in range(GREEDY):
            best = model(text, use_cache=False).logits[0, -1].topk(2)
            margins.append((best[0][0] - best[0][1]).item())
            text = torch.cat([text, best[1][None, :1]], dim=1)
    return text, margins


def gradients(model, ids):
    model.zero_grad()
    with wide(), Float64Only():
        logits, loss = loss_of(model, ids)
        loss.backward()
    return logits.detach(), loss.detach(), by_saved_names(model, [p.grad for p in model.parameters()])


def closeness(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).item()


def make(name):
    for seed in itertools.count():
        save(name, seed)
        model = load(FOLDER / name)
        rng = np.random.default_rng(seed)
        ids, prompt = (torch.from_numpy(rng.integers(model.config.vocab_size, size=s)) for s in ((B, S), (1, PROMPT)))
        text, margins = continuation(model, prompt)
        if clear(model, ids, text, margins):
            break
    with wide():
        cached = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=GREEDY, do_sample=False)
    assert torch.equal(cached, text), f"{name}: generate, with a cache, continues otherwise"
    logits, loss, grads = gradients(model, ids)
    state = state_of(FOLDER / name)
    assert all(t.dtype == torch.float32 for t in state.values())
    assert {n: t.shape for n, t in state.items() if not n.endswith("e_score_correction_bias")} == {
        n: g.shape for n, g in grads.items()
    }
    assert all(g.dtype == torch.float64 and g.isfinite().all() and g.abs().max() > 1e-8 for g in grads.values())

    routes = "num_experts_per_tok" in FAMILIES[name]
    again = gradients(load(FOLDER / name, "eager", "batched_mm" if routes else "eager"), ids)
    far = max(map(closeness, (again[0], again[1], *again[2].values()), (logits, loss, *grads.values())))
    assert far < 1e4 * EPS, f"{name}: two implementations differ by {far:.1e}"
    torch.manual_seed(1)
    direction = {n: torch.randn_like(g) for n, g in grads.items()}
    size = math.sqrt(sum((d**2).sum() for d in direction.values()))
    direction = {n: d / size for n, d in direction.items()}
    along = sum((direction[n] * g).sum() for n, g in grads.items()).item()
    off = abs(difference(name, direction, ids) - along)
    assert off < 1e-9 * max(1.0, abs(along)), f"{name}: the difference quotient is {off:.1e} from the gradient"
    single = AutoModelForCausalLM.from_pretrained(FOLDER / name, dtype=torch.float32, experts_implementation="eager")
    rough = closeness(single.eval()(ids).logits.detach().double(), logits)
    assert rough < 1e-3, f"{name}: far from the same model as it is, in float32"

    arrays = {"ids": ids, "logits": logits, "loss": loss, "prompt": prompt[0], "greedy": text[0, PROMPT:]}
    arrays |= {f"grad.{n}": g for n, g in sorted(grads.items())}
    np.savez_compressed(FOLDER / name / "expected.npz", **{n: a.numpy() for n, a in arrays.items()})
    for file in (FOLDER / name).iterdir():
        file.chmod(0o644)
    size = sum(file.stat().st_size for file in (FOLDER / name).iterdir())
    print(
        f"{name:18} seed {seed:3}  {size / 1024:5.1f} KiB  {len(state):3} tensors  loss {loss:.3f}  lead {min(margins):.4f}  "
        f"implementations {far:.0e}  difference {off:.0e}  float32 {rough:.0e}"
    )
    return size


def main():
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    print(f"{sum(map(make, sys.argv[1:] or FAMILIES)) / 1024:.0f} KiB in all")


if __name__ == "__main__":
    main()
