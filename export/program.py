"""A network -> the program that computes it, the content of a bundle's network.json (docs/program.md).

Each function below goes through its network's modules as their `forward` does, and says what it meets. A register is named for the
module that fills it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from sr3rt.export.nets import compact, janspiry, paper
from sr3rt.program import FORMAT

Resample = Literal["up", "down"]
Program = dict[str, Any]
Module = Any  # torch declares whatever a module holds as Tensor | Module


def describe(net: nn.Module) -> Program:
    """The program of a network of `export/nets`. Registers x, y and the level go in, "out" is the prediction. Weights are not looked at."""
    match net:
        case janspiry.JanspiryUNet():
            return _janspiry(net)
        case paper.PaperUNet():
            return _paper(net)
        case compact.CompactUNet():
            return _compact(net)
        case _:
            raise TypeError(f"no program is known for {type(net).__name__}: expected JanspiryUNet, PaperUNet or CompactUNet")


def dumps(program: Program) -> str:
    """As JSON, an operation on each line."""
    *heads, (last, operations) = program.items()
    lines = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in heads]
    body = ",\n".join(f"  {json.dumps(operation)}" for operation in operations)
    return "{\n" + "\n".join(lines) + f"\n {json.dumps(last)}: [\n{body}\n ]\n}}\n"


class _Writer:
    """Collects operations; every method returns the register that its operation fills."""

    def __init__(self, net: nn.Module) -> None:
        self.operations: list[Program] = []
        self._names: dict[nn.Module, str] = {module: name for name, module in net.named_modules()}

    def name(self, module: nn.Module) -> str:
        """Its path in the network, which begins its tensors' names."""
        return self._names[module]

    def weights(self, module: nn.Module) -> Program:
        """Names of a module's tensors; its bias may be missing."""
        return {key: None if getattr(module, key) is None else f"{self.name(module)}.{key}" for key in ("weight", "bias")}

    def convolution(
        self,
        sources: Iterable[str],
        conv: Module,
        *,
        norm: Module = None,
        silu: bool = False,
        resample: Resample | None = None,
        level: tuple[Module, Literal["shift", "scale_shift"]] | None = None,
        after: Literal["silu"] | None = None,
        add: str | None = None,
        gain: float = 1.0,
        to: str | None = None,
    ) -> str:
        """norm, silu and resample come before it; level, after, add and gain after."""
        return self._write(
            "convolution",
            sources,
            to or self.name(conv),
            norm=norm and {"groups": norm.num_groups, "eps": norm.eps, **self.weights(norm)},
            silu=silu,
            resample=resample,
            **self.weights(conv),
            stride=conv.stride[0],
            level=level and {**self.weights(level[0]), "kind": level[1]},
            after=after,
            add=add,
            gain=gain,
        )

    def resample(self, source: str, by: Resample, to: str) -> str:
        return self._write("resample", [source], to, by=by)

    def attention(self, source: str, norm: Module, qkv: Module, out: Module, *, gain: float = 1.0) -> str:
        """Self-attention with a projection before and after, added to its source."""
        projected = self.convolution([source], qkv, norm=norm)
        mixed = self._write("attention", [projected], f"{projected}.attended")
        return self.convolution([mixed], out, add=source, gain=gain)

    def unshuffle(self, source: str, by: int, to: str) -> str:
        return self._write("unshuffle", [source], to, by=by)

    def bands(self, do: Literal["to_bands", "from_bands"], sources: Iterable[str], to: str) -> str:
        return self._write(do, sources, to, detail=compact.DETAIL)

    def _write(self, do: str, sources: Iterable[str], to: str, **rest: Any) -> str:
        self.operations.append({"do": do, "from": list(sources), "to": to, **rest})
        return to

    def program(
        self, source: Literal["level", "log_sigma"], frequencies: str, mlp: nn.Sequential, *, silu: bool, scale: float = 1.0
    ) -> Program:
        """The whole. mlp: the linear layers on the level's encoding, among other modules."""
        level = {
            "input": source,
            "scale": scale,
            "frequencies": frequencies,
            "layers": [self.weights(layer) for layer in mlp if isinstance(layer, nn.Linear)],
            "silu": silu,
        }
        return {"format": FORMAT, "level": level, "operations": self.operations}


def _janspiry(net: janspiry.JanspiryUNet) -> Program:
    write, ddpm = _Writer(net), net.config.variant == "ddpm"

    def residual(sources: list[str], block: Module) -> str:
        projection = block.mlp[1] if ddpm else block.noise_func.noise_func[0]
        norm, _, _, conv = block.block1.block
        h = write.convolution(sources, conv, norm=norm, silu=True, level=(projection, "shift"))
        norm, _, _, conv = block.block2.block
        return write.convolution([h], conv, norm=norm, silu=True, add=_skip(write, sources, block.res_conv))

    def stage(sources: list[str], module: Module) -> str:
        h, attn = residual(sources, module.res_block), module.attn
        return write.attention(h, attn.norm, attn.qkv, attn.out) if isinstance(attn, janspiry.SelfAttention) else h

    first, *downs = net.downs
    h = write.convolution(["x", "y"], first)
    skips = [h]
    for down in downs:
        h = stage([h], down) if isinstance(down, janspiry.Stage) else write.convolution([h], down.conv)
        skips.append(h)
    for middle in net.mid:
        h = stage([h], middle)
    for up in net.ups:
        h = stage([h, skips.pop()], up) if isinstance(up, janspiry.Stage) else write.convolution([h], up.conv, resample="up")
    norm, _, _, last = net.final_conv.block
    write.convolution([h], last, norm=norm, silu=True, to="out")
    mlp = net.time_mlp if ddpm else net.noise_level_mlp
    frequencies = f"{write.name(mlp[0])}.{'inv_freq' if ddpm else 'frequencies'}"
    return write.program("level", frequencies, mlp, silu=ddpm)  # ddpm has a SiLU in front of every projection


def _paper(net: paper.PaperUNet) -> Program:
    write = _Writer(net)

    def residual(sources: list[str], block: Module) -> str:
        resample: Resample | None = None if block.resample == 1 else "down" if block.resample < 1 else "up"
        h = write.convolution(sources, block.conv1, norm=block.norm1, silu=True, resample=resample, level=(block.level, "shift"))
        if resample:
            sources = [write.resample(sources[0], resample, f"{write.name(block)}.resampled")]
        return write.convolution(
            [h], block.conv2, norm=block.norm2, silu=True, add=_skip(write, sources, block.skip), gain=paper.HALF_POWER
        )

    def stage(sources: list[str], module: Module) -> str:
        if isinstance(module, paper.ResidualBlock):
            return residual(sources, module)
        h, attention = residual(sources, module.block), module.attention
        if not isinstance(attention, paper.SelfAttention):
            return h
        return write.attention(h, attention.norm, attention.qkv, attention.out, gain=paper.HALF_POWER)

    h = write.convolution(["x", "y"], net.first)
    skips = [h]
    for down in net.down:
        h = stage([h], down)
        skips.append(h)
    for middle in net.middle:
        h = stage([h], middle)
    for up in net.up:
        h = stage([h, skips.pop()] if isinstance(up, paper.Stage) else [h], up)
    write.convolution([h], net.last, norm=net.norm, silu=True, to="out")
    return write.program("level", f"{write.name(net.encoding)}.frequencies", net.embedding, silu=True, scale=paper.LEVEL_SCALE)


def _compact(net: compact.CompactUNet) -> Program:
    write = _Writer(net)

    def residual(sources: list[str], block: Module) -> str:
        h = write.convolution(sources, block.conv1, level=(block.level, "scale_shift"), after="silu")
        return write.convolution([h], block.conv2, add=_skip(write, sources, block.skip))

    def changed(h: str, block: Module, end: str) -> str:
        inner = write.convolution([h], block.conv1, after="silu", to=write.name(block.conv1) + end)
        return write.convolution([inner], block.conv2, add=h, to=write.name(block.conv2) + end)

    places = write.unshuffle("x", compact.SCALE, "mean.places")
    features = write.convolution([places], net.mean.first)
    negative = write.convolution([places], net.mean.first, gain=-1.0, to="mean.first.negative")
    for block in net.mean.blocks:
        features, negative = changed(features, block, ""), changed(negative, block, ".negative")
    less = write.convolution([negative], net.mean.last, gain=-1.0, to="mean.last.negative")
    mean = write.convolution([features], net.mean.last, add=less, gain=compact.MEAN / 2)

    h = write.convolution([write.bands("to_bands", ["x", "y", mean], "bands")], net.first)
    skips = []
    for i, blocks in enumerate(net.down):
        sources = [h, features] if i == 1 else [h]
        for block in blocks:  # type: ignore[attr-defined]
            h = residual(sources, block)
            sources = [h]
        if i < len(net.shrink):
            skips.append(h)
            h = write.convolution([h], net.shrink[i])
    for grow, blocks in zip(net.grow, net.up, strict=True):
        sources = [write.convolution([h], grow, resample="up"), skips.pop()]
        for block in blocks:  # type: ignore[attr-defined]
            h = residual(sources, block)
            sources = [h]
    h = write.convolution([h], net.last, silu=True)
    write.bands("from_bands", ["x", "y", mean, h], "out")
    return write.program("log_sigma", f"{write.name(net.embedding)}.frequencies", net.embedding.mlp, silu=True)


def _skip(write: _Writer, sources: list[str], skip: Module) -> str:
    """What a residual block adds to: its sources through a 1×1 convolution, or its only source itself."""
    return write.convolution(sources, skip) if isinstance(skip, nn.Conv2d) else sources[0]
