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
    start_ns: float = 0.0
    duration_ns: float = 0.0
    stats: tuple = ()


@dataclasses.dataclass
class Profile:
    planes: tuple[Named, ...]


def test_all_streams_of_the_first_gpu_count():
    def stream(number, *events):
        events = (Named(name, start_ns=1e6 * start, duration_ns=1e6 * ms) for name, start, ms in events)
        return Named(f"Stream #{number}(Compute)", events=tuple(events))

    lines = (
        stream(1, ("moc_forward", 10, 3), ("sort_1", 13, 1), ("sort_1", 20, 1)),
        stream(2, ("gemm_fusion", 30, 5)),
        stream(3, ("MemcpyD2D", 12, 4), ("loop_fusion", 33, 9)),  # beside others for 2 and 2 ms
        Named("Steps"),
    )
    other = Named("/device:GPU:1", lines=(stream(1, ("sort_1", 0, 100)),))
    split = split_of(Profile((Named("/host:CPU"), Named("/device:GPU:0", lines=lines), other)))
    assert (split.attention, split.products, split.other, split.kernels) == (3, 5, 11, 6)
    assert split.longest == {"loop_fusion": 9, "MemcpyD2D": 4, "sort_1": 2}
    with pytest.raises(ValueError, match="no kernel"):
        split_of(Profile((Named("/host:CPU"),)))
