"""What the parameters of our U-ViT are called in other projects.

Names were read from https://github.com/jiachenlei/maskdm (commit 60d132b; its second network, which has two sequences
of tokens, was deleted after 40907a6) and https://github.com/baofff/U-ViT (commit ce55170).
"""

from typing import Literal

Layout = Literal["maskdm", "maskdm-dwt", "uvit"]
"""`maskdm-dwt` has approximation and details of a wavelet as two sequences of tokens."""

OUTPUT: dict[Layout, str] = {"maskdm": "encoder_to_output", "maskdm-dwt": "approx_to_output", "uvit": "decoder_pred"}
"""The output layer, which tells the layouts apart."""
PREFIX: dict[Layout, str] = {"maskdm": "encoder.", "maskdm-dwt": "encoder.", "uvit": ""}
_EMBEDDING: dict[Layout, str] = {"maskdm": "patch_embed", "maskdm-dwt": "approx_patch_embed", "uvit": "patch_embed"}
POSITIONS: dict[Layout, str] = {
    "maskdm": "encoder.encoder_pos_embed",
    "maskdm-dwt": "encoder.encoder_pos_embed",
    "uvit": "pos_embed",
}


def foreign_name(name: str, layout: Layout) -> str:
    """The key under which `layout` stores our parameter `name`."""
    module, _, kind = name.rpartition(".")
    match module:
        case "positions":
            return POSITIONS[layout]
        case "output":
            return f"{OUTPUT[layout]}.{kind}"
        case "detail_output":
            return f"detail_to_output.{kind}"
        case "embedding":
            return f"{PREFIX[layout]}{_EMBEDDING[layout]}.proj.{kind}"
        case "detail_embedding":
            return f"{PREFIX[layout]}detail_patch_embed.proj.{kind}"
    block, dot, part = module.rpartition("attention.")
    theirs = f"{block}attn.{'proj' if part == 'projection' else part}" if dot else module
    theirs = f"{theirs}_linear" if theirs.endswith(".skip") else theirs
    return f"{PREFIX[layout]}{theirs}.{kind}"
