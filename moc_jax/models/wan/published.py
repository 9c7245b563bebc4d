"""Which of the published models some tensors are, by their names, their shapes and the config.json beside them."""

import dataclasses
import re
from collections.abc import Mapping

from moc_jax.config import ConfigError, ModelConfig, WanConfig
from moc_jax.models.wan.names import COMFYUI, Names, Tensor, tensors
from moc_jax.showing import Shapes, contradictions, mismatches, shown

SIZES = "dim", "depth", "heads", "mlp_dim", "patch", "latent_channels", "condition_channels", "text_dim", "boundary"
"""Settings that belong to public weights; the others of a model are free."""

# Names that only other members of the family have, in either spelling, and what these are.
_OTHERS = {
    r"img_emb\.|image_embedder\.|\.k_img\.|add_k_proj": "Wan 2.1 I2V or FLF2V, which read an image by CLIP, and can't "
    "be loaded; Wan 2.2 I2V A14B and TI2V 5B animate images without",
    r"vace_": "Wan VACE",
    r"motion_encoder|face_adapter|face_encoder|pose_patch": "Wan 2.2 Animate",
    r"audio": "Wan 2.2 S2V",
    r"lora_|\.alpha$": "a LoRA, which belongs to a model",
    r"^decoder\.|^encoder\.|quant_conv": "an autoencoder or a text encoder",
}
_CLASSES = "WanTransformer3DModel", "WanModel"
_PIPELINES = "WanPipeline", "WanImageToVideoPipeline"
_INDEXED = {"transformer": _CLASSES[0], "transformer_2": _CLASSES[0], "vae": "AutoencoderKLWan"}
_TEXT_ROWS = 512  # where nothing says otherwise
_TYPES = "t2v", "i2v", "ti2v"
_TI2V = 48  # latent channels of TI2V 5B, and of no other
# What config.json may say of what is fixed here.
_FIXED = {
    "eps": (1e-6,),
    "freq_dim": (256,),
    "cross_attn_norm": (True,),
    "qk_norm": (True, "rms_norm_across_heads"),
    "window_size": ([-1, -1],),
    "rope_max_seq_len": (1024,),
    "image_dim": (None,),
    "added_kv_proj_dim": (None,),
    "pos_embed_seq_len": (None,),
}


@dataclasses.dataclass(frozen=True)
class Recognised:
    """What some tensors are."""

    config: WanConfig
    names: Names
    tensors: dict[str, Tensor]  # by the names that the file has
    problems: tuple[str, ...]  # what is wrong with names, shapes and config.json, all of it


def recognised(shapes: Shapes, settings: Mapping[str, object], where: str) -> Recognised:
    """The model that a network's tensors are of.

    Args:
        shapes: by the names that the file has.
        settings: of the config.json beside it; empty where there is none.
        where: begins messages.

    Raises:
        ConfigError: they are of something else.
    """
    _check_class(settings, where)
    for pattern, what in _OTHERS.items():
        if any(re.search(pattern, name) for name in shapes):
            raise ConfigError(f"{where} is {what}; supported are Wan 2.1 T2V and Wan 2.2 TI2V 5B, T2V and I2V A14B")
    names = _naming(shapes, where)
    blocks = [int(found[1]) for name in shapes if (found := re.search(r"(?:^|\.)blocks\.(\d+)\.", name))]
    depth = 1 + max(blocks, default=-1)
    config = _config(shapes, names, settings, depth, where)
    said = {**_sizes(config, "original"), **_sizes(config, "diffusers"), "num_layers": depth}
    wanted = {tensor.name(names): tensor for tensor in tensors(config)}
    of_shapes = {name: tensor.shape for name, tensor in wanted.items()}
    return Recognised(config, names, wanted, (*contradictions(settings, said), *mismatches(shapes, of_shapes)))


def check_index(index: Mapping[str, object], where: str) -> None:
    """Raises ConfigError where a pipeline's model_index.json, `where`, is of something else; it may say nothing."""
    kind = index.get("_class_name", _PIPELINES[0])
    if kind not in _PIPELINES:
        raise ConfigError(f"{where} is of a {shown(kind)}; supported are {' and '.join(_PIPELINES)}")
    for part, wanted in _INDEXED.items():
        entry = index.get(part)  # [library, class]
        kind = entry[-1] if isinstance(entry, list) and entry else entry
        if kind not in (None, wanted):
            raise ConfigError(f"{where} says that its {part} is a {shown(kind)}; supported is {wanted} alone")


def with_experts(cfg: WanConfig, boundary: object, where: str) -> WanConfig:
    """The same sizes with two experts; None for `boundary`: where Wan 2.2 A14B has it, which takes I2V by 0.9.

    Raises:
        ConfigError: it is not a noise level; `where` begins the message.
    """
    if boundary is None:
        boundary = 0.9 if cfg.condition_channels else 0.875
    if not isinstance(boundary, float) or not 0 < boundary < 1:
        raise ConfigError(f"{where} says boundary_ratio {shown(boundary)}; it must be a noise level between 0 and 1")
    return dataclasses.replace(cfg, boundary=boundary)


def public_tensors(cfg: ModelConfig) -> dict[str, list[Tensor]]:
    """What files with the weights of a model hold, by network.

    Raises:
        ConfigError: nobody else has models of its kind.
    """
    if not isinstance(cfg, WanConfig):
        raise ConfigError(f"model.name is {cfg.name}; public files hold weights of wan alone")
    return {part: list(tensors(cfg)) for part in (("high", "low") if cfg.boundary else ("network",))}


def _check_class(settings: Mapping[str, object], where: str) -> None:
    kind, task = settings.get("_class_name", _CLASSES[0]), settings.get("model_type", "t2v")
    if kind not in _CLASSES:
        raise ConfigError(f"{where}: its config.json says that it is a {shown(kind)}, not a {' or '.join(_CLASSES)}")
    if task not in _TYPES:
        raise ConfigError(f"{where}: its config.json says model_type {shown(task)}; supported are {', '.join(_TYPES)}")
    for name, allowed in _FIXED.items():
        if name in settings and settings[name] not in allowed:
            raise ConfigError(
                f"{where}: its config.json says {name} {shown(settings[name])}; supported is {shown(allowed[0])}"
            )


def _naming(shapes: Shapes, where: str) -> Names:
    ways: tuple[tuple[Names, str], ...] = (
        ("comfyui", f"{COMFYUI}head.head.weight"),
        ("original", "head.head.weight"),
        ("diffusers", "proj_out.weight"),
    )
    for names, telling in ways:
        if telling in shapes:
            return names
    few = ", ".join(sorted(shapes)[:3])
    raise ConfigError(
        f"{where} isn't a transformer of Wan: none of its {len(shapes)} tensors is its head (it has {few})"
    )


def _config(shapes: Shapes, names: Names, settings: Mapping[str, object], depth: int, where: str) -> WanConfig:
    """Sizes as the shapes say; how many heads there are they don't, nor whether blocks are missing after `depth`."""
    any_size = {tensor.names[0]: tensor.name(names) for tensor in tensors(WanConfig(depth=1))}

    def shape_of(name: str, rank: int) -> tuple[int, ...]:
        shape = shapes.get(any_size[name], ())
        if len(shape) != rank:
            raise ConfigError(f"{where}: {any_size[name]} has shape {shape}, which no such tensor of Wan has")
        return shape

    dim, read, *patch = shape_of("patch_embedding.weight", 5)
    written = shape_of("proj_out.weight", 2)[0] // (patch[0] * patch[1] * patch[2])
    rows = _count(settings, ("text_len",), where)
    heads = _count(settings, ("num_attention_heads", "num_heads"), where)
    if heads is None and dim % 128:
        raise ConfigError(f"{where}: no config.json says how many heads of a width of {dim} there are")
    try:
        return WanConfig(
            dim=dim,
            depth=max(depth, _count(settings, ("num_layers",), where) or 0),
            heads=dim // 128 if heads is None else heads,
            mlp_dim=shape_of("blocks.0.ffn.net.0.proj.weight", 2)[0],
            patch=(patch[0], patch[1], patch[2]),
            latent_channels=written,
            condition_channels=read - written,
            text_dim=shape_of("condition_embedder.text_embedder.linear_1.weight", 2)[1],
            text_rows=_TEXT_ROWS if rows is None else rows,
        )
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"{where} isn't a model of Wan: {error}") from error


def _count(settings: Mapping[str, object], names: tuple[str, ...], where: str) -> int | None:
    """A whole number, under one of these names."""
    for name in names:
        match settings.get(name):
            case bool():
                pass
            case int(value):
                return value
            case None:
                continue
        raise ConfigError(f"{where}: its config.json says {name} {shown(settings[name])}; it must be a whole number")
    return None


def public_settings(cfg: ModelConfig, names: Names) -> dict[str, object]:
    """The config.json of a network with these names; ConfigError as `public_tensors`."""
    assert isinstance(cfg, WanConfig)
    if names == "diffusers":
        fixed: dict[str, object] = {
            "_class_name": _CLASSES[0],
            "added_kv_proj_dim": None,
            "cross_attn_norm": True,
            "eps": 1e-6,
            "freq_dim": 256,
            "image_dim": None,
            "pos_embed_seq_len": None,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 1024,
        }
        # diffusers knows no such field and warns of it, so it is written only where it says something.
        rows = {} if cfg.text_rows == _TEXT_ROWS else {"text_len": cfg.text_rows}
        return fixed | _sizes(cfg, names) | rows
    return {
        "_class_name": _CLASSES[1],
        "eps": 1e-6,
        "freq_dim": 256,
        "model_type": "i2v" if cfg.condition_channels else "ti2v" if cfg.latent_channels == _TI2V else "t2v",
        "text_len": cfg.text_rows,
        **_sizes(cfg, names),
    }


def _sizes(cfg: WanConfig, names: Names) -> dict[str, object]:
    """What config.json says of tensors' shapes."""
    read = cfg.latent_channels + cfg.condition_channels
    if names == "diffusers":
        return {
            "attention_head_dim": cfg.head_dim,
            "ffn_dim": cfg.mlp_dim,
            "in_channels": read,
            "num_attention_heads": cfg.heads,
            "num_layers": cfg.depth,
            "out_channels": cfg.latent_channels,
            "patch_size": list(cfg.patch),
            "text_dim": cfg.text_dim,
        }
    return {
        "dim": cfg.dim,
        "ffn_dim": cfg.mlp_dim,
        "in_dim": read,
        "num_heads": cfg.heads,
        "num_layers": cfg.depth,
        "out_dim": cfg.latent_channels,
    }


def public_index(cfg: ModelConfig, names: Names) -> dict[str, object]:
    """The model_index.json of two experts with these names, for others than diffusers their boundary alone; of one
    network there is none."""
    if not isinstance(cfg, WanConfig) or not cfg.boundary:
        return {}
    if names != "diffusers":
        return {"boundary_ratio": cfg.boundary}
    networks = {part: ["diffusers", _INDEXED[part]] for part in ("transformer", "transformer_2")}
    return {"_class_name": _PIPELINES[bool(cfg.condition_channels)], "boundary_ratio": cfg.boundary, **networks}
