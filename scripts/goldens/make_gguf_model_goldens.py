"""Converts tiny models of `crates/marlin-model/tests/goldens` to GGUF with llama.cpp's own converter, for its tests.

    make_gguf_model_goldens.py LLAMA_CPP

LLAMA_CPP is a folder with llama.cpp's sources; those inside the source package of llama-cpp-python 0.3.36 made the
checked-in files (`vendor/llama.cpp`; requirements.txt beside this file). The logits to compare with are those of
`transformers` in the folders that the models come from.
"""

import json
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

MODELS = Path(__file__).resolve().parents[2] / "crates" / "marlin-model" / "tests"
CONVERTED = [
    "mixtral-top2", "qwen2-gqa2-yarn-sharded", "qwen3moe-top3-norm", "gemma3-mqa-usual",
    "phi3-gqa3-partial-sharded", "glm4-gqa4-bias", "glm4moe-qknorm-mtp", "glm4moelite-shared-mtp", "deepseekv3-groups-yarn",
    "gptoss-mxfp4",
]  # fmt: skip


def convert(llama_cpp, name, folder):
    from conversion import get_model_class

    source = folder / name
    shutil.copytree(MODELS / "goldens" / name, source)
    config = json.loads((source / "config.json").read_text())
    # The models have no tokenizer. Of Gemma's the length is asked for.
    vocabulary = {str(token): token for token in range(config["vocab_size"])}
    (source / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
    get_model_class(config["architectures"][0]).set_vocab = lambda self: None
    sys.argv = ["convert_hf_to_gguf.py", str(source), "--outfile", str(MODELS / "gguf" / f"{name}.gguf"), "--outtype", "auto"]
    runpy.run_path(str(llama_cpp / "convert_hf_to_gguf.py"), run_name="__main__")


if __name__ == "__main__":
    sources = Path(sys.argv[1])
    sys.path[:0] = [str(sources / "gguf-py"), str(sources)]
    (MODELS / "gguf").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        for model in CONVERTED:
            convert(sources, model, Path(temporary))
