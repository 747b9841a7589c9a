"""The names of tensors in public models: tables from our names (`vit.py`, `lm.py`, `mllm.py`) to theirs.

N is a block's index, and "N." at the start of a name stands for the path of the block, which is in the first row. "E."
stands for "embeddings.", * for both `weight` and `bias`. NAME[q], NAME[k] and NAME[v] are the thirds of a tensor NAME
in which query, key and value are concatenated along the first dimension. A table names the tensors of every variant of
a format; a model has some of them. In a file, all names may begin with a prefix, such as `vision_model.` or `model.`.

References
[1] CLIP, SigLIP, DINOv2: transformers, models/{clip,siglip,dinov2}/ and, for DINOv2, conversion_mapping.py.
[2] torchvision, models/vision_transformer.py. The MLP's layers were linear_1 and linear_2 in the files of 2022.
[3] Llama (also Mistral and Qwen) and Gemma: transformers, models/{llama,gemma3}/.
"""

import ast
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from common.files import field


def read_columns(table: str) -> dict[str, dict[str, str]]:
    """Returns {heading: {first word of a row: its word in that column}}; "-" is left out."""
    headings, *rows = (line.split() for line in table.strip().splitlines())
    return {name: {row[0]: row[i] for row in rows if row[i] != "-"} for i, name in enumerate(headings)}


VITS = read_columns("""
    ours            clip                        dinov2                          torchvision
    N.              encoder.layers.N.           encoder.layer.N.                encoder.layers.encoder_layer_N.
    patch.*         E.patch_embedding.*         E.patch_embeddings.projection.* conv_proj.*
    cls             E.class_embedding           E.cls_token                     class_token
    position        E.position_embedding.weight E.position_embeddings           encoder.pos_embedding
    pre_norm.*      pre_layrnorm.*              -                               -
    N.norm1.*       N.layer_norm1.*             N.norm1.*                       N.ln_1.*
    N.attn.q.*      N.self_attn.q_proj.*        N.attention.attention.query.*   N.self_attention.in_proj_*[q]
    N.attn.k.*      N.self_attn.k_proj.*        N.attention.attention.key.*     N.self_attention.in_proj_*[k]
    N.attn.v.*      N.self_attn.v_proj.*        N.attention.attention.value.*   N.self_attention.in_proj_*[v]
    N.attn.out.*    N.self_attn.out_proj.*      N.attention.output.dense.*      N.self_attention.out_proj.*
    N.scale1.gain   -                           N.layer_scale1.lambda1          -
    N.norm2.*       N.layer_norm2.*             N.norm2.*                       N.ln_2.*
    N.mlp.up.*      N.mlp.fc1.*                 N.mlp.fc1.*                     N.mlp.0.*
    N.mlp.down.*    N.mlp.fc2.*                 N.mlp.fc2.*                     N.mlp.3.*
    N.scale2.gain   -                           N.layer_scale2.lambda1          -
    post_norm.*     post_layernorm.*            layernorm.*                     encoder.ln.*
    head.probe      head.probe                  -                               -
    head.attn.q.*   head.attention.in_proj_*[q] -                               -
    head.attn.k.*   head.attention.in_proj_*[k] -                               -
    head.attn.v.*   head.attention.in_proj_*[v] -                               -
    head.attn.out.* head.attention.out_proj.*   -                               -
    head.norm.*     head.layernorm.*            -                               -
    head.mlp.up.*   head.mlp.fc1.*              -                               -
    head.mlp.down.* head.mlp.fc2.*              -                               -
""".replace("E.", "embeddings."))
VITS["siglip"] = VITS["clip"]
OLD_MLP = {"N.mlp.up.*": "N.mlp.linear_1.*", "N.mlp.down.*": "N.mlp.linear_2.*"}  # of torchvision in 2022
LANGUAGE_MODELS = read_columns("""
    ours                  llama                              gemma
    N.                    layers.N.                          layers.N.
    embed.weight          embed_tokens.weight                embed_tokens.weight
    N.norm1.weight        N.input_layernorm.weight           N.input_layernorm.weight
    N.attn.q.*            N.self_attn.q_proj.*               N.self_attn.q_proj.*
    N.attn.k.*            N.self_attn.k_proj.*               N.self_attn.k_proj.*
    N.attn.v.*            N.self_attn.v_proj.*               N.self_attn.v_proj.*
    N.attn.o.*            N.self_attn.o_proj.*               N.self_attn.o_proj.*
    N.attn.q_norm.weight  N.self_attn.q_norm.weight          N.self_attn.q_norm.weight
    N.attn.k_norm.weight  N.self_attn.k_norm.weight          N.self_attn.k_norm.weight
    N.norm1_out.weight    -                                  N.post_attention_layernorm.weight
    N.norm2.weight        N.post_attention_layernorm.weight  N.pre_feedforward_layernorm.weight
    N.gate.*              N.mlp.gate_proj.*                  N.mlp.gate_proj.*
    N.up.*                N.mlp.up_proj.*                    N.mlp.up_proj.*
    N.down.*              N.mlp.down_proj.*                  N.mlp.down_proj.*
    N.norm2_out.weight    -                                  N.post_feedforward_layernorm.weight
    norm.weight           norm.weight                        norm.weight
    head.weight           lm_head.weight                     lm_head.weight
""")
# Tensors that no model here has: text encoders, heads of classifiers, masks of pretraining, tables in old files.
IGNORED = r"text_model\..*|(text|visual)_projection\..*|logit_(scale|bias)|(heads|classifier)\..*|(.*\.)?mask_token"
IGNORED = re.compile(rf"{IGNORED}|.*embeddings\.position_ids|.*rotary_emb\.inv_freq")


def read_fields(config: dict[str, Any], table: dict, family: str, where: str | Path) -> dict[str, Any]:
    """Returns {our name: value} of a table of fields. Its columns are our name, that in config.json, and for each
    family the default, which has the type of the field, or the value if config.json has no such field.

    Raises an InputError that begins with `where`. The bounds are far from any model: beyond them, building it on the
    meta device would not end.
    """
    values = {}
    for ours, text in table[family].items():
        values[ours] = default = ast.literal_eval(text)
        if ours in table["config.json"]:
            least, most = (0, 1e12) if type(default) is float else (1, 1000 if ours == "depth" else 2**24)
            values[ours] = field(config, table["config.json"][ours], type(default), where, default, least, most)
    return values


def find_prefix(file: Iterable[str], name: str) -> str:
    """What comes before a name in a file. Published files and those of each version of transformers differ in it."""
    return next((found.removesuffix(name) for found in file if found.endswith(name)), "")


def tensor_names(module: nn.Module, column: dict[str, str], file: Iterable[str] = ()) -> dict[str, str]:
    """Returns {our tensor: theirs} for every tensor of the module that the column of a table has. The names in a file
    may have a prefix, that of the column's first weights."""
    first = next(theirs for theirs in column.values() if theirs != column.get("N."))
    names, prefix = {}, find_prefix(file, first.replace("*", "weight"))
    for ours in module.state_dict():
        block, kind = re.match(r"blocks\.(\d+)\.", ours), ours.rpartition(".")[2]
        general = f"N.{ours[block.end() :]}" if block else ours
        theirs = column.get(general) or column.get(re.sub("(weight|bias)$", "*", general), "")
        if theirs.startswith("N."):
            theirs = theirs.replace("N.", column["N."], 1).replace("N", block[1])
        if theirs:
            names[ours] = prefix + theirs.replace("*", kind)
    return names


def lm_tensor_names(lm: nn.Module, file: Iterable[str] = ("model.embed_tokens.weight",)) -> dict[str, str]:
    """The same of a `lm.CausalLM`, with the prefixes of a file; a tied head has the name of the embeddings."""
    column = LANGUAGE_MODELS["gemma" if lm.config.gemma else "llama"]
    names = tensor_names(lm, column, file)
    head = find_prefix(file, "lm_head.weight") + "lm_head.weight"
    return names | {"head.weight": names["embed.weight"] if lm.config.tied else head}
