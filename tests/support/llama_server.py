"""The real llama.cpp server as a program, out of the xllamacpp wheel, where no `llama-server` is installed.

    python tests/support/llama_server.py -m tiny.gguf --port 18080 -np 2 -c 4096

It takes the flags of our default command and ignores others, so that it can stand as `command` in a policy. Two things
differ from the genuine program: it does not listen while it loads, and `--load-delay-ms` makes a small model slow.
Set LLAMA_SERVER_BIN to test with the genuine one.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

FLAGS = "-m {model} --port {port} -np {parallel} -c {context} -cram 0 -b 256 -ub 256".split()
POOLINGS = ("none", "mean", "cls", "last")


def llama_command(*, load_delay_ms: int = 0, load_log: Path | None = None, pooling: str = "") -> list[str]:
    """Gives the `command` of a llama.cpp model; delay and load log need the wheel's server.

    `pooling` makes it one of vectors: `none` is what a GGUF of a chat model says.
    """
    flags = [*FLAGS, "--embeddings", "--pooling", pooling] if pooling else FLAGS
    genuine = os.environ.get("LLAMA_SERVER_BIN")
    if genuine and not load_delay_ms and load_log is None:
        return [genuine, *flags]
    command = [sys.executable, "-P", str(Path(__file__).resolve()), *flags, "--threads", "1"]
    if load_delay_ms:
        command += ["--load-delay-ms", str(load_delay_ms)]
    if load_log is not None:
        command += ["--load-log", str(load_log)]
    return command


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Run llama.cpp's server out of the xllamacpp wheel.", allow_abbrev=False
    )
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("-np", "--parallel", type=int, default=1)
    parser.add_argument("-c", "--ctx-size", type=int, default=0)
    parser.add_argument("-cram", "--cache-ram", type=int, default=0)
    parser.add_argument("-b", "--batch-size", type=int, default=256)
    parser.add_argument("-ub", "--ubatch-size", type=int, default=256)
    parser.add_argument("--embeddings", action="store_true")
    parser.add_argument("--pooling", choices=POOLINGS)
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("-a", "--alias", default="")
    parser.add_argument("--load-delay-ms", type=int, default=0, help="sleep before the load")
    parser.add_argument("--load-log", type=Path, help="file that gets a line per start")
    return parser.parse_known_args()[0]


def main() -> None:
    """Loads, serves until SIGTERM, and leaves."""
    flags = _flags()
    if flags.load_log is not None:
        with flags.load_log.open("a") as log:
            log.write(f"{os.getpid()} {time.monotonic() * 1000:.0f}\n")
    time.sleep(flags.load_delay_ms / 1000)
    stop = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)  # Before llama.cpp makes its threads: they inherit it.
    import xllamacpp  # Late, so that a stop during the delay is cheap.

    parameters = xllamacpp.CommonParams()
    parameters.model.path = flags.model
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = flags.port
    parameters.n_parallel = flags.parallel
    parameters.n_ctx = flags.ctx_size
    parameters.cache_ram_mib = flags.cache_ram
    parameters.n_batch = flags.batch_size
    parameters.n_ubatch = flags.ubatch_size
    parameters.embedding = flags.embeddings
    if flags.pooling:
        parameters.pooling_type = getattr(xllamacpp.llama_pooling_type, f"LLAMA_POOLING_TYPE_{flags.pooling.upper()}")
    parameters.cpuparams.n_threads = flags.threads
    parameters.cpuparams_batch.n_threads = flags.threads
    parameters.endpoint_slots = True
    parameters.endpoint_metrics = True
    if flags.alias:
        parameters.model_alias = {flags.alias}
    server = xllamacpp.Server(parameters)
    print(f"llama.cpp serves {flags.model} at {server.listening_address}", flush=True)
    signal.sigwait(stop)
    os._exit(0)  # The wheel's server has no stop of its own.


if __name__ == "__main__":
    main()
