"""A whole layer at V4-Flash's width, forward and backward, beside transformers'; training.py is the command."""

from collections.abc import Callable

import attention_blocks
import attention_kernels
import gpu
import torch
from parts import Row, Rows
from torch import Tensor, nn
from training_kernels import site_inputs
from training_setting import Setting, layer_config
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4DecoderLayer

from amalgam.kernels.hyper import Update
from amalgam.model.deepseek_v4 import FP32_ISLANDS, Block


@torch.no_grad()
def random_block(setting: Setting, config: DeepseekV4Config, kind: str) -> Block:
    """Products keep the size of what they multiply; in bf16 but for what V4 keeps in fp32."""
    with torch.device(setting.device):
        made = Block(config, kind, "moe")
    for name, p in made.named_parameters():
        if p.dim() >= 2:
            p.normal_(0.0, p.shape[-1] ** -0.5)
        if not any(part in f".{name}" for part in FP32_ISLANDS):
            p.data = p.data.bfloat16()
    return made


def eager_layer(setting: Setting, config: DeepseekV4Config, kind: str, ours: Block) -> DeepseekV4DecoderLayer:
    """transformers' layer with the same weights, all in bf16; its attention is eager, its experts `grouped_mm`."""
    config = DeepseekV4Config(**config.to_dict())
    config._attn_implementation, config._experts_implementation = "eager", "grouped_mm"
    assert config.layer_types is not None
    with torch.device(setting.device):
        made = DeepseekV4DecoderLayer(config, config.layer_types.index(kind))
    made.load_state_dict(ours.state_dict())
    for parameter in made.parameters():
        parameter.data = parameter.data.bfloat16()
    return made


def ours_run(setting: Setting, sizes: attention_kernels.Setting, block: Block, tokens: int) -> Callable[[], object]:
    """Forward and backward. The update of the layer before is applied in it, its own in the next one."""
    n = setting.flash.hc_mult
    leaves = [each.requires_grad_() for each in list(site_inputs(setting, tokens, n).values())[:4]]
    place, ids = sizes.document(tokens), torch.zeros(tokens, dtype=torch.int64, device=setting.device)

    def forward() -> list[Tensor]:
        streams, update, _, _ = block(leaves[0], Update(*leaves[1:]), ids, place, None, None)
        return [streams, *update]

    grads = [torch.randn_like(each) for each in leaves]  # results are of the leaves' shapes
    return lambda: torch.autograd.backward(forward(), grads)


def eager_run(
    setting: Setting, sizes: attention_kernels.Setting, layer: nn.Module, tokens: int
) -> Callable[[], object]:
    streams = setting.random(1, tokens, setting.flash.hc_mult, setting.flash.hidden_size)
    grad, given = torch.randn_like(streams), attention_blocks.eager_inputs(sizes, tokens)
    streams.requires_grad_()
    return lambda: layer(streams, **given).backward(grad)


def layer(setting: Setting) -> Rows:
    """Of each kind, with 32 experts: ours, and transformers' where it fits."""
    config = layer_config(setting.flash)
    sizes = attention_kernels.Setting(config, setting.ceilings, device=setting.device)
    for name, kind in attention_kernels.KINDS.items():
        block = random_block(setting, config, kind)
        for tokens in setting.layer:
            found = gpu.measured(ours_run(setting, sizes, block, tokens))
            if found is None:
                yield {"name": name, "tokens": tokens, "failed": "out of memory"}
                continue
            more: Row = {"extra_gib": found[1] / 2**30, "tokens_a_second": round(1000 * tokens / found[0])}
            if tokens in setting.eager:
                theirs = eager_layer(setting, config, kind, block)
                eager = gpu.measured(eager_run(setting, sizes, theirs, tokens))
                more |= attention_blocks.beside(found[0], tokens, eager)
            yield {"name": name, "tokens": tokens, "ms": found[0], **more}
