"""llama.cpp in a process of its own, driven by lines of JSON: a model that evaluates tokens, or an RPC server.

Runs on any Python that has llama-cpp-python; nothing of crossdock is imported here.
"""

from __future__ import annotations

import ctypes as c
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp

LIBRARIES = Path(os.environ.get("LLAMA_CPP_LIB_PATH") or Path(llama_cpp.__file__).parent / "lib")


def library(name: str) -> c.CDLL:
    """One of ggml's libraries beside llama.cpp's."""
    return c.CDLL(str(LIBRARIES / f"lib{name}.so"))


@llama_cpp.llama_log_callback
def _quiet(level: int, text: bytes, _data: c.c_void_p) -> None:
    if level == 4:  # GGML_LOG_LEVEL_ERROR; 5 continues a line
        sys.stderr.write(text.decode("utf-8", "replace"))


def serve_rpc(endpoint: str, threads: int) -> None:
    """An RPC server on this machine's CPU; never returns."""
    base, rpc = library("ggml"), library("ggml-rpc")
    base.ggml_backend_dev_by_type.restype = c.c_void_p
    base.ggml_backend_load_all()
    cpu = c.c_void_p(base.ggml_backend_dev_by_type(0))
    devices = (c.c_void_p * 1)(cpu)
    rpc.ggml_backend_rpc_start_server(endpoint.encode(), None, c.c_size_t(threads), c.c_size_t(1), devices)


def add_servers(endpoints: list[str]) -> None:
    """Make the devices of RPC servers known to llama.cpp."""
    base, rpc = library("ggml"), library("ggml-rpc")
    rpc.ggml_backend_rpc_add_server.restype = c.c_void_p
    for endpoint in endpoints:
        registry = rpc.ggml_backend_rpc_add_server(endpoint.encode())
        assert registry, f"no RPC server at {endpoint}"
        base.ggml_backend_register(c.c_void_p(registry))


class Llama:
    """A loaded model and its context, as llama-bench makes them."""

    def __init__(self, wish: dict[str, Any]) -> None:
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = wish["n_gpu_layers"]
        params.use_extra_bufts = wish.get("repack", True)
        self.model = llama_cpp.llama_model_load_from_file(wish["model"].encode(), params)
        assert self.model, f"llama.cpp cannot load {wish['model']}"
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = wish["n_ctx"], wish["n_ctx"], wish["n_ubatch"]
        context.n_threads = context.n_threads_batch = wish["threads"]
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        assert self.context, "llama.cpp cannot make a context"
        self.memory = llama_cpp.llama_get_memory(self.context)

    def restart(self) -> None:
        """Forget all tokens."""
        llama_cpp.llama_memory_clear(self.memory, True)

    def evaluate(self, batches: list[list[int]]) -> float:
        """Seconds for these batches of tokens, one after the other."""
        made = [((llama_cpp.llama_token * len(tokens))(*tokens), len(tokens)) for tokens in batches]
        start = time.perf_counter()
        for tokens, n in made:
            status = llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(tokens, n))
            assert status == 0, f"llama_decode: {status}"
            llama_cpp.llama_synchronize(self.context)
        return time.perf_counter() - start

    def logits(self) -> list[float]:
        """Those of the last token."""
        n = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        return list(llama_cpp.llama_get_logits_ith(self.context, -1)[:n])


def main() -> None:
    """`peer rpc ENDPOINT THREADS`, or `peer model` and then requests on stdin."""
    llama_cpp.llama_log_set(_quiet, c.c_void_p(0))
    if sys.argv[1] == "rpc":
        serve_rpc(sys.argv[2], int(sys.argv[3]))
        return
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print do not spoil the answers
    llama: Llama | None = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any = None
        if request["do"] == "load":
            llama_cpp.llama_backend_init()
            add_servers(request["rpc"])
            llama = Llama(request)
            answer = llama_cpp.llama_print_system_info().decode()
        assert llama is not None
        if request["do"] == "restart":
            llama.restart()
        elif request["do"] == "evaluate":
            answer = llama.evaluate(request["batches"])
        elif request["do"] == "logits":
            answer = llama.logits()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
