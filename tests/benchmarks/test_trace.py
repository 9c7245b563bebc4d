"""The split of a launch's time, by the names that kernels have."""

import dataclasses

import pytest

from benchmarks.trace import kind_of, split_of
from moc_jax.attention.pallas_gpu import flash, flash_backward


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        (f"{flash.NAME}_mosaic_gpu_kernel", "attention"),
        (f"{flash_backward.NAME}_mosaic_gpu_kernel", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6_64x128x64", "attention"),
        ("moc_router_mosaic_gpu_kernel", "other"),
        ("nvjet_sm90_tst_128x160_64x5_2x1_v_bz_NNT", "products"),
        ("gemm_fusion_dot_61", "products"),
        ("loop_gather_fusion_2", "other"),
        ("sort_38_1", "other"),
        ("MemcpyD2D", "other"),
    ],
)
def test_kernels_are_told_by_their_names(kernel, kind):
    assert kind_of(kernel) == kind


@dataclasses.dataclass
class Named:
    """Planes, lines and events of a profile, as far as they are read."""

    name: str
    lines: tuple["Named", ...] = ()
    events: tuple["Named", ...] = ()
    duration_ns: float = 0.0
    stats: tuple = ()


@dataclasses.dataclass
class Profile:
    planes: tuple[Named, ...]


def test_all_streams_of_the_first_gpu_count():
    def stream(number, *events):
        return Named(
            f"Stream #{number}(Compute)", events=tuple(Named(name, duration_ns=1e6 * ms) for name, ms in events)
        )

    lines = stream(1, ("moc_forward", 3), ("sort_1", 1), ("sort_1", 1)), stream(2, ("gemm_fusion", 5)), Named("Steps")
    other = Named("/device:GPU:1", lines=(stream(1, ("sort_1", 100)),))
    split = split_of(Profile((Named("/host:CPU"), Named("/device:GPU:0", lines=lines), other)))
    assert (split.attention, split.products, split.other, split.kernels) == (3, 5, 2, 4)
    assert split.longest == {"sort_1": 2}
    with pytest.raises(ValueError, match="no kernel"):
        split_of(Profile((Named("/host:CPU"),)))
