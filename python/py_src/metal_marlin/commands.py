"""The program's commands as functions: their options are those of the command line, their results what `--json` prints.

An option `--group-size 64` is `group_size=64` here, a flag `--exact` is `exact=True`, and an option that may be given several
times takes a list (or a dict, where it is `NAME=VALUE`). `python -m metal_marlin COMMAND --help` explains them all.

Wrong arguments raise ValueError, files that are not there FileNotFoundError, and whatever else goes wrong RuntimeError. Ctrl-C
ends the work where it tells of its progress; an interrupted `quantize` goes on from there when it is called again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, cast

from metal_marlin import _native

# What an option of a command may be.
Value = str | int | float | os.PathLike[str]
Option = Value | bool | Sequence[Value] | Mapping[str, Value] | None


class MatrixReport(TypedDict):
    """A matrix that was quantised: how it is stored, and how far its weights are from what they were."""

    name: str
    shape: list[int]
    scheme: str
    bits_per_weight: float
    relative_rms_error: float
    sqnr_db: float
    max_abs_error: float


class QualityReport(TypedDict):
    """What a quantised model kept of the original's quality. KL is in nats a token."""

    text: str
    context: int
    windows: int
    tokens: int
    perplexity_before: float
    perplexity: float
    mean_kl: float
    p99_kl: float
    top1_agreement: float


class QuantizeReport(TypedDict):
    """What became of a model. Bits per weight count scales and zero points."""

    model: str
    out: str
    scheme: str
    exceptions: int
    embedding_scheme: str | None
    fit: dict[str, Any] | None
    plan: dict[str, Any] | None
    cold_experts: dict[str, Any] | None
    method: str
    calibration_tokens: int | None
    scaled_inputs: int | None
    rotation: dict[str, Any] | None
    layout: str
    bits_per_weight: float
    decoder_bits_per_weight: float
    bytes_before: int
    bytes_after: int
    matrices: list[MatrixReport]
    kept: list[str]
    quality: QualityReport | None
    resumed_tensors: int
    seconds: float


class EvaluationReport(TypedDict):
    """How well a model predicts a text, and how far it is from a baseline, if there is one. `nll` and KL are in nats a token."""

    model: str
    text: str
    baseline: str | None
    context: int
    windows: int
    tokens: int
    exact: bool
    kv_type: str
    perplexity: float
    nll: float
    window_nll: list[float]
    mean_kl: float | None
    p99_kl: float | None
    top1_agreement: float | None
    bits_per_weight: float
    decoder_bits_per_weight: float
    seconds: float


class KernelsReport(TypedDict):
    """What came of trying a GPU's kernels: each kernel, each row of the conformance table, and whether all are sound."""

    version: str
    device: str
    kernels: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    ok: bool


def quantize(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: str | None = None,
    group_size: int | str | None = None,
    method: str | None = None,
    **options: Option,
) -> QuantizeReport:
    """Writes a copy of a model whose matrices are stored in few bits, and tells how much that changes each of them.

    `model` is a folder or an id on the Hub, `out` the folder to write. `format` is fp4, int4, int4-sym, int8, fp8, int3, int2,
    mxfp4 or nvfp4; instead of it there may be `bits`, `target_bpw`, `plan` or `fit`. `method` is "gptq" (if nothing is said),
    "mse" or "rtn". `matrix={"v_proj": "int8"}` makes exceptions.
    """
    chosen = {"format": format, "group_size": group_size, "method": method, **options}
    return cast("QuantizeReport", report("quantize", [model, out], chosen))


def evaluate(
    model: str | os.PathLike[str],
    text: str | os.PathLike[str],
    *,
    baseline: str | os.PathLike[str] | None = None,
    format: str | None = None,
    windows: int | None = None,
    context: int | None = None,
    device: str | None = None,
    exact: bool = False,
    **options: Option,
) -> EvaluationReport:
    """Measures a model's perplexity on a text, a UTF-8 file, and how far it is from `baseline`.

    `model` is a folder, a GGUF file, an id on the Hub or "bundled"; with `format` it is quantised first.
    """
    chosen: dict[str, Option] = {
        "text": text,
        "baseline": baseline,
        "format": format,
        "windows": windows,
        "context": context,
        "device": device,
        "exact": exact,
        **options,
    }
    return cast("EvaluationReport", report("eval", [model], chosen))


def verify_kernels(*, device: str | None = None, all: bool = False, filter: str | None = None) -> KernelsReport:
    """Compiles every kernel for a GPU, and holds each against a plain reference.

    `device` is "gpu" (the first one) or "gpu:1"; `all` tries every number format and grouping, `filter` only what has this in its
    name. Raises RuntimeError if there is no GPU; kernels that fail are told in the result.
    """
    return cast("KernelsReport", report("verify-kernels", [], {"device": device, "all": all, "filter": filter}))


def plan(model: str | os.PathLike[str], **options: Option) -> dict[str, Any]:
    """Tells what a model takes of memory, and what fits (`memory="16GiB"`, `context`, `concurrency`, `format`, `device`)."""
    return report("plan", [model], options)


def inspect(model: str | os.PathLike[str], **options: Option) -> dict[str, Any]:
    """Tells what a model is made of: sizes, tensors and their formats, memory by context (`context=[8192, 32768]`, `tensors`)."""
    return report("inspect", [model], options)


def report(command: str, paths: Sequence[str | os.PathLike[str]], options: Mapping[str, Option]) -> dict[str, Any]:
    """What `metal-marlin COMMAND PATHS OPTIONS --json` would print."""
    given = [command, *arguments(options), "--", *(os.fspath(path) for path in paths)]
    return cast("dict[str, Any]", json.loads(_native.report(given)))


def arguments(options: Mapping[str, Option]) -> list[str]:
    """Options as the command line has them; those that are None or False are left out."""
    given = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is None or value is False:
            continue
        if value is True:
            given.append(flag)
        elif isinstance(value, Mapping):
            given += [f"{flag}={key}={_text(item)}" for key, item in value.items()]
        elif isinstance(value, Sequence) and not isinstance(value, str):
            given += [f"{flag}={_text(item)}" for item in value]
        else:
            given.append(f"{flag}={_text(value)}")
    return given


def _text(value: Value) -> str:
    return str(value) if isinstance(value, int | float) else os.fspath(value)
