"""A model in llama.cpp, driven through its C interface as `llama-bench` does it."""

import ctypes
import time

import llama_cpp as llama


class LlamaModel:
    """A loaded model with one context."""

    def __init__(self, path, context, threads, flash_attention):
        llama.llama_backend_init()
        # llama.cpp tells what it loads.
        self.quiet = llama.llama_log_callback(lambda level, text, user_data: None)
        llama.llama_log_set(self.quiet, ctypes.c_void_p(0))
        parameters = llama.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.model = llama.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        parameters = llama.llama_context_default_params()
        parameters.n_ctx = context
        parameters.n_batch = 512
        parameters.n_ubatch = 512
        parameters.n_threads = threads
        parameters.n_threads_batch = threads
        parameters.flash_attn_type = 1 if flash_attention else 0
        self.context = llama.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise RuntimeError(f"llama.cpp has no context of {context} tokens for {path}")
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.decode([1])

    def decode(self, tokens):
        array = (llama.llama_token * len(tokens))(*tokens)
        status = llama.llama_decode(self.context, llama.llama_batch_get_one(array, len(tokens)))
        if status != 0:
            raise RuntimeError(f"llama_decode of {len(tokens)} tokens gave {status}")
        llama.llama_synchronize(self.context)

    def prefill(self, tokens):
        for first in range(0, tokens, 512):
            self.decode([(7 * i + 1) % self.vocabulary for i in range(first, min(first + 512, tokens))])

    def tokens_per_second(self, kind, tokens, depth):
        """Of a prompt of so many tokens, or of so many that are decoded one after the other behind `depth` others."""
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)
        self.prefill(depth)
        start = time.perf_counter()
        if kind == "prefill":
            self.prefill(tokens)
        else:
            for i in range(tokens):
                self.decode([(11 * i + 1) % self.vocabulary])
        return tokens / (time.perf_counter() - start)
