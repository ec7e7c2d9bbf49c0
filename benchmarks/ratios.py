"""How many times faster than others ops of the registry set out to be on a CPU."""

from __future__ import annotations

HALF = "_bfloat16"  # what the names of cases in bfloat16 end with

# By op and case: contenders, and how many times as long as mmfast they are to take. torch.mm, a
# product of as many operations, shows the rate of products: 0.55 of it.
_FLOAT = {"SDPA": 1.2}
_HALF = {"SDPA": 2.0, "torch.mm": 0.55}
_CHAIN = {"plain torch": 4.0, "torch.compile": 1.2}
LONG = ("1x8x4096x128",)  # samples that take seconds: for --scale and --full
RATIOS: dict[tuple[str, str], dict[str, float]] = {
    ("randn", "1x16x21x60x104"): {"torch.randn": 5.0},
    ("scaled_dot_product_attention", "2x16x256x72"): _FLOAT,
    ("scaled_dot_product_attention", "1x24x1024x64"): _FLOAT,
    ("scaled_dot_product_attention", "1x8x4096x128"): _FLOAT,
    ("scaled_dot_product_attention", "2x16x256x72" + HALF): _HALF,
    ("scaled_dot_product_attention", "1x24x1024x64" + HALF): _HALF,
    ("scaled_dot_product_attention", "1x8x4096x128" + HALF): {"SDPA": 1.7, "torch.mm": 0.55},
    ("scaled_dot_product_attention_bwd", "2x16x256x72"): {"PyTorch": 1.1},
    ("scaled_dot_product_attention_bwd", "2x16x256x72" + HALF): {"PyTorch": 1.1},
    ("gated_residual_modulate", "8x256x1152_no_weight_no_bias"): _CHAIN,
    ("gated_residual_modulate", "4x1024x1536_no_weight_no_bias"): _CHAIN,
    ("gated_residual_modulate_bwd", "8x256x1152_no_weight_no_bias"): {"plain torch": 3.0},
    ("gated_residual_modulate_bwd", "4x1024x1536_no_weight_no_bias"): {"plain torch": 3.0},
}
