"""What names say of a leaf: those of its axes, and the keys of its path."""

import re

from lorapre_jax._leaves.layers import Leaf

# Names of axes.
STACK = re.compile(r"(.*_)?(layers?|blocks?|stack|stages?|repeats?|layers_per_stage)")
EXPERT = re.compile(r"(num_)?(exp|experts?)(_.*)?|num_activations")
VOCAB = re.compile(r"vocab(ulary)?(_size)?")
EMBED = re.compile(r"(embed|embedding|emb|d_?model|model_dim|hidden(_size)?)(_.*)?")
_KNOWN = re.compile(r"head|mlp|ffn|lora|^kv$|^qkv$")

# Keys of paths, each between slashes or underscores.
_VECTOR = re.compile(r"(.*_)?(bias|biases|scale|gamma|beta|sinks?|A_log)")
_NORM = re.compile(r"(.*[_a-z])?norm(alization)?(_?\d+)?|ln\d*(_\w+)?", re.IGNORECASE)
# Kernels with their outputs first: PyTorch's and those of libraries that follow it;
# Haiku's transposed convolutions, `(*window, outputs, inputs)`; and, if shapes say so,
# GPT-2's `FlaxConv1D` and Gemma's gates.
OUT_FIRST = re.compile(r"weight(_[ih]h(_l\d+)?)?")
TRANSPOSED_CONV = re.compile(r"conv[^/]*transpose[^/]*/w$", re.IGNORECASE)
FROM_WIDTH = re.compile(r"(^|/)c_(attn|fc)/kernel$")
CONV_1D = re.compile(r"(^|/)c_(attn|fc|proj)/kernel$")
GATES = re.compile(r"gating_einsum")
STACK_KEY = re.compile(r"(.*_)?(layers?|blocks?|stack(ed)?|scan(ned)?|h)")
END = re.compile(
    r"embed|(^|/)w[tp]e(/|$)|vocab|logits|(^|/)shared(/|$)"
    r"|(^|/)(lm_|output_|decoder_)?head(/|$)",
    re.IGNORECASE,
)
CONV = re.compile(r"conv|patch", re.IGNORECASE)
ATTENTION = re.compile(r"att(e)?n|(^|[/_])mha|einsum", re.IGNORECASE)
INTO_HEADS = re.compile(
    r"(^|[/_])(to_)?w?(q|k|v|kv|qkv|query|key|value)(_?proj|_?einsum)?([/_]|$)"
)
OUT_OF_HEADS = re.compile(r"(^|[/_])(to_)?(w?o|out|output|vec)([/_]|$)")
DIGITS = re.compile(r"\d+")
# Of a layer; the `w1` and `w3` of one layer are not two layers.
LAYER_NUMBER = re.compile(r"(?<!\b[A-Za-z])\d+")
EXPERTS = re.compile(r"mlp|ffn|feed_?forward|moe|expert", re.IGNORECASE)


def is_in_attention(leaf: Leaf) -> bool:
    own = "/".join(leaf.path.split("/")[-4:])
    return bool(ATTENTION.search(own) or INTO_HEADS.search(own))


def is_convolution(leaf: Leaf, inner: list[int]) -> bool:
    """Whether the leaf is a convolution, by its name or by the shape of a window.

    A window is the first two of four axes, as long as windows are.
    """
    if CONV.search(leaf.path):
        return True
    if len(inner) != 4:
        return False
    height, width, p, q = (leaf.shape[axis] for axis in inner)
    # The windows of patches are larger and have few inputs.
    is_window = height in (1, 3, 5, 7, 9, 11) or (height <= 32 and p <= 4 < q)
    return height == width and is_window


def is_known(name: str) -> bool:
    return any(p.fullmatch(str(name)) for p in (STACK, EXPERT, VOCAB, EMBED)) or (
        _KNOWN.search(str(name)) is not None
    )


def named(leaf: Leaf, pattern: re.Pattern[str]) -> list[int]:
    names = enumerate(leaf.names)
    return [i for i, name in names if isinstance(name, str) and pattern.fullmatch(name)]


def is_vector(leaf: Leaf) -> bool:
    if "norm" in leaf.names or _VECTOR.fullmatch(leaf.last_key):
        return True
    # Only the layer that holds it counts: `norm1/linear/kernel` is a matrix.
    own = leaf.path.split("/")[-2:]
    return "kernel" not in leaf.last_key and any(map(_NORM.fullmatch, own))
