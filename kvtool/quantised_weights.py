"""Checkpoints with quantised weights, read as the numbers that their codes stand for.

A quantised matrix W `[out, in]` lies on disk as several tensors: codes q, and what makes numbers of
them. In all formats here that is a scale s for each block of W, and sometimes a zero point z:

    W = s (q - z)

| On disk | q | s |
|---|---|---|
| fp8 of DeepSeek, Qwen, MiniMax, Ministral | e4m3 | by blocks of 128 x 128, or one |
| fbgemm_fp8; FP8 of ModelOpt | e4m3 | by row, or one |
| compressed-tensors | e4m3, int8, packed integers, fp4 | by row, block or group; or one |
| GPTQ, AWQ, AutoRound | packed integers, with z | by groups of inputs |
| NVFP4 (of ModelOpt, too) | e2m1 | e4m3 by 16 inputs, times one more for all |
| MXFP4 (gpt-oss) | e2m1 | 2^k by 32 inputs |

Nothing is rounded but to the dtype of the model. Scales of activations are passed over: they are
for engines that multiply codes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtool._tensors import DerivedTensor, OpenFiles, TensorInfo, first_line, torch_dtype
from kvtool.errors import CheckpointError, UnsupportedModelError
from kvtool.fp8 import SCALES, cache_scheme

if TYPE_CHECKING:
    from torch import Tensor

METHODS = (
    *("awq", "auto-round", "compressed-tensors", "fbgemm_fp8", "fp8", "gptq", "modelopt"),
    *("modelopt_fp4", "mxfp4"),
)
"""Values of `quant_method` whose codes are known here."""
_KEYS = ("quantization_config", "compression_config")
"""Where a config says it; the second is how the first compressed-tensors did."""
_FP8 = ("F8_E4M3", "F8_E5M2")
_INTEGERS = ("I8", "U8", "I16", "I32", "I64")
_SCALE = ("_scale", "_scale_inv")
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word of AWQ the eight codes of 4 bits lie that come one behind the other."""
_UNUSED = re.compile(
    r".+\.(?:activation_scale|(?:input|output)_(?:scale|zero_point|global_scale)"
    r"|(?:q|kv|prob|prob_output)_scale|self_attn\.q\.scale|weight_shape)"
)
"""Of activations, and what is known without."""
_CACHE_SCALE = re.compile(
    r"(.+\.self_attn\.)(?:(?:[kv]|qkv|qkqkv)_proj\.([kv])_scale|([kv])_cache\.scale)"
)
"""As ModelOpt and others name them."""

Parts = dict[str, "Tensor"]


def said_of_weights(config: dict[str, Any]) -> dict[str, Any]:
    """How `config.json` says that weights are quantised: by itself, or in the section of the text.
    Empty, if it does not.
    """
    said: dict[str, Any] = _stated(config) or _stated(config.get("text_config", {})) or {}
    return said


def with_said_of_weights(config: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    """The same `config.json` that says this instead, or for the first time."""
    inside = config.get("text_config", {})
    if _stated(inside) and not _stated(config):
        return {**config, "text_config": with_said_of_weights(inside, said)}
    key = next((key for key in _KEYS if config.get(key)), _KEYS[0])
    return {**config, key: said}


def _stated(config: dict[str, Any]) -> Any:
    return next((config[key] for key in _KEYS if config.get(key)), None)


def as_numbers(
    path: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]
) -> tuple[dict[str, Any], dict[str, TensorInfo], str | None]:
    """A checkpoint as it would be without quantised weights.

    Args:
        path: Where it is, for messages.
        config: The content of `config.json`.
        tensors: What its headers list.

    Returns:
        The config and the tensors, and how weights are quantised; None if they are not.

    Raises:
        UnsupportedModelError: Weights are quantised in another way than is known here.
        CheckpointError: A part of a quantised matrix is missing or has the wrong shape.
    """
    said = _stated(config) or {}
    if not isinstance(said, dict):
        raise CheckpointError(f"{path / 'config.json'}: quantization_config is not an object.")
    if cache_scheme(config) is not None:
        return config, tensors, None
    try:
        reason = _unknown(said) if said else None
        found = {} if reason else _Reader(path, config, said, tensors).read()
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path / 'config.json'}: quantization_config is not as its quant_method has it: "
            f"{first_line(error)}."
        ) from error
    if reason:
        raise UnsupportedModelError(
            f"{path} holds quantised weights that kvtool cannot read: {reason}.",
            hint="Use the checkpoint it was quantised from, or its GGUF file.",
        )
    plain = {key: value for key, value in config.items() if key not in _KEYS}
    if isinstance(said.get("kv_cache_scheme"), dict) and any(x.endswith(SCALES) for x in found):
        plain["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "kv_cache_scheme": said["kv_cache_scheme"],
        }
    is_quantised = any(isinstance(info, DerivedTensor) for info in found.values())
    method = str(said.get("quant_method", "scales beside the weights"))
    return plain if said else config, found, method if is_quantised else None


def _unknown(said: Mapping[str, Any]) -> str | None:
    """Why a `quantization_config` is not one of those that are known here."""
    method = said.get("quant_method")
    if method not in METHODS:
        return f"method {method}; known are {', '.join(METHODS)}"
    transforms, sparsity = said.get("transform_config"), said.get("sparsity_config")
    if transforms and transforms.get("config_groups"):
        return "they are behind transforms (transform_config)"
    if sparsity and sparsity.get("format") not in (None, "dense"):
        return f"they are sparse ({sparsity.get('format')})"
    layouts = {
        "awq": ("version", "gemm"),
        "gptq": ("checkpoint_format", "gptq", "gptq_v2"),
        "auto-round": ("packing_format", "auto_round:auto_gptq", "auto_round:auto_awq"),
    }
    if method in layouts:
        key, *known = layouts[method]
        layout = _layout(said, key) or known[0]
        if layout not in known or said.get("backend", "autoawq") == "llm-awq":
            return f"{method} with {key} {layout}; known: {', '.join(known)}"
    return None


def _layout(said: Mapping[str, Any], key: str) -> str:
    """How codes lie; newer packers say it as `format`, too."""
    return str(said.get(key) or said.get("format") or "").lower()


class _Reader:
    """Finds the parts of every quantised matrix."""

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        said: Mapping[str, Any],
        tensors: Mapping[str, TensorInfo],
    ) -> None:
        self.path, self.said, self.tensors = path, said, tensors
        dtype = config.get("dtype") or config.get("torch_dtype")
        self.dtype = {"float16": "F16", "float32": "F32"}.get(str(dtype), "BF16")
        self.used: set[str] = set()

    def read(self) -> dict[str, TensorInfo]:
        """All matrices, and what else there is that is not a part of one."""
        found = (self._quantised(name, info) for name, info in self.tensors.items())
        matrices = dict(one for one in found if one is not None)
        rest = {
            _CACHE_SCALE.sub(r"\1\2\3_scale", name): info
            for name, info in self.tensors.items()
            if name not in self.used and _UNUSED.fullmatch(name) is None
        }
        for name, info in rest.items():
            if name.endswith(("weight", "_proj")) and info.dtype in _INTEGERS:
                raise CheckpointError(
                    f"{self.path}: {info.name} is {info.dtype} without what makes numbers of it."
                )
        return {**self._without_idle(rest), **matrices}

    def _without_idle(self, rest: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
        """Without the zeros that packers of GPTQ write as biases of matrices that have none."""
        stems = [name.removesuffix(".qweight") for name in self.used if name.endswith(".qweight")]
        biases = [name for stem in stems if (name := f"{stem}.bias") in rest]
        files = OpenFiles()
        idle = {name for name in biases if not bool(files.read(rest[name]).any())}
        return {name: info for name, info in rest.items() if name not in idle}

    def _quantised(self, name: str, info: TensorInfo) -> tuple[str, DerivedTensor] | None:
        """Name and description of the matrix whose codes this is, if it is one's."""
        stem, _, last = name.rpartition(".")
        if last == "weight_packed" and info.dtype == "I32":
            return f"{stem}.weight", self._packed_integers(stem, info)
        if last == "weight_packed":
            return f"{stem}.weight", self._fp4(stem, info, "weight_packed")
        if last == "qweight":
            return f"{stem}.weight", self._by_input(stem, info)
        if last.endswith("_blocks") and info.dtype == "U8":
            return name.removesuffix("_blocks"), self._mxfp4(name.removesuffix("_blocks"), info)
        if info.dtype == "U8" and f"{name}_scale_2" in self.tensors:
            return name, self._fp4(stem, info, last)
        has_scale = last == "weight" or any(f"{name}{x}" in self.tensors for x in _SCALE)
        if info.dtype in (*_FP8, "I8") and has_scale:
            return name, self._scaled(name, info)
        return None

    def _tensor(
        self,
        shape: tuple[int, ...],
        numbers: Callable[[Parts], Tensor],
        **names: str | None,
    ) -> DerivedTensor:
        """Made of parts that all exist; `numbers` makes one matrix of its own parts."""
        parts = {role: self.tensors[name] for role, name in names.items() if name is not None}
        self.used.update(name for name in names.values() if name is not None)
        codes = parts["codes"]

        def rounded(read: Parts) -> Tensor:
            import torch

            dtype = torch_dtype(self.dtype)
            if len(shape) == 2:
                return numbers(read).to(dtype).contiguous()
            # Experts one by one: in between, numbers take many times the memory of their codes.
            found = torch.empty(shape, dtype=dtype)
            for i in range(len(found)):
                own = {k: x[i] if x.dim() > 2 and len(x) > 1 else x for k, x in read.items()}
                found[i] = numbers(own)
            return found

        return DerivedTensor(codes.name, shape, self.dtype, codes.file, parts, rounded)

    def _need(self, *names: str) -> str:
        """The first of some names that is a tensor's."""
        for name in names:
            if name in self.tensors:
                return name
        raise CheckpointError(f"{self.path} has quantised weights without their {names[0]}.")

    def _if_there(self, name: str) -> str | None:
        return name if name in self.tensors else None

    def _scaled(self, name: str, info: TensorInfo) -> DerivedTensor:
        """Codes of 8 bits, as many as there are numbers."""
        scale = self._need(*(f"{name}{x}" for x in _SCALE))
        zero, order = self._if_there(f"{name}_zero_point"), self._if_there(f"{name}_g_idx")
        own, said = self.tensors[scale].shape, self._block_said()
        if len(own) == 4 and own[1::2] == (1, 1):  # by blocks of 128, of ModelOpt
            own, said = own[::2], (128, 128)
        block = self._block(name, info.shape, own, said)

        def numbers(read: Parts) -> Tensor:
            spread = _spreader(info.shape, block, read.get("order"))
            codes = read["codes"].float()
            if "zero" in read:
                codes = codes - spread(read["zero"].float())
            return codes * spread(_scales(read["scale"]).view(own[-2:]))

        return self._tensor(info.shape, numbers, codes=name, scale=scale, zero=zero, order=order)

    def _packed_integers(self, stem: str, info: TensorInfo) -> DerivedTensor:
        """Of compressed-tensors: `weight_packed [out, in / n]`, n codes to a word, + 2^(b-1)."""
        bits = self._known(self._bits_said(stem, info))
        name = f"{stem}.weight"
        rows, words = self._matrix(info)
        shape, middle = (rows, words * (32 // bits)), 2 ** (bits - 1)
        scale = self._need(f"{name}_scale")
        zero, order = self._if_there(f"{name}_zero_point"), self._if_there(f"{name}_g_idx")
        own = self.tensors[scale].shape
        block = self._block(name, shape, own, None)
        is_packed = zero is not None and self.tensors[zero].dtype == "I32"
        if zero is not None and is_packed:
            self._fits(zero, -(-rows // (32 // bits)), own[-1])
        elif zero is not None:
            self._fits(zero, *own)

        def numbers(read: Parts) -> Tensor:
            spread = _spreader(shape, block, read.get("order"))
            codes = unpack(read["codes"], bits).float() - middle
            if is_packed:  # along the rows, with the same 2^(b-1) on top
                codes = codes - spread(unpack(read["zero"].T, bits).T[:rows].float() - middle)
            elif "zero" in read:
                codes = codes - spread(read["zero"].float())
            numbers: Tensor = codes * spread(_scales(read["scale"]))
            return numbers

        return self._tensor(
            shape, numbers, codes=f"{name}_packed", scale=scale, zero=zero, order=order
        )

    def _by_input(self, stem: str, info: TensorInfo) -> DerivedTensor:
        """Of GPTQ and AWQ, transposed: `scales [groups, out]`, and z as codes of the same kind."""
        awq = self._is_awq()
        rows, columns = self._matrix(info)
        scale, zero = self._need(f"{stem}.scales"), self._need(f"{stem}.qzeros")
        groups, outputs = self._matrix(self.tensors[scale])
        # Some matrices have more bits than the config says of all.
        words = columns if awq else self._matrix(self.tensors[zero])[1]
        bits = self._known(32 * words / max(outputs, 1), *((4,) if awq else ()))
        per_word = 32 // bits
        inputs, outputs = (rows, columns * per_word) if awq else (rows * per_word, columns)
        self._fits(scale, groups, outputs)
        self._fits(zero, groups, outputs // per_word)
        order = self._if_there(f"{stem}.g_idx")
        self._block(f"{stem}.qweight", (outputs, inputs), (outputs, groups), None)
        places = _AWQ_ORDER if awq else None
        # The first GPTQ stored z - 1.
        less = 0 if awq or _layout(self.said, "checkpoint_format") == "gptq_v2" else 1

        def numbers(read: Parts) -> Tensor:
            codes = unpack(read["codes"], bits, places, dim=-1 if awq else 0)  # [in, out]
            zero = unpack(read["zero"], bits, places).float() + less  # [groups, out]
            scale = read["scale"].float()
            if "order" in read and int(read["order"].min()) >= 0:  # one for each input
                zero, scale = zero[read["order"].long()], scale[read["order"].long()]
            values: Tensor = codes.unflatten(0, (len(scale), -1)).float()
            return values.sub_(zero[:, None]).mul_(scale[:, None]).flatten(0, 1).T

        return self._tensor(
            (outputs, inputs), numbers, codes=f"{stem}.qweight", scale=scale, zero=zero, order=order
        )

    def _fp4(self, stem: str, info: TensorInfo, last: str) -> DerivedTensor:
        """NVFP4 and MXFP4 of compressed-tensors and ModelOpt: two codes to a byte."""
        name = f"{stem}.{last.removesuffix('_packed')}"
        shape = (*info.shape[:-1], 2 * info.shape[-1])
        scale = self._need(f"{name}_scale")
        divisor, factor = self._if_there(f"{name}_global_scale"), f"{name}_scale_2"
        block = self._block(name, shape, self.tensors[scale].shape, None)

        def numbers(read: Parts) -> Tensor:
            scales = _scales(read["scale"])
            if "divisor" in read:
                scales = scales / read["divisor"].float()
            if "factor" in read:
                scales = scales * read["factor"].float()
            return fp4(read["codes"]) * _spreader(shape, block)(scales)

        return self._tensor(
            shape,
            numbers,
            codes=f"{stem}.{last}",
            scale=scale,
            divisor=divisor,
            factor=self._if_there(factor),
        )

    def _mxfp4(self, name: str, info: TensorInfo) -> DerivedTensor:
        """Experts of gpt-oss: codes `[E, out, in / 32, 16]` of what the module has transposed."""
        if len(info.shape) != 4 or info.shape[3] != 16:
            raise CheckpointError(
                f"{self.path}: {info.name} is {list(info.shape)}, not blocks of 16 bytes."
            )
        experts, rows, blocks, _ = info.shape
        scale = self._fits(self._need(f"{name}_scales"), experts, rows, blocks)

        def numbers(read: Parts) -> Tensor:
            values = fp4(read["codes"]) * _scales(read["scale"])[..., None]
            return values.flatten(1).T

        shape = (experts, 32 * blocks, rows)
        return self._tensor(shape, numbers, codes=f"{name}_blocks", scale=scale)

    def _bits_said(self, stem: str, info: TensorInfo) -> Any:
        """What compressed-tensors says of a matrix: by its name, or else by its class."""
        # The part of a model of several modalities has another name on disk.
        names = (stem, info.name.rpartition(".")[0])
        named: list[tuple[bool, Any]] = []
        for group in (self.said.get("config_groups") or {}).values():
            for target in group.get("targets", ()):
                pattern = target.removeprefix("re:")
                is_name = (
                    any(re.match(pattern, name) for name in names)
                    if pattern != target
                    else target in names
                )
                if is_name or target[:1].isupper():  # a class, such as Linear
                    named.append((is_name, (group.get("weights") or {}).get("num_bits")))
        return max(named, key=lambda one: one[0])[1] if named else None

    def _known(self, bits: Any, *known: int) -> int:
        known = known or (2, 4, 8)
        if bits not in known:
            raise UnsupportedModelError(
                f"{self.path} packs weights of {bits:g} bits, which kvtool cannot read."
                if isinstance(bits, int | float)
                else f"{self.path} does not say with how many bits its weights are packed.",
                hint=f"Known: {', '.join(map(str, known))} bits.",
            )
        return int(bits)

    def _matrix(self, info: TensorInfo) -> tuple[int, int]:
        """Rows and columns of what is to have no more, in words where it is packed."""
        if len(info.shape) != 2 or (info.name.endswith("qweight") and info.dtype != "I32"):
            raise UnsupportedModelError(
                f"{self.path}: {info.name} is {info.dtype} {list(info.shape)}, not a matrix of "
                "words of 32 bits, which kvtool cannot read."
            )
        return info.shape[0], info.shape[1]

    def _is_awq(self) -> bool:
        """By the method, or by what AutoRound names, such as `auto_round:auto_awq`."""
        method, packing = (self.said.get(key, "") for key in ("quant_method", "packing_format"))
        return method == "awq" or str(packing).endswith("awq")

    def _block_said(self) -> tuple[int, int] | None:
        groups = self.said.get("config_groups") or {}
        weights = [group.get("weights") or {} for group in groups.values()]
        every = [self.said.get("weight_block_size"), *(w.get("block_structure") for w in weights)]
        for said in filter(None, every):  # `128x128` is how it was said once
            rows, columns = said.split("x") if isinstance(said, str) else said
            return int(rows), int(columns)
        return None

    def _block(
        self,
        name: str,
        shape: tuple[int, ...],
        scales: tuple[int, ...],
        said: tuple[int, int] | None,
    ) -> tuple[int, int]:
        """How many rows and columns share one of the scales."""
        filled = (*scales, 1, 1)[:2] if len(scales) < 2 else scales
        one = all(size == 1 for size in scales)
        if len(shape) > 1 and (one or (len(filled), *filled[:-2]) == (len(shape), *shape[:-2])):
            (rows, columns), (across, along) = shape[-2:], filled[-2:]
            if said and (across, along) == (-(-rows // said[0]), -(-columns // said[1])):
                return said
            if across in (1, rows) and along and columns % along == 0:
                return rows // across, columns // along
        raise CheckpointError(
            f"{self.path}: {name} is {list(shape)} and has scales {list(scales)}, which do not fit."
        )

    def _fits(self, name: str, *shape: int) -> str:
        """The name itself, of a part that has the shape which the others ask for."""
        if self.tensors[name].shape != shape:
            found, wanted = list(self.tensors[name].shape), list(shape)
            raise CheckpointError(f"{self.path}: {name} is {found} instead of {wanted}.")
        return name


def _spreader(
    shape: tuple[int, ...], block: tuple[int, int], order: Tensor | None = None
) -> Callable[[Tensor], Tensor]:
    """From one value per block to `[..., out, in]`, or what broadcasts to it.

    Args:
        order: `[in]`, the group that each input is in, if they do not lie in their order.
    """
    rows, columns = shape[-2:]

    def spread(x: Tensor) -> Tensor:
        if x.numel() == 1:
            return x.reshape(())
        x = x.view(-1, 1) if x.dim() == 1 else x
        if x.shape[-2] not in (1, rows):
            x = x.repeat_interleave(block[0], dim=-2)[..., :rows, :]
        if order is not None and int(order.min()) >= 0:
            return x[..., order.long()]
        if x.shape[-1] not in (1, columns):
            x = x.repeat_interleave(block[1], dim=-1)[..., :columns]
        return x

    return spread


def _scales(x: Tensor) -> Tensor:
    """As float32; bytes are exponents of two (e8m0)."""
    import torch

    return (x.float() - 127).exp2() if x.dtype == torch.uint8 else x.float()


def unpack(words: Tensor, bits: int, places: Sequence[int] | None = None, dim: int = -1) -> Tensor:
    """int32 `[..., n]` to its codes, uint8 `[..., n * (32 // bits)]`.

    Args:
        places: Where in a word the codes lie that come one behind the other; from the lowest bits
            on if not given.
        dim: Along which they do; the last, or the first of a matrix.
    """
    import torch

    per_word, axis = 32 // bits, dim % words.dim()
    shape = (*words.shape[: axis + 1], per_word, *words.shape[axis + 1 :])
    codes = torch.empty(shape, dtype=torch.uint8, device=words.device)
    for i, place in enumerate(places or range(per_word)):
        codes.select(axis + 1, i).copy_((words >> (bits * place)) & (2**bits - 1))
    return codes.flatten(axis, axis + 1)


def fp4(codes: Tensor) -> Tensor:
    """Bytes `[..., n]` of two e2m1 each, the lower half first, to float32 `[..., 2 n]`."""
    import torch
    import torch.nn.functional as F

    table = torch.tensor([*_FP4, *(-x for x in _FP4)], device=codes.device)
    pairs = torch.stack((table.repeat(16), table.repeat_interleave(16)), dim=-1)  # of all bytes
    return F.embedding(codes.int(), pairs).flatten(-2)
