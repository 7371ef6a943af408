"""The commands as functions, and the modules that run them as programs."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from metal_marlin import _native, commands
from metal_marlin.commands import evaluate, inspect, plan, quantize, verify_kernels
from metal_marlin.inference.pipeline import MarlinPipeline

TEXT = """\
One day, a little girl named Lily found a needle in her room. She knew it was difficult to play with it because it was sharp.
Lily wanted to share the needle with her mom, so she could sew a button on her shirt.
"""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 8)
    return path


def run(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=check)


def test_quantize_and_evaluate(models: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = quantize(models / "tiny-qwen3", out, format="fp4", group_size=32, method="mse", matrix={"v_proj": "int8"})
    assert report["out"] == str(out)
    assert report["method"] == "mse"
    assert report["decoder_bits_per_weight"] < 6
    assert report["bytes_after"] < 0.5 * report["bytes_before"]
    schemes = {matrix["name"].split(".")[-2]: matrix["scheme"] for matrix in report["matrices"]}
    assert "fp4" in schemes["q_proj"]
    assert "int8" in schemes["v_proj"]
    assert all(0 < matrix["relative_rms_error"] < 0.2 for matrix in report["matrices"])

    measured = evaluate(out, text, baseline=models / "tiny-qwen3", device="cpu")
    assert measured["mean_kl"] is not None
    assert 0 < measured["mean_kl"] < 0.5
    assert measured["tokens"] > 100
    alone = evaluate(models / "tiny-qwen3", text, device="cpu", exact=True, context=64, windows=2)
    assert (alone["windows"], alone["context"], alone["mean_kl"]) == (2, 64, None)

    with MarlinPipeline.from_pretrained(out, device="cpu") as pipe:
        assert pipe("Once upon a time", max_tokens=4)


def test_gptq_measures_what_it_kept(models: Path, tmp_path: Path) -> None:
    report = quantize(models / "tiny-qwen3", tmp_path / "out", bits=4, calibration_windows=1)
    assert report["method"] == "gptq"
    assert report["quality"] is not None
    assert report["quality"]["mean_kl"] > 0


def test_plan_and_inspect() -> None:
    said = plan("bundled", memory="1GiB", device="cpu", concurrency=2)
    assert said["total_bytes"] < 2**30
    said = inspect("bundled", context=[64, 128], tensors=True)
    assert [memory["context"] for memory in said["memory"]] == [64, 128]
    assert len(said["tensors"]) > 10


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^invalid value 'int9' for '--format <FORMAT>'") as error:
        quantize("bundled", tmp_path / "out", format="int9")
    assert "Usage" not in str(error.value)
    with pytest.raises(ValueError, match="--bits asks for 4"):
        quantize("bundled", tmp_path / "out", format="int8", bits=4)
    with pytest.raises(ValueError, match="unexpected argument '--grup-size'"):
        quantize("bundled", tmp_path / "out", format="int8", grup_size=4)
    with pytest.raises(ValueError, match="required arguments"):
        quantize("bundled", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"cannot read the text .*missing.txt: No such file"):
        evaluate("bundled", tmp_path / "missing.txt")
    with pytest.raises(FileNotFoundError):
        inspect(tmp_path / "no" / "model")
    with pytest.raises(RuntimeError, match="memory"):
        evaluate("bundled", __file__, memory="1MiB", device="cpu")
    assert not (tmp_path / "out").exists()


def test_options_are_those_of_the_command_line() -> None:
    options = {
        "group_size": 4,
        "exact": True,
        "force": False,
        "text": None,
        "context": [1, 2],
        "matrix": {"a": "int8", "b": "fp4:32"},
    }
    given = ["--group-size=4", "--exact", "--context=1", "--context=2", "--matrix=a=int8", "--matrix=b=fp4:32"]
    assert commands.arguments(options) == given
    assert commands.arguments({"out": Path("x"), "temperature": -1.5}) == ["--out=x", "--temperature=-1.5"]


def test_ctrl_c_ends_a_command(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    model = models / "tiny-qwen3"
    script = f"""
import os, signal, threading
from metal_marlin.commands import quantize
threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    quantize({str(model)!r}, {str(out)!r}, format="fp4", threads=1)
except KeyboardInterrupt:
    print("interrupted")
"""
    begun = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    assert begun.stdout == "interrupted\n", begun.stderr
    assert not out.exists()


def test_kernels() -> None:
    try:
        report = verify_kernels(filter="rms")
    except RuntimeError as error:
        pytest.skip(f"no GPU: {error}")
    assert report["ok"]
    assert report["kernels"]
    assert report["rows"]
    with pytest.raises(ValueError, match="kernels of GPUs"):
        verify_kernels(device="cpu")


def test_the_program() -> None:
    assert run("metal_marlin", "--version").stdout.split()[1] == _native.__version__
    said = run("metal_marlin", "run", "Once upon a time", "--max-tokens", "4", "--device", "cpu")
    assert said.stdout.strip()
    assert said.stderr == ""
    wrong = run("metal_marlin", "run", "Hello", "--temperature", "-1", check=False)
    assert (wrong.returncode, "found -1\n" in wrong.stderr) == (1, True)
    assert run("metal_marlin", "walk", check=False).returncode == 2


def test_the_loader_quantises(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = run("metal_marlin.hf_loader", models / "tiny-qwen3", out, "--bits", "4", "--group-size", "64", "--method", "mse")
    assert "wrote " in said.stdout
    assert (out / "config.json").is_file()
    wrong = run("metal_marlin.hf_loader", models / "tiny-qwen3", out, "--bits", "5", "--force", check=False)
    assert (wrong.returncode, "there is no format of 5 bits" in wrong.stderr) == (1, True)


def test_a_server_ends_at_ctrl_c() -> None:
    command = [sys.executable, "-m", "metal_marlin", "serve", "--port", "0", "--device", "cpu"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        for line in server.stderr:
            if "Serving" in line:
                break
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=60) == 0
    finally:
        server.kill()
        server.wait()
