"""A diffusers `text_encoder` that is a T5, as a native CLIP: what Show-1 and DeepFloyd IF read.

Prompts are padded to 77 tokens; the padding is masked inside the encoder and read by the U-Net, as in training.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import comfy.sd
import comfy.text_encoders.t5
import comfy.utils
import folder_paths
import torch
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer, SDClipModel, SDTokenizer
from comfy.supported_models_base import ClipTarget
from transformers import T5TokenizerFast

from .comfy_ops import shapes
from .diffusers_folder import ModelFolder, ModelFolderError, read_weights

TOKENS = 77
GATED = {"gated-gelu": "gelu_pytorch_tanh"}
"""The feed-forward layers that T5 1.1 has, by transformers' name, as the host calls their activation."""


def load_t5(folder: ModelFolder, *, disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """The folder's text encoder as CLIP: a prompt to conditioning [1, L, C], L a multiple of 77.

    Raises ModelFolderError naming the file and the entry or key at fault.
    """
    config = _checked(folder)
    weights = read_weights(folder.weights_files("text_encoder"), shapes(empty(config)), _own_key)
    clip = comfy.sd.CLIP(
        ClipTarget(_tokenizer(config), _model(config)),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        parameters=comfy.utils.calculate_parameters(weights),
        state_dict=[weights],
        disable_dynamic=disable_dynamic,
    )
    clip.patcher.cached_patcher_init = (reload_t5, (str(folder.path),))
    return clip


def reload_t5(path: str, disable_dynamic: bool = False):
    """The patcher of a freshly loaded text encoder, for clones that may share no weights."""
    return load_t5(ModelFolder(path), disable_dynamic=disable_dynamic).patcher


class TextModel(SDClipModel):
    """A T5 encoder of any size; padding is masked."""

    def __init__(self, config: dict, device="cpu", dtype=None, model_options=None):
        super().__init__(
            device=device,
            dtype=dtype,
            layer="last",
            max_length=TOKENS,
            textmodel_json_config=dict(config),
            special_tokens={"end": 1, "pad": 0},
            model_class=comfy.text_encoders.t5.T5,
            enable_attention_masks=True,
            model_options=model_options or {},
        )


def _checked(folder: ModelFolder) -> dict:
    path, config = folder.file("text_encoder", "config.json"), folder.config("text_encoder")
    if config.get("feed_forward_proj") not in GATED:
        raise ModelFolderError(
            f"{path}: feed_forward_proj is {config.get('feed_forward_proj')!r}; expected {' or '.join(GATED)} (T5 1.1)"
        )
    return _completed(config)


def _completed(config: dict) -> dict:
    activation = GATED[config["feed_forward_proj"]]
    return config | {"dense_act_fn": activation, "is_gated_act": True, "model_type": "t5"}


def _model(config: dict) -> partial:
    return partial(SD1ClipModel, clip_name="t5", clip_model=partial(TextModel, config))


def _tokenizer(config: dict) -> partial:
    """The host's own T5 tokenizer: there is but one vocabulary of T5 1.1."""
    own = Path(comfy.text_encoders.t5.__file__).with_name("t5_tokenizer")
    tokenizer = partial(
        SDTokenizer,
        str(own),
        max_length=TOKENS,
        pad_with_end=False,
        has_start_token=False,
        embedding_size=config["d_model"],
        embedding_key="t5",
        tokenizer_class=T5TokenizerFast,
        tokenizer_args={"local_files_only": True},
    )
    return partial(SD1Tokenizer, clip_name="t5", tokenizer=tokenizer)


def empty(config: dict) -> torch.nn.Module:
    """The encoder of a `text_encoder/config.json` on the meta device."""
    return comfy.text_encoders.t5.T5(_completed(config), torch.float32, "meta", torch.nn)


def _own_key(key: str) -> str | None:
    """Some files hold the embedding a second time."""
    return None if key == "encoder.embed_tokens.weight" else key
