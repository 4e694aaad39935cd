"""A diffusers `text_encoder` and `tokenizer` as a native CLIP, encoding to what diffusers feeds its UNet.

The output is the last hidden state after the final layer norm. Of OpenCLIP-H these folders keep 23 layers, so
"last" is what ComfyUI calls the penultimate of 24.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import comfy.clip_model
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer, SDClipModel, SDTokenizer
from comfy.supported_models_base import ClipTarget
from transformers import CLIPTokenizer

from .diffusers_folder import MAX_TEXT_FILE, ModelFolder, ModelFolderError, read_json, read_weights

PREFIX = "text_model."
DEFAULT_TOKENS = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}


def load_clip(folder: ModelFolder, *, disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """The folder's text encoder as CLIP: a prompt to conditioning [1, L, C], L a multiple of its positions.

    Stored in the host's text encoder dtype, computed in fp32, as every CLIP of the host.
    Raises ModelFolderError naming the file and the entry or key at fault.
    """
    config = _checked(folder)
    weights = read_weights(folder.weights_files("text_encoder"), _expected_shapes(config), _own_key)
    special = special_tokens(folder, config["vocab_size"])
    clip = comfy.sd.CLIP(
        ClipTarget(_tokenizer(folder, config, special), _model(config, special)),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        parameters=comfy.utils.calculate_parameters(weights),
        state_dict=[weights],
        disable_dynamic=disable_dynamic,
    )
    clip.patcher.cached_patcher_init = (reload_clip, (str(folder.path),))
    return clip


def reload_clip(path: str, disable_dynamic: bool = False):
    """The patcher of a freshly loaded CLIP, for clones that may share no weights."""
    return load_clip(ModelFolder(path), disable_dynamic=disable_dynamic).patcher


def special_tokens(folder: ModelFolder, vocab_size: int) -> dict[str, int]:
    """Token ids "start", "end" and "pad" from the tokenizer's files.

    `special_tokens_map.json` comes before `tokenizer_config.json`: SD 2 text encoders pad with "!" (id 0),
    and their `text_encoder/config.json` names other ids. Raises ModelFolderError for a token that is not in
    the vocabulary and for an id that is not in the embedding.
    """
    path = folder.file("tokenizer", "vocab.json")
    vocab = read_json(path)
    if not all(type(index) is int and 0 <= index < vocab_size for index in vocab.values()):
        raise ModelFolderError(f"{path}: token ids must be whole numbers from 0 to {vocab_size - 1}")
    names = {key: _token_name(folder, key) for key in DEFAULT_TOKENS}
    for key, name in names.items():
        if name not in vocab:
            raise ModelFolderError(f"{path}: {key} {name!r} is not in the vocabulary")
    return {
        "start": vocab[names["bos_token"]],
        "end": vocab[names["eos_token"]],
        "pad": vocab[names["pad_token"]],
    }


class TextModel(SDClipModel):
    """CLIP text model of any size, without projection, from a transformers `CLIPTextConfig` as a dict."""

    def __init__(self, config: dict, special: dict[str, int], device="cpu", dtype=None, model_options=None):
        super().__init__(
            device=device,
            dtype=dtype,
            layer="last",
            max_length=config["max_position_embeddings"],
            textmodel_json_config=dict(config),
            special_tokens=special,
            return_projected_pooled=False,
            model_options=model_options or {},
        )
        size = (config["vocab_size"], config["hidden_size"])
        embedding = self.operations.Embedding(*size, dtype=dtype, device=device).requires_grad_(False)
        self.transformer.set_input_embeddings(embedding)
        self.transformer.text_projection = torch.nn.Identity()


def _checked(folder: ModelFolder) -> dict:
    path, config = folder.file("text_encoder", "config.json"), folder.config("text_encoder")
    if config["hidden_act"] not in tuple(comfy.clip_model.ACTIVATIONS):
        raise ModelFolderError(f"{path}: hidden_act {config['hidden_act']!r} is not known to the host")
    if config["hidden_size"] % config["num_attention_heads"]:
        raise ModelFolderError(f"{path}: hidden_size is not a multiple of num_attention_heads")
    if config.get("layer_norm_eps", 1e-5) != 1e-5:
        raise ModelFolderError(f"{path}: layer_norm_eps is {config['layer_norm_eps']}; the host computes with 1e-05")
    if not isinstance(config.get("eos_token_id"), int):
        config["eos_token_id"] = 2
    return config


def _model(config: dict, special: dict[str, int]) -> partial:
    return partial(SD1ClipModel, clip_name="h", clip_model=partial(TextModel, config, special))


def _tokenizer(folder: ModelFolder, config: dict, special: dict[str, int]) -> partial:
    merges = folder.file("tokenizer", "merges.txt")
    if merges.stat().st_size > MAX_TEXT_FILE:
        raise ModelFolderError(f"{merges} is larger than {MAX_TEXT_FILE >> 20} MiB")
    tokenizer = partial(
        SDTokenizer,
        str(folder.path / "tokenizer"),
        max_length=config["max_position_embeddings"],
        pad_with_end=special["pad"] == special["end"],
        pad_token=special["pad"],
        embedding_size=config["hidden_size"],
        embedding_key="clip_h",
        tokenizer_class=CLIPTokenizer,
        tokenizer_args={"local_files_only": True},
    )
    return partial(SD1Tokenizer, clip_name="h", tokenizer=tokenizer)


def _token_name(folder: ModelFolder, key: str) -> str:
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = Path(folder.path, "tokenizer", name)
        token = read_json(path).get(key) if path.is_file() else None
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    return DEFAULT_TOKENS[key]


def _expected_shapes(config: dict) -> dict[str, torch.Size]:
    model = comfy.clip_model.CLIPTextModel(config, torch.float32, "meta", torch.nn)
    shapes = {key: tensor.shape for key, tensor in model.text_model.state_dict(prefix=PREFIX).items()}
    embedding = PREFIX + "embeddings.token_embedding.weight"
    return {**shapes, embedding: torch.Size((config["vocab_size"], config["hidden_size"]))}


def _own_key(key: str) -> str | None:
    """Newer transformers write the keys without `text_model.`, older ones add `position_ids`."""
    if key.endswith("position_ids") or key.startswith("text_projection."):
        return None
    return key if key.startswith(PREFIX) else PREFIX + key
