"""Small versions of common architectures, written out so that tests need no model library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_norm(into: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(into, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out))


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, into: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        same = stride == 1 and into == width
        self.downsample = None if same else conv_norm(into, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, into: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.conv1 = nn.Conv2d(into, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and into == out
        self.downsample = None if same else conv_norm(into, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """As torchvision's, stem of 7 x 7 and all."""

    def __init__(self, block: Any, depths: Sequence[int], width: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        into = width
        for stage, depth in enumerate(depths):
            blocks = []
            for i in range(depth):
                out = width * 2**stage
                blocks.append(block(into, out, 2 if stage and not i else 1))
                into = out * block.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(into, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18(width: int = 8) -> nn.Module:
    return ResNet(BasicBlock, (2, 2, 2, 2), width)


def resnet50(width: int = 8) -> nn.Module:
    return ResNet(Bottleneck, (3, 4, 6, 3), width)


class VGG(nn.Module):
    """VGG-16 with batch norm, and a classifier on the flattened map."""

    def __init__(self, width: int = 4, classes: int = 5) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        into = 3
        for step in (1, 1, "M", 2, 2, "M", 4, 4, 4, "M", 8, 8, 8, "M", 8, 8, 8):
            if isinstance(step, str):
                layers.append(nn.MaxPool2d(2, 2))
                continue
            out = width * step
            layers += [nn.Conv2d(into, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(True)]
            into = out
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Linear(into * 4, 16),
            nn.ReLU(True),
            nn.Dropout(),
            nn.Linear(16, 12),
            nn.ReLU(True),
            nn.Dropout(),
            nn.Linear(12, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, reduced, 1)
        self.expand = nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = F.silu(self.reduce(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.expand(scale))


class InvertedResidual(nn.Module):
    def __init__(self, into: int, out: int, stride: int, expand: int, excite: int = 0) -> None:
        super().__init__()
        hidden = into * expand
        layers: list[nn.Module] = []
        if expand != 1:
            layers += [conv_norm(into, hidden, 1), nn.ReLU6(inplace=True)]
        layers += [conv_norm(hidden, hidden, 3, stride, hidden), nn.ReLU6(inplace=True)]
        if excite:
            layers.append(SqueezeExcite(hidden, excite))
        layers.append(conv_norm(hidden, out, 1))
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and into == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNet(nn.Module):
    """In the manner of MobileNetV2, with squeeze-and-excitation where asked for."""

    def __init__(self, excite: int = 0, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_norm(3, 8, 3, 2), nn.ReLU6(inplace=True))
        self.blocks = nn.Sequential(
            InvertedResidual(8, 4, 1, 1, excite),
            InvertedResidual(4, 6, 2, 3, excite),
            InvertedResidual(6, 6, 1, 3, excite),
            InvertedResidual(6, 8, 2, 3, excite),
            InvertedResidual(8, 8, 1, 3, excite),
        )
        self.head = nn.Sequential(conv_norm(8, 20, 1), nn.ReLU6(inplace=True))
        self.fc = nn.Linear(20, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.blocks(self.stem(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class DenseLayer(nn.Module):
    def __init__(self, into: int, growth: int, bottleneck: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(into)
        self.conv1 = nn.Conv2d(into, bottleneck, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(bottleneck)
        self.conv2 = nn.Conv2d(bottleneck, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(F.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(F.relu(self.norm2(x)))


class DenseNet(nn.Module):
    """Two dense blocks with a transition between them."""

    def __init__(self, growth: int = 4, layers: int = 3, classes: int = 5) -> None:
        super().__init__()
        channels = 6
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.block1 = nn.ModuleList(
            DenseLayer(channels + i * growth, growth, 8) for i in range(layers)
        )
        channels += layers * growth
        self.norm1 = nn.BatchNorm2d(channels)
        self.transition = nn.Conv2d(channels, channels // 2, 1, bias=False)
        channels //= 2
        self.block2 = nn.ModuleList(
            DenseLayer(channels + i * growth, growth, 8) for i in range(layers)
        )
        channels += layers * growth
        self.norm2 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.block1:
            features.append(layer(features))
        x = self.transition(F.relu(self.norm1(torch.cat(features, 1))))
        features = [F.avg_pool2d(x, 2)]
        for layer in self.block2:
            features.append(layer(features))
        x = F.relu(self.norm2(torch.cat(features, 1)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class FusedAttention(nn.Module):
    """As timm's: one projection for queries, keys and values, unbound after a view."""

    def __init__(self, dim: int, heads: int, fused: bool = True) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = (q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1)
            x = scores.softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


class TorchAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class ViTBlock(nn.Module):
    def __init__(self, dim: int, attention: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 3 * dim), nn.GELU(), nn.Linear(3 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(
        self,
        attention: Callable[[int, int], nn.Module] = FusedAttention,
        depth: int = 2,
        dim: int = 12,
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 4, 4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, dim))
        self.blocks = nn.Sequential(*(ViTBlock(dim, attention(dim, 3)) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class GPTBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1 = nn.LayerNorm(dim)
        self.c_attn = nn.Linear(dim, 3 * dim)
        self.c_proj = nn.Linear(dim, dim)
        self.ln_2 = nn.LayerNorm(dim)
        self.c_fc = nn.Linear(dim, 4 * dim)
        self.mlp_proj = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (
            each.view(b, t, self.heads, c // self.heads).transpose(1, 2)
            for each in self.c_attn(self.ln_1(x)).split(c, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT(nn.Module):
    """In the manner of GPT-2: learned positions, and the embedding tied to the output."""

    def __init__(self, depth: int = 2, dim: int = 12, heads: int = 3, vocabulary: int = 11) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocabulary, dim)
        self.wpe = nn.Embedding(16, dim)
        self.h = nn.ModuleList(GPTBlock(dim, heads) for _ in range(depth))
        self.ln_f = nn.LayerNorm(dim)
        self.lm_head = nn.Linear(dim, vocabulary, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class LlamaBlock(nn.Module):
    def __init__(self, dim: int, heads: int, kv_heads: int, hidden: int, fused_mlp: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, dim // heads
        self.norm1 = nn.RMSNorm(dim)
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(dim, kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.norm2 = nn.RMSNorm(dim)
        if fused_mlp:
            self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        else:
            self.gate_proj = nn.Linear(dim, hidden, bias=False)
            self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def _gate(self, x: Tensor) -> Tensor:
        if hasattr(self, "gate_up"):
            gate, up = self.gate_up(x).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return F.silu(gate) * up

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, c = x.shape
        y = self.norm1(x)
        q = self.q_proj(y).view(b, t, self.heads, self.size).transpose(1, 2)
        k = self.k_proj(y).view(b, t, self.kv_heads, self.size).transpose(1, 2)
        v = self.v_proj(y).view(b, t, self.kv_heads, self.size).transpose(1, 2)
        q = q * cos + rotate_half(q) * sin
        k = k * cos + rotate_half(k) * sin
        repeat = self.heads // self.kv_heads
        k, v = (
            each[:, :, None].expand(-1, -1, repeat, -1, -1).reshape(b, self.heads, t, self.size)
            for each in (k, v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(y.transpose(1, 2).reshape(b, t, c))
        return x + self.down_proj(self._gate(self.norm2(x)))


class Llama(nn.Module):
    """Rotary positions, grouped-query attention, RMS norm, gated MLP; no bias, no tied embedding."""

    inv_freq: Tensor

    def __init__(
        self,
        depth: int = 2,
        dim: int = 16,
        heads: int = 4,
        kv_heads: int = 2,
        hidden: int = 20,
        fused_mlp: bool = False,
        persistent: bool = True,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, dim)
        size = dim // heads
        inv_freq = 1.0 / 100 ** (torch.arange(0, size, 2) / size)
        self.register_buffer("inv_freq", inv_freq, persistent=persistent)
        self.layers = nn.ModuleList(
            LlamaBlock(dim, heads, kv_heads, hidden, fused_mlp) for _ in range(depth)
        )
        self.norm = nn.RMSNorm(dim)
        self.lm_head = nn.Linear(dim, 11, bias=False)

    @torch.no_grad()
    def rotary(self, length: int) -> tuple[Tensor, Tensor]:
        angles = torch.outer(torch.arange(length).to(self.inv_freq), self.inv_freq)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        cos, sin = self.rotary(tokens.shape[1])
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.lm_head(self.norm(x))


class Recurrent(nn.Module):
    def __init__(self, cell: Any = nn.LSTM, last: bool = False, **options: Any) -> None:
        super().__init__()
        self.rnn = cell(4, 6, batch_first=True, **options)
        directions = 2 if options.get("bidirectional") else 1
        self.last = last
        self.fc = nn.Linear(options.get("proj_size", 0) or 6 * (1 if last else directions), 3)

    def forward(self, x: Tensor) -> Tensor:
        out, state = self.rnn(x)
        if self.last:
            return self.fc((state[0] if isinstance(state, tuple) else state)[-1])
        return self.fc(out[:, -1])


class RecurrentCell(nn.Module):
    """A cell unrolled by hand."""

    def __init__(self, cell: Any = nn.LSTMCell) -> None:
        super().__init__()
        self.cell = cell(4, 6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.fc(state[0] if isinstance(state, tuple) else state)


class DenseMoE(nn.Module):
    """Stacked experts, all run and mixed by a softmax router."""

    def __init__(self, dim: int = 6, hidden: int = 7, experts: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(4, dim)
        self.router = nn.Linear(dim, experts)
        self.up = nn.Parameter(torch.randn(experts, dim, hidden))
        self.up_bias = nn.Parameter(torch.randn(experts, hidden))
        self.down = nn.Parameter(torch.randn(experts, hidden, dim))
        self.head = nn.Linear(dim, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        gates = self.router(x).softmax(-1)
        hidden = torch.einsum("bd,edh->beh", x, self.up) + self.up_bias
        y = torch.einsum("beh,ehd->bed", hidden.relu(), self.down)
        return self.head(x + torch.einsum("be,bed->bd", gates, y))


class TopMoE(nn.Module):
    """Experts as modules; each token takes the best two."""

    def __init__(self, dim: int = 6, hidden: int = 7, experts: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(4, dim)
        self.router = nn.Linear(dim, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, dim))
            for _ in range(experts)
        )
        self.head = nn.Linear(dim, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        gates, picked = self.router(x).softmax(-1).topk(2, dim=-1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            weight = (gates * (picked == i)).sum(-1, keepdim=True)
            y = y + weight * expert(x)
        return self.head(x + y)


class TopStackedMoE(nn.Module):
    """Stacked experts, gathered by a router's best."""

    def __init__(self, dim: int = 6, hidden: int = 7, experts: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(4, dim)
        self.router = nn.Linear(dim, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, dim, hidden))
        self.down = nn.Parameter(torch.randn(experts, hidden, dim))
        self.head = nn.Linear(dim, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        gate, picked = self.router(x).softmax(-1).max(-1)
        hidden = torch.einsum("bd,bdh->bh", x, self.up[picked]).relu()
        y = torch.einsum("bh,bhd->bd", hidden, self.down[picked])
        return self.head(x + gate[:, None] * y)


class LoRALinear(nn.Module):
    def __init__(self, into: int, out: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(into, out)
        self.lora_A = nn.Parameter(torch.randn(rank, into))
        self.lora_B = nn.Parameter(torch.randn(out, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * (x @ self.lora_A.T @ self.lora_B.T)


class Shuffle(nn.Module):
    """A ShuffleNet unit: channels split in two, one half worked on, both interleaved."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.stem = conv_norm(3, channels, 3)
        half = channels // 2
        self.branch = nn.Sequential(conv_norm(half, half, 1), nn.ReLU(), conv_norm(half, half, 3))
        self.head = nn.Conv2d(channels, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).relu().chunk(2, dim=1)
        x = torch.cat((left, self.branch(right)), dim=1)
        b, c, h, w = x.shape
        return self.head(x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w))


class Apply(nn.Module):
    """Modules one after the other, and a function of them where that is not enough."""

    def __init__(self, function: Callable[..., Any] | None = None, **modules: Any) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *inputs: Tensor) -> Any:
        if self.function is not None:
            return self.function(self, *inputs)
        (x,) = inputs
        for module in self.children():
            x = module(x)
        return x
