"""AnimateDiff-Evolved itself, where ADE_PATH names its folder, with motion modules of a tenth of their width.

A copy with smaller widths in its source is what runs; nothing is written into the folder or the host's.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management as management
import folder_paths
import torch

PATH = os.environ.get("ADE_PATH", "")
WIDTHS = {"(320, 640, 1280, 1280)": "(32, 64, 128, 128)", "(320, 640, 1280)": "(32, 64, 128)"}
SD15 = dict(
    image_size=32,
    in_channels=4,
    out_channels=4,
    model_channels=32,
    num_res_blocks=[2] * 4,
    channel_mult=[1, 2, 4, 4],
    num_heads=8,
    use_spatial_transformer=True,
    context_dim=16,
    transformer_depth=[1] * 6 + [0] * 2,
    transformer_depth_output=[1] * 9 + [0] * 3,
    transformer_depth_middle=1,
    use_linear_in_transformer=False,
    adm_in_channels=None,
    legacy=False,
)


@cache
def _pack() -> SimpleNamespace:
    """The modules of the copy that we need."""
    folder = Path(tempfile.mkdtemp(prefix="spacetime-edit-ade-"))
    copy, models = folder / "ade", folder_paths.models_dir
    shutil.copytree(PATH, copy, ignore=shutil.ignore_patterns(".git"))
    source = copy / "animatediff" / "motion_module_ad.py"
    text = source.read_text(encoding="utf-8")
    for theirs, ours in WIDTHS.items():
        text = text.replace(theirs, ours)
    source.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("ade", copy / "__init__.py", submodule_search_locations=[str(copy)])
    module = sys.modules["ade"] = importlib.util.module_from_spec(spec)
    try:
        folder_paths.models_dir = str(folder / "models")
        spec.loader.exec_module(module)
    finally:
        folder_paths.models_dir = models
    names = ("motion_module_ad", "model_injection", "sampling")
    return SimpleNamespace(**{name: sys.modules[f"ade.animatediff.{name}"] for name in names})


def with_motion(model, weights_of):
    """A clone of an SD 1.5 ModelPatcher with a motion model; weights_of: makes a state dict for a module."""
    ade, shapes = _pack(), {}
    for side in ("down_blocks", "up_blocks"):
        for block, channels in enumerate((32, 64, 128, 128)):
            for attention in (0, 1):
                path = f"{side}.{block}.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks"
                shapes[f"{path}.{attention}.pos_encoder.pe"] = torch.randn(1, 32, channels)
    state, info = ade.motion_module_ad.normalize_ad_state_dict(shapes, "tiny.ckpt")
    motion = ade.motion_module_ad.AnimateDiffModel(mm_state_dict=state, mm_info=info)
    motion.load_state_dict(weights_of(motion))
    motion.to(management.unet_dtype())
    patcher = ade.model_injection.create_MotionModelPatcher(
        model=motion, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )
    patched = model.clone()
    ade.model_injection.ModelPatcherHelper(patched).set_all_properties(
        outer_sampler_wrapper=ade.sampling.outer_sample_wrapper,
        calc_cond_batch_wrapper=ade.sampling.sliding_calc_cond_batch,
        params=ade.model_injection.InjectionParams(),
        sample_settings=None,
        motion_models=ade.model_injection.MotionModelGroup(patcher),
    )
    return patched
