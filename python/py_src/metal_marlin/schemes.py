"""Formats by name and by bits."""

from ._native import Scheme

# Bits of a weight's code, scales left out.
FORMATS = {
    "fp4": 4,
    "int4": 4,
    "int4-sym": 4,
    "mxfp4": 4,
    "nvfp4": 4,
    "int8": 8,
    "fp8": 8,
    "int3": 3,
    "int2": 2,
    "bf16": 16,
    "f16": 16,
    "f32": 32,
}

# What a number of bits alone stands for.
USUAL_FORMATS = {2: "int2", 3: "int3", 4: "fp4", 8: "int8"}


def resolve_scheme(
    bits: int | None = None,
    format: str | None = None,
    group_size: int | str | None = None,
    scheme: Scheme | None = None,
) -> Scheme:
    """The scheme that these arguments ask for; all of them left out, fp4.

    Args:
        bits: Bits of a weight: 4 for fp4, 8 for int8, 3 for int3, 2 for int2, unless `format` says which of so many bits.
        format: fp4, int4, int4-sym, mxfp4, nvfp4, int8, fp8, int3, int2, bf16, f16 or f32.
        group_size: Columns that share a scale, or "row", "tensor", "ROWSxCOLUMNS"; the format's own if left out. The last group
            of a row may be shorter where the format has a scale for every so many columns.
        scheme: What these three say otherwise.

    Raises:
        ValueError: There is no such format, it has not so many bits, or it has no such groups; a scheme is given with the others.
    """
    if scheme is not None:
        if (bits, format, group_size) != (None, None, None):
            raise ValueError(f"scheme ({scheme}) says what bits, format and group_size do: leave these out, or scheme")
        return scheme
    if format is None:
        format = USUAL_FORMATS.get(4 if bits is None else bits)
        if format is None:
            choices = ", ".join(f"{bits} ({name})" for bits, name in USUAL_FORMATS.items())
            raise ValueError(f"there is no format of {bits} bits; bits can be {choices}")
    elif bits is not None and FORMATS.get(format, bits) != bits:
        fitting = [name for name, width in FORMATS.items() if width == bits]
        advice = f"formats of {bits} bits are {', '.join(fitting)}" if fitting else "no format has so many"
        raise ValueError(
            f"bits={bits} contradicts format={format!r}, which has {FORMATS[format]} bits: {advice}; or leave bits out"
        )
    return Scheme.of(format, group_size)
