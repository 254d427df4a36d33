"""PEFT's settings for written edits: the usual rank and alpha, and those of modules that differ.

    written(adapter, "unet")        # {"r": 16, "lora_alpha": 16, "rank_pattern": {}, "target_modules": [...], ...}

Source: peft 0.21, LoraConfig and LoHaConfig; a pattern's key that begins with ^ is a module's full name.
"""

from collections import Counter
from typing import Any

from sdjax.formats.adapters import lora_tensors
from sdjax.methods.adapter import Adapter

LORA = frozenset({"down", "up"})
LOHA = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
TEXT = "text_model."  # prefix of names in text encoders before transformers 5.6
BESIDE = ("scale", "alpha", "outputs")


def kind(adapter: Adapter) -> str | None:
    """Returns the common kind of all edits, "LORA" (also for DoRA) or "LOHA"; None if PEFT has no settings for them."""
    held = [factors for *_, factors in lora_tensors.modules(adapter)]
    cores = {frozenset(factors) - set(BESIDE) for factors in held}
    magnitudes = {"outputs" in factors for factors in held}
    if len(cores) != 1 or len(magnitudes) != 1:
        return None
    core = cores.pop()
    return "LORA" if core == LORA else "LOHA" if core == LOHA and not magnitudes.pop() else None


def written(adapter: Adapter, part: str) -> dict[str, Any]:
    """Returns PEFT's settings for layers that fit the tensors of a part's edits."""
    found = {module: factors for own, module, factors in lora_tensors.modules(adapter) if own == part}
    ranks = {module: lora_tensors.rank(factors) for module, factors in found.items()}
    alphas = {module: _alpha(factors, ranks[module]) for module, factors in found.items()}
    rank, alpha = _usual(ranks), _usual(alphas)
    shared = {
        "r": rank,
        "rank_pattern": {_key(module): x for module, x in ranks.items() if x != rank},
        "alpha_pattern": {_key(module): x for module, x in alphas.items() if x != alpha},
        "target_modules": sorted(module.removeprefix(TEXT) for module in found),
        "peft_type": kind(adapter),
    }
    if shared["peft_type"] == "LOHA":
        return {**shared, "alpha": alpha, "use_effective_conv2d": False}
    dora = any("outputs" in factors for factors in found.values())
    return {**shared, "lora_alpha": alpha, "use_dora": dora, "use_rslora": False, "lora_bias": False}


def _key(module):
    """Returns a pattern's key that matches this module only."""
    return module.removeprefix(TEXT) if module.startswith(TEXT) else f"^{module}"


def _alpha(factors, rank):
    """Returns scale times rank, without float32's rounding error."""
    exact = float(factors["scale"]) * rank
    return round(exact) if abs(exact - round(exact)) < 1e-5 else float(f"{exact:.7g}")


def _usual(values):
    return Counter(values.values()).most_common(1)[0][0]
