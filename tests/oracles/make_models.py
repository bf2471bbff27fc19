"""Make models.npz: a GPT-2 (tied head) and a Llama 3.1 (grouped-query, head of its own), and three steps of AdamW, by PyTorch.

    pip install torch==2.13.0 transformers==5.23.0
    python tests/oracles/make_models.py

The models are those of Transformers, of the blocks in make_blocks.py: in float64, with its two replacements throughout. Each
sequence runs by itself; `loss` is the mean over all tokens of the cross-entropy with `targets`, drawn at random like the ids.
Gradients (`dNAME`) are those of the first step, before clipping to CLIP; `norm` is their norm, `losses` the loss before each
step, `after.NAME` the weights after the last. Weights are stored by our names, (in, out) and by heads.

Not everything after three steps is exact: a key's bias has no gradient but rounding, which AdamW makes some 1e-11 of; and
clip_grad_norm_ multiplies by CLIP / (norm + 1e-6), without which weights are some 3e-9 off.
"""

from pathlib import Path

import numpy as np
import torch
from make_blocks import LENGTHS, D, in_float64, tables
from make_blocks import gpt2 as gpt2_block
from make_blocks import llama as llama_block
from transformers import GPT2LMHeadModel, LlamaForCausalLM

STEPS, CLIP = 3, 0.5


class Tables(torch.nn.Module):
    """cos and sin of a model's positions 0, 1, ..., in float64."""

    def __init__(self, config, kind):
        super().__init__()
        self.config, self.kind = config, kind

    def forward(self, x, position_ids):
        return tables(self.config, self.kind, position_ids.shape[1])


def whole(model, names, blocks, others):
    """The model, with where each of our names is found: the `others`, and the block's `names` in each of its `blocks`."""
    found = {ours: (theirs, (lambda t: t.T) if ours == "Whead" else (lambda t: t)) for ours, theirs in others.items()}
    for i in range(2):
        # Without a name of theirs, what turns it into ours takes all of the block's.
        found |= {f"blocks.{i}.{ours}": (f"{blocks}.{i}.{theirs or ''}", turn) for ours, (theirs, turn) in names.items()}
    return model, found


def gpt2():
    block, names, _ = gpt2_block()
    config = block.attn.config
    config.vocab_size, config.n_layer, config.n_positions, config.embd_pdrop = 23, 2, 16, 0.0
    others = {"Wte": "wte.weight", "Wpe": "wpe.weight", "wnf": "ln_f.weight", "bnf": "ln_f.bias"}
    return whole(GPT2LMHeadModel(config), names, "transformer.h", {n: f"transformer.{t}" for n, t in others.items()})


def llama():
    block, names, _ = llama_block()
    config = block.self_attn.config
    config.vocab_size, config.num_hidden_layers = 19, 2
    model = LlamaForCausalLM(config)
    model.model.rotary_emb, model.model.norm = Tables(config, "llama3"), in_float64(model.model.norm)
    for layer in model.model.layers:
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(layer, name, in_float64(getattr(layer, name)))
    others = {"Wte": "model.embed_tokens.weight", "wnf": "model.norm.weight", "Whead": "lm_head.weight"}
    return whole(model, names, "model.layers", others)


def ours(names, tensors):
    """Theirs by name -> ours by name."""
    found = {}
    for name, (theirs, turn) in names.items():
        block = {n.removeprefix(theirs): t for n, t in tensors.items() if n.startswith(theirs)}
        found[name] = turn(block if theirs.endswith(".") else tensors[theirs]).detach().numpy().copy()
    return found


def main():
    stored = {"lengths": np.array(LENGTHS)}
    for kind, make in {"gpt2": gpt2, "llama": llama}.items():
        torch.manual_seed(0)
        model, names = make()
        model = model.double().eval()
        vocabulary = model.config.vocab_size
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for n, p in parameters.items():
                # Sharp attention; neither 0 nor 1, and exact in float32 (which also packs better): odd multiples of 1/256.
                mean = 1.0 if p.ndim == 1 and n.endswith("weight") else 0.0
                drawn = mean + torch.randn_like(p) * (0.3 if p.ndim == 1 else 1.5 * D**-0.5)
                p.copy_((2 * torch.floor(128 * drawn) + 1) / 256)
        ids, targets = torch.randint(vocabulary, (2, sum(LENGTHS)))
        decayed = [p for p in parameters.values() if p.ndim > 1]
        others = [p for p in parameters.values() if p.ndim == 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
        steps = []
        for _ in range(STEPS):
            logits = torch.cat([model(part[None], use_cache=False).logits[0] for part in ids.split(LENGTHS)])
            loss = torch.nn.functional.cross_entropy(logits, targets)
            optimizer.zero_grad()
            loss.backward()
            if not steps:
                first = {"ids": ids.numpy(), "targets": targets.numpy(), "logits": logits.detach().numpy()}
                first |= ours(names, parameters)
                first |= {f"d{n}": g for n, g in ours(names, {n: p.grad for n, p in parameters.items()}).items()}
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP)
            if not norm > CLIP:
                raise ValueError(f"{kind}: a norm of {norm} is not clipped to {CLIP}")
            steps.append((loss.item(), norm.item()))
            optimizer.step()
        losses, norms = np.array(steps).T
        first |= {"loss": losses[0], "norm": norms[0], "losses": losses}
        first |= {f"after.{n}": w for n, w in ours(names, parameters).items()}
        stored |= {f"{kind}.{n}": a for n, a in first.items()}
    np.savez_compressed(Path(__file__).with_name("models.npz"), **stored)


if __name__ == "__main__":
    main()
