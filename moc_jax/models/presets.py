"""Model sizes by name, and what each holds and costs. `python -m moc_jax.models.presets` prints the table."""

import math

import jax

from moc_jax.attention.accounting import account, published_settings
from moc_jax.config import ModelConfig
from moc_jax.models.mmdit import abstract_model

PRESETS = {
    "demo": ModelConfig(dim=128, depth=4, heads=2, rope_theta=100.0, dtype="float32", remat="none"),
    "small": ModelConfig(dim=512, depth=12, heads=8),
    "base": ModelConfig(dim=1024, depth=20, heads=8),
    "large": ModelConfig(dim=1280, depth=24, heads=10),
    # The size of LCT's and MoC's backbone; its widths are not published.
    "3b": ModelConfig(dim=1792, depth=26, heads=14, text_dim=4096),
}


def parameter_count(cfg: ModelConfig) -> int:
    """Numbers that training changes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_model(cfg)[1]))


def matrix_flops(cfg: ModelConfig, text_tokens: int, video_tokens: int) -> int:
    """FLOPs of one forward pass outside attention: each token meets its own stream's matrices, once.

    Modulation is per shot, not per token, and counts as nothing.
    """
    per_stream = 4 * cfg.dim**2 + 2 * cfg.dim * cfg.mlp_dim
    ends = 2 * cfg.dim * cfg.patch_size * cfg.latent_channels * video_tokens + cfg.dim * cfg.text_dim * text_tokens
    return 2 * (cfg.depth * per_stream * (text_tokens + video_tokens) + ends)


def print_presets() -> None:
    """One row per preset, on the published multi-shot scene (8 shots of 22 500 tokens, chunks of 1280, k = 5)."""
    name, (table, moc) = next((n, s) for n, s in published_settings().items() if "1280" in n)
    tokens = int(table.valid.sum())
    print(f"scene: {name}, {tokens} video tokens; forward pass, attention with MoC and dense\n")
    print(f"{'preset':8}{'parameters':>14}{'dim':>7}{'depth':>7}{'heads':>7}{'matrices':>12}{'MoC':>12}{'dense':>12}")
    for preset, cfg in PRESETS.items():
        cost = account(table, moc, cfg.head_dim)
        per_head = cfg.depth * cfg.heads
        flops = matrix_flops(cfg, 0, tokens), per_head * cost.flops, per_head * cost.flops_dense
        shown = "".join(f"{x / 1e12:10.1f} T" for x in flops)
        print(f"{preset:8}{parameter_count(cfg):14,}{cfg.dim:7}{cfg.depth:7}{cfg.heads:7}{shown}")


if __name__ == "__main__":
    print_presets()
