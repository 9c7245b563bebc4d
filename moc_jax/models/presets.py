"""What each preset holds and costs: `python -m moc_jax.models.presets` prints the table."""

from moc_jax.attention.accounting import account, published_settings
from moc_jax.config.presets import PRESETS
from moc_jax.models import matrix_flops, parameter_count


def print_presets() -> None:
    """One row per preset, on the published multi-shot scene (8 shots of 22 500 tokens, chunks of 1280, k = 5)."""
    name, (table, moc) = next((n, s) for n, s in published_settings().items() if "1280" in n)
    tokens = int(table.valid.sum())
    print(f"scene: {name}, {tokens} video tokens; forward pass, attention with MoC and dense\n")
    print(f"{'preset':16}{'parameters':>14}{'dim':>7}{'depth':>7}{'heads':>7}{'matrices':>12}{'MoC':>12}{'dense':>12}")
    for preset, cfg in PRESETS.items():
        cost = account(table, moc, cfg.head_dim)
        per_head = cfg.depth * cfg.heads
        flops = matrix_flops(cfg, 0, tokens), per_head * cost.flops, per_head * cost.flops_dense
        shown = "".join(f"{x / 1e12:10.1f} T" for x in flops)
        print(f"{preset:16}{parameter_count(cfg):14,}{cfg.dim:7}{cfg.depth:7}{cfg.heads:7}{shown}")


if __name__ == "__main__":
    print_presets()
