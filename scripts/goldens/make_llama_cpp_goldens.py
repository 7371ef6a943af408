"""Has llama.cpp convert, quantise and run tiny models, for the tests of marlin-model.

    make_llama_cpp_goldens.py LLAMA_CPP

LLAMA_CPP is a folder with llama.cpp's sources; those inside the source package of llama-cpp-python 0.3.36 made the
checked-in files (`vendor/llama.cpp`; requirements.txt beside this file). It writes `crates/marlin-model/tests/llama_cpp`: for
each model a folder with model.gguf, in golden.safetensors the logits that llama.cpp computes when it has decoded this file to
F32, and in rounded.safetensors those of the file as it is. From this it computes, on a CPU, with activations that are rounded
to 8 bits in blocks of 32 or 256.
"""

import os
import runpy
import sys
import tempfile
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import llama_cpp
import numpy as np
import torch
from make_model_goldens import run
from safetensors.torch import save_file
from tiny_models import TOKENS, VOCABULARY, model, save_source

FOLDER = Path(__file__).resolve().parents[2] / "crates" / "marlin-model" / "tests" / "llama_cpp"
# Blocks of the K-quants have 256 columns; of narrower matrices, llama.cpp chooses other types.
WIDE = dict(hidden_size=256, intermediate_size=256, head_dim=32)
CASES = {  # folder: shape, changes to it, how llama.cpp quantises it
    "llama-q4_k_m": ("llama", WIDE, llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M),
    "qwen3-q4_0": ("qwen3", dict(hidden_size=64, head_dim=32), llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0),
    "qwen3moe-q8_0": ("qwen3moe", dict(hidden_size=64, head_dim=32), llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0),
    "glm4moelite-q8_0": (
        "glm4moelite",
        dict(hidden_size=64, qk_nope_head_dim=32, v_head_dim=32),
        llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    ),
}
# Far enough from a choice of other experts that 8-bit activations do not change it.
ROUTER_GAP = 0.05


def convert(llama_cpp_sources, source, file, architecture):
    from conversion import get_model_class

    def set_vocab(self):
        self._set_vocab_none()
        if "Qwen" in architecture:  # others say it anyway
            self.gguf_writer.add_vocab_size(VOCABULARY)

    get_model_class(architecture).set_vocab = set_vocab
    sys.argv = ["convert_hf_to_gguf.py", str(source), "--outfile", str(file), "--outtype", "f32"]
    runpy.run_path(str(llama_cpp_sources / "convert_hf_to_gguf.py"), run_name="__main__")


def quantize(file, out, kind):
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread, settings.allow_requantize = kind, 1, True
    assert llama_cpp.llama_model_quantize(str(file).encode(), str(out).encode(), settings) == 0


def logits(file, input_ids):
    """`[tokens, vocabulary]`, with keys and values in f32."""
    loaded = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = 64
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
    settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(loaded, settings)
    batch = llama_cpp.llama_batch_init(len(input_ids), 0, 1)
    batch.n_tokens = len(input_ids)
    for position, token in enumerate(input_ids):
        batch.token[position], batch.pos[position] = token, position
        batch.n_seq_id[position], batch.seq_id[position][0], batch.logits[position] = 1, 0, True
    assert llama_cpp.llama_decode(context, batch) == 0
    rows = [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (VOCABULARY,)) for i in range(len(input_ids))]
    return torch.from_numpy(np.stack(rows).astype(np.float32))


def golden(sources, name, shape, changes, kind):
    made = model(shape, **changes)
    if shape == "glm4moelite":  # llama.cpp knows the router of GLM-4.7-Flash by the number of layers; others must tell
        made.config.scoring_func = "sigmoid"
    generator, gap = torch.Generator().manual_seed(3), 0
    while gap < ROUTER_GAP:
        input_ids = torch.randint(VOCABULARY, (1, TOKENS), generator=generator)
        of_floats, gap = run(made, input_ids)
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        source, floats = Path(temporary, name), Path(temporary, "f32.gguf")  # the file has the source's name in it
        save_source(made, source)
        convert(sources, source, floats, made.config.architectures[0])
        quantize(floats, folder / "model.gguf", kind)
        quantize(folder / "model.gguf", floats, llama_cpp.LLAMA_FTYPE_ALL_F32)
        exact = logits(floats, input_ids[0].tolist())
    rounded = logits(folder / "model.gguf", input_ids[0].tolist())
    for file, found in {"golden": exact, "rounded": rounded}.items():
        save_file({"input_ids": input_ids[0].int(), "logits": found}, folder / f"{file}.safetensors")
    size = (folder / "model.gguf").stat().st_size / 1024
    of_weights, of_activations = ((found - exact).norm() / exact.norm() for found in (of_floats, rounded))
    print(f"{name}: {size:.0f} KiB, rounded weights change logits by {of_weights:.4f}, activations by {of_activations:.4f}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sources = Path(sys.argv[1])
    sys.path[:0] = [str(sources / "gguf-py"), str(sources)]
    for name, case in CASES.items():
        golden(sources, name, *case)
