"""From frozen and trained weights to the weights of a graph: fold, smooth, quantize.

    LoRA dW                      -> columns of the key and value projection
    ck, cv and S of the prefix   -> constant key and value rows
    adapter scales s1, s2        -> adapter up projection
    rows of new words            -> token embedding

A tower's weights are a mapping of names, those of its float32 graph, to arrays float32. A Linear's
weight is [in, out].

Every number is the same on every processor. Sums are of float64, in a fixed order, one addition at
a time, and rounded once to float32; a library's matrix product would add up in an order of its own.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_machine.int8 import largest_pair
from upperson_rt.errors import InputError

Weights: TypeAlias = Mapping[str, NDArray[np.float32]]

LEVELS = 127
"""Positive steps of symmetric int8."""

TRAINED = re.compile(
    r"(blocks\.\d+)\.(prefix|lora|adapter_attn|adapter_mlp)\.(.+)|(token_embedding)\.(ids|rows)"
)
"""Names of trained tensors: block, part, and the name in it; or those of the token embedding."""


def fold_trained(
    frozen: Weights, trained: Mapping[str, NDArray[Any]], heads: int
) -> dict[str, NDArray[np.float32]]:
    """Fold trained tensors into a tower.

    Args:
        frozen: Weights of the tower without trained parts.
        trained: Tensors by their names in the run, such as ``blocks.0.lora.key.up``; rows [T, D]
            of tokens ``token_embedding.ids`` [T] are added to those of the base.
        heads: Attention heads.

    Returns:
        The weights that change or come new; all others are those of ``frozen``.

    Raises:
        InputError: A trained tensor is missing or unknown, or does not fit the tower.
    """
    parts: dict[tuple[str, str], dict[str, NDArray[Any]]] = {}
    for name, value in trained.items():
        match = TRAINED.fullmatch(name)
        if match is None:
            raise _unfit(name, "it is not a trained tensor")
        block, part, inner = (
            (match[1], match[2], match[3]) if match[1] else ("", match[4], match[5])
        )
        exact = value if value.dtype.kind == "i" else value.astype(np.float64)
        parts.setdefault((block, part), {})[inner] = exact
    folded: dict[str, NDArray[Any]] = {}
    for (block, part), tensors in parts.items():
        folded.update(_fold_part(block, part, tensors, frozen, heads))
    return {name: np.ascontiguousarray(value, np.float32) for name, value in folded.items()}


def _fold_part(
    block: str,
    part: str,
    tensors: Mapping[str, NDArray[Any]],
    frozen: Weights,
    heads: int,
) -> list[tuple[str, NDArray[Any]]]:
    try:
        if part == "token_embedding":
            return list(_token_rows(tensors, frozen))
        if part == "prefix":
            return list(_prefix(block, tensors, heads))
        if part == "lora":
            return list(_low_rank(block, tensors, frozen))
        return list(_adapter(f"{block}.{part}", tensors))
    except KeyError as error:
        raise _unfit(f"{block}.{part}", f"{error} is missing") from error
    except (ValueError, IndexError) as error:  # numpy's, of shapes.
        raise _unfit(f"{block}.{part}", str(error)) from error


def _prefix(
    block: str, tensors: Mapping[str, NDArray[np.float64]], heads: int
) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Give the rows [1, heads, P, d] that come before keys and values (eq. 15-16)."""
    keys_PD = _scale(tensors, "key_scale") * tensors["key_tokens"]
    values_PD = _scale(tensors, "scale") * _scale(tensors, "value_scale") * tensors["value_tokens"]
    for letter, rows_PD in (("k", keys_PD), ("v", values_PD)):
        rows_PHd = rows_PD.reshape(len(rows_PD), heads, -1)
        yield f"{block}.attention.prefix_{letter}", rows_PHd.transpose(1, 0, 2)[None]


def _low_rank(
    block: str, tensors: Mapping[str, NDArray[np.float64]], frozen: Weights
) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Add c * B A to the columns of keys and values (eq. 9), the last of the projection."""
    packed = f"{block}.attention.qkv.weight"
    name = packed if packed in frozen else f"{block}.attention.kv.weight"
    weight = frozen[name].astype(np.float64)
    width = len(weight)
    for part, columns in (("key", slice(-2 * width, -width)), ("value", slice(-width, None))):
        up_DR, down_RD = tensors[f"{part}.up"], tensors[f"{part}.down"]
        rank = min(up_DR.shape[-1], width)  # A higher rank adds nothing, and takes its time.
        if up_DR.shape != (width, rank) or down_RD.shape != (rank, width):
            raise ValueError(f"expected [{width}, R] and [R, {width}], R at most {width}")
        delta_DD = np.zeros((width, width))
        for up_D, down_D in zip(up_DR.T, down_RD, strict=True):
            delta_DD += down_D[:, None] * up_D
        weight[:, columns] += _scale(tensors, f"{part}.scale") * delta_DD
    yield name, weight


def _adapter(
    place: str, tensors: Mapping[str, NDArray[np.float64]]
) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Multiply the up projection by the adapter's scale (eq. 17)."""
    scale = _scale(tensors, "scale")
    yield f"{place}.down.weight", tensors["down.weight"].T
    yield f"{place}.down.bias", tensors["down.bias"]
    yield f"{place}.up.weight", tensors["up.weight"].T * scale
    yield f"{place}.up.bias", tensors["up.bias"] * scale


def _scale(tensors: Mapping[str, NDArray[Any]], name: str) -> float:
    return float(tensors[name].reshape(()))


def _token_rows(
    tensors: Mapping[str, NDArray[Any]], frozen: Weights
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    rows_VD, ids_T = frozen["embedding"].copy(), tensors["ids"]
    rows_VD[ids_T] = rows_VD[ids_T] + tensors["rows"]
    yield "embedding", rows_VD


# --- Smoothing factors


@dataclass(frozen=True, slots=True)
class Site:
    """A place where the input of some Linears can be divided by channel, and weights scaled."""

    divided: tuple[str, ...]
    """Weights that compute the Linears' input: their last columns are divided."""
    readers: tuple[str, ...]
    """Weights of all Linears that read it: their rows are multiplied."""


def smooth(
    weights: Weights, sites: Mapping[str, Site], factors: Mapping[str, NDArray[np.float32]]
) -> dict[str, NDArray[np.float32]]:
    """Return the weights that smoothing changes; the tower computes the same with them.

    At a site, what Linears read is divided by s_c in channel c, by changing the weights that
    compute it, and row c of each reader is multiplied by s_c; see `upperson_calibration.smoothing`.
    A site without factors s [C] stays as it is.

    Raises:
        InputError: There is no such site, or its factors do not fit.
    """
    if unknown := sorted(factors.keys() - sites.keys()):
        raise InputError(
            f"smoothing factors for '{unknown[0]}', but the tower has no such site: calibrate this "
            "model again",
            code="site_unknown",
            site=unknown[0],
        )
    changed: dict[str, NDArray[np.float32]] = {}
    for name, site in sites.items():
        if (s_C := factors.get(name)) is None:
            continue
        if absent := [w for w in (*site.divided, *site.readers) if w not in weights]:
            raise _unfit(absent[0], f"the site '{name}' needs it")
        width = len(weights[site.readers[0]])
        if s_C.shape != (width,) or not (np.isfinite(s_C) & (s_C > 0)).all():
            raise InputError(
                f"smoothing factors of '{name}' must be {width} positive numbers, found shape "
                f"{s_C.shape}: calibrate this model again",
                code="factors_unusable",
                site=name,
            )
        s_C = s_C.astype(np.float32)
        for weight in site.divided:
            value = changed.setdefault(weight, weights[weight].copy())
            if value.ndim == 4:  # Rows of a prefix, [1, heads, P, d].
                value /= s_C.reshape(1, value.shape[1], 1, -1)
            else:
                value[..., -width:] /= s_C
        for weight in site.readers:
            changed.setdefault(weight, weights[weight].copy())
            changed[weight] *= s_C[:, None]
    return changed


# --- Int8


def quantized(w_IO: NDArray[np.float32], scale_O: NDArray[np.float32]) -> NDArray[np.int8]:
    """Return a weight [in, out] as int8, with a scale [out] from `weight_scales`."""
    int8_IO: NDArray[np.int8] = np.rint(w_IO / scale_O).astype(np.int8)
    return int8_IO


def weight_scales(w_IO: NDArray[np.float32], pair_limit: int | None) -> NDArray[np.float32]:
    """Return the smallest scale [out] of each channel whose int8 weights stay in their limits.

    ``pair_limit`` is the maximum sum of the absolute values of two neighbouring int8 weights,
    [2i, out] and [2i + 1, out]; None: there is no such limit.
    """
    step_O = np.abs(w_IO).max(axis=0) / LEVELS
    if pair_limit is None:
        return half_at_least(step_O)
    scale_O = half_at_least(np.maximum(step_O, largest_pair(w_IO) / pair_limit))
    # Rounding may lift a pair over the limit: a few steps of float16 more, and it no longer does.
    while (over_O := largest_pair(np.rint(w_IO / scale_O)) > pair_limit).any():
        scale_O[over_O] = np.nextafter(scale_O[over_O].astype(np.float16), np.float16(np.inf))
    return scale_O


def half_at_least(scale: NDArray[Any]) -> NDArray[np.float32]:
    """Round up to float16 numbers above 0, returned as float32: rounded down, values would clip."""
    half = np.maximum(scale, np.finfo(np.float16).smallest_subnormal).astype(np.float16)
    above = np.nextafter(half, np.float16(np.inf))
    rounded: NDArray[np.float32] = np.where(half < scale, above, half).astype(np.float32)
    return rounded


# --- Weights as the files of a variant have them


def stored(name: str, weights: Weights, pair_limit: int | None) -> NDArray[Any]:
    """Return an initializer of a variant's graph, which its name describes.

    ``NAME`` is a float32 weight, ``NAME.int8`` and ``NAME.scale`` are its quantized values and
    their scales, ``.fp16`` behind any of them is float16. The projections ``q``, ``k`` and ``v``
    may be columns of ``qkv`` or ``kv``.

    Raises:
        InputError: There is no such weight.
    """
    plain = name.removesuffix(".fp16")
    source, _, kind = plain.rpartition(".")
    value: NDArray[Any]
    if kind in ("int8", "scale"):
        w_IO = _plain(source, weights)
        value = weight_scales(w_IO, pair_limit)
        if kind == "int8":
            value = quantized(w_IO, value)
    else:
        value = _plain(plain, weights)
    return value if plain == name else value.astype(np.float16)


def _plain(name: str, weights: Weights) -> NDArray[np.float32]:
    if name in weights:
        return weights[name]
    module, _, rest = name.rpartition(".attention.")
    letter, _, kind = rest.partition(".")
    for packed in ("qkv", "kv"):
        source = f"{module}.attention.{packed}.{kind}"
        if letter in tuple(packed) and source in weights:
            parts = np.split(weights[source], len(packed), axis=-1)
            return np.ascontiguousarray(parts[packed.index(letter)])
    raise _unfit(name, "the tower has no such weight")


def _unfit(name: str, problem: str) -> InputError:
    return InputError(f"'{name}' does not fit the tower: {problem}", code="weight_unfit", name=name)
