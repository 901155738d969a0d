"""The names of weights in files that hold a whole checkpoint: those of the programs that Stable Diffusion was first published with.

A network of diffusers has the same tensors under other names, but for a few that lie side by side in one, are in another order, or are
convolutions of one pixel. What `diffusers.loaders.single_file_utils` does when it reads such a file is undone here.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from immiscible.errors import UserError

Rules = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]  # a pattern of the whole name, and what takes its place

PIECE = re.compile(r"<(\d)>")  # in a new name: the place of this tensor among those that are put together under it
QKV = {letter: f"<{place}>" for place, letter in enumerate("qkv")}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
EMBEDDINGS = {"time_embedding": "time_embed", "add_embedding": "label_emb.0"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _linear(number: str) -> str:
    """Of two linear layers with an activation between them: the first is number 0, the second number 2."""
    return str(2 * int(number) - 2)


def unet_rules(names: Iterable[str], layers: int) -> Rules:
    """Of a `UNet2DConditionModel` of ``layers`` per block; a block's layers are counted through, with what changes the size at its end."""
    told = {int(found[1]) for name in names if (found := re.match(r"up_blocks\.(\d+)\.attentions", name))}

    def down(found: re.Match[str]) -> str:
        place = 1 + int(found[1]) * (layers + 1) + (layers if found[2] == "downsamplers" else int(found[3]))
        return f"input_blocks.{place}.{_in_block(found[2], found[4], '0')}".replace(".0.conv.", ".0.op.")

    def up(found: re.Match[str]) -> str:
        place = int(found[1]) * (layers + 1) + (layers if found[2] == "upsamplers" else int(found[3]))
        return f"output_blocks.{place}.{_in_block(found[2], found[4], '2' if int(found[1]) in told else '1')}"

    return (
        (r"conv_in\.(\w+)", r"input_blocks.0.0.\1"),
        (r"conv_norm_out\.(\w+)", r"out.0.\1"),
        (r"conv_out\.(\w+)", r"out.2.\1"),
        (r"(time_embedding|add_embedding)\.linear_([12])\.(\w+)", lambda found: f"{EMBEDDINGS[found[1]]}.{_linear(found[2])}.{found[3]}"),
        (r"down_blocks\.(\d+)\.(resnets|attentions|downsamplers)\.(\d+)\.(.+)", down),
        (r"mid_block\.attentions\.0\.(.+)", r"middle_block.1.\1"),
        (r"mid_block\.resnets\.([01])\.(.+)", lambda found: f"middle_block.{2 * int(found[1])}.{_resnet(found[2])}"),
        (r"up_blocks\.(\d+)\.(resnets|attentions|upsamplers)\.(\d+)\.(.+)", up),
    )


def _in_block(kind: str, rest: str, sized: str) -> str:
    """A layer's place beside others of one depth, and its name: a resnet, an attention, or number ``sized``, which changes the size."""
    if kind == "resnets":
        return f"0.{_resnet(rest)}"
    return f"1.{rest}" if kind == "attentions" else f"{sized}.{rest}"


def _resnet(rest: str) -> str:
    layer, _, kind = rest.rpartition(".")
    return f"{RESNET[layer]}.{kind}"


def vae_rules(blocks: int) -> Rules:
    """Of an `AutoencoderKL` of this many blocks; the decoder's are counted from the image."""

    def resnet(found: re.Match[str]) -> str:
        side, block = ("down", int(found[1])) if found[0].startswith("encoder") else ("up", blocks - 1 - int(found[1]))
        rest = found[3].replace("conv_shortcut", "nin_shortcut")
        return f"{found[0].partition('.')[0]}.{side}.{block}.block.{found[2]}.{rest}"

    return (
        (r"((?:post_)?quant_conv\.\w+)", r"\1"),
        (r"((?:encoder|decoder)\.conv_(?:in|out)\.\w+)", r"\1"),
        (r"(encoder|decoder)\.conv_norm_out\.(\w+)", r"\1.norm_out.\2"),
        (r"(encoder|decoder)\.mid_block\.resnets\.([01])\.(.+)", lambda found: f"{found[1]}.mid.block_{int(found[2]) + 1}.{found[3]}"),
        (
            r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)\.(\w+)",
            lambda found: f"{found[1]}.mid.attn_1.{VAE_ATTENTION[found[2]]}.{found[3]}",
        ),
        (r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.(.+)", resnet),
        (r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.(.+)", resnet),
        (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.conv\.(\w+)", r"encoder.down.\1.downsample.conv.\2"),
        (
            r"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.conv\.(\w+)",
            lambda found: f"decoder.up.{blocks - 1 - int(found[1])}.upsample.conv.{found[2]}",
        ),
    )


CLIP_RULES: Rules = (  # of a CLIP text model, whose names are those of transformers, some versions of which leave the first word out
    (r"(?:text_model\.)?((?:embeddings|encoder|final_layer_norm)\..+)", r"text_model.\1"),
    (r"(text_projection\.weight)", r"\1"),
)
OPEN_CLIP_RULES: Rules = (
    (r"(?:text_model\.)?embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"(?:text_model\.)?embeddings\.token_embedding\.weight", "token_embedding.weight"),
    (r"(?:text_model\.)?final_layer_norm\.(\w+)", r"ln_final.\1"),
    (r"text_projection\.weight", "text_projection"),
    (r"(?:text_model\.)?encoder\.layers\.(\d+)\.layer_norm([12])\.(\w+)", r"transformer.resblocks.\1.ln_\2.\3"),
    (r"(?:text_model\.)?encoder\.layers\.(\d+)\.mlp\.fc1\.(\w+)", r"transformer.resblocks.\1.mlp.c_fc.\2"),
    (r"(?:text_model\.)?encoder\.layers\.(\d+)\.mlp\.fc2\.(\w+)", r"transformer.resblocks.\1.mlp.c_proj.\2"),
    (r"(?:text_model\.)?encoder\.layers\.(\d+)\.self_attn\.out_proj\.(\w+)", r"transformer.resblocks.\1.attn.out_proj.\2"),
    (
        r"(?:text_model\.)?encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(\w+)",
        lambda found: f"transformer.resblocks.{found[1]}.attn.in_proj_{found[3]}{QKV[found[2]]}",
    ),
)
T5_RULES: Rules = ((r"((?:shared|encoder)\..+)", r"\1"),)

_BLOCK = r"transformer_blocks\.(\d+)\."
SD3_RULES: Rules = (
    (r"pos_embed\.pos_embed", "pos_embed"),
    (r"pos_embed\.proj\.(\w+)", r"x_embedder.proj.\1"),
    (r"(context_embedder\.\w+)", r"\1"),
    (r"time_text_embed\.timestep_embedder\.linear_([12])\.(\w+)", lambda found: f"t_embedder.mlp.{_linear(found[1])}.{found[2]}"),
    (r"time_text_embed\.text_embedder\.linear_([12])\.(\w+)", lambda found: f"y_embedder.mlp.{_linear(found[1])}.{found[2]}"),
    (r"norm_out\.linear\.(\w+)", r"final_layer.adaLN_modulation.1.\1"),
    (r"proj_out\.(\w+)", r"final_layer.linear.\1"),
    (_BLOCK + r"(attn2?)\.to_([qkv])\.(\w+)", lambda found: f"joint_blocks.{found[1]}.x_block.{found[2]}.qkv.{found[4]}{QKV[found[3]]}"),
    (_BLOCK + r"attn\.add_([qkv])_proj\.(\w+)", lambda found: f"joint_blocks.{found[1]}.context_block.attn.qkv.{found[3]}{QKV[found[2]]}"),
    (_BLOCK + r"(attn2?)\.norm_([qk])\.(\w+)", r"joint_blocks.\1.x_block.\2.ln_\3.\4"),
    (_BLOCK + r"attn\.norm_added_([qk])\.(\w+)", r"joint_blocks.\1.context_block.attn.ln_\2.\3"),
    (_BLOCK + r"(attn2?)\.to_out\.0\.(\w+)", r"joint_blocks.\1.x_block.\2.proj.\3"),
    (_BLOCK + r"attn\.to_add_out\.(\w+)", r"joint_blocks.\1.context_block.attn.proj.\2"),
    (_BLOCK + r"norm1\.linear\.(\w+)", r"joint_blocks.\1.x_block.adaLN_modulation.1.\2"),
    (_BLOCK + r"norm1_context\.linear\.(\w+)", r"joint_blocks.\1.context_block.adaLN_modulation.1.\2"),
    (_BLOCK + r"ff\.net\.0\.proj\.(\w+)", r"joint_blocks.\1.x_block.mlp.fc1.\2"),
    (_BLOCK + r"ff\.net\.2\.(\w+)", r"joint_blocks.\1.x_block.mlp.fc2.\2"),
    (_BLOCK + r"ff_context\.net\.0\.proj\.(\w+)", r"joint_blocks.\1.context_block.mlp.fc1.\2"),
    (_BLOCK + r"ff_context\.net\.2\.(\w+)", r"joint_blocks.\1.context_block.mlp.fc2.\2"),
)


def renamed(names: Iterable[str], rules: Rules) -> dict[str, str]:
    """The new name of each, by the first rule that knows it.

    Raises:
        UserError: no rule does, so that the original network has no such weights.
    """
    return {name: _renamed(name, rules) for name in names}


def _renamed(name: str, rules: Rules) -> str:
    for pattern, new in rules:
        if found := re.fullmatch(pattern, name):
            try:
                return new(found) if callable(new) else found.expand(new)
            except KeyError:
                break
    raise UserError(f"a layer {name}, for which that layout has no name")


def in_original_order(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors under their new names, as the original network has them.

    Args:
        state: of a network of diffusers or transformers, by its names.
        names: of `renamed`.
    """
    pieces: dict[str, dict[int, Tensor]] = defaultdict(dict)
    last = max((int(found[1]) for name in state if (found := re.match(_BLOCK, name))), default=-1)
    halves = ("norm_out.linear.", f"transformer_blocks.{last}.norm1_context.linear.")  # scale and shift are the other way round there
    for name, new in names.items():
        place, tensor = PIECE.search(new), state[name].detach()
        if last >= 0 and name.startswith(halves):
            tensor = torch.cat(tensor.chunk(2)[::-1])
        if re.fullmatch(r".*\.mid\.attn_1\.(q|k|v|proj_out)\.weight", new):
            tensor = tensor[:, :, None, None]
        if new == "text_projection":
            tensor = tensor.T
        pieces[PIECE.sub("", new)][int(place[1]) if place else 0] = tensor
    return {new: _joined([part for _, part in sorted(found.items())]) for new, found in pieces.items()}


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0].contiguous()
