"""``python -m metal_marlin.ray``: the commands that run on a Ray cluster."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from collections.abc import Sequence

import pydantic
import ray
from ray import serve as ray_serve
from ray.exceptions import RayError

from metal_marlin.ray import quantize, serve
from metal_marlin.ray.program import ProgramError

_EXAMPLES = """\
examples:
  python -m metal_marlin.ray serve path/to/model --replicas 1-4
  python -m metal_marlin.ray serve path/to/model --replicas 2 --cpus 8 --context 8192 --kv int8
  python -m metal_marlin.ray quantize path/to/model out --format fp4 --method mse --cpus 4

Options that are not listed here are those of `metal-marlin serve` and `metal-marlin quantize`. Without --address (or
RAY_ADDRESS), a cluster that runs on this machine is used, or else one is started for as long as the command runs.
docs/ray.md explains all of it.
"""


def main(arguments: Sequence[str]) -> int:
    """Runs a command and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m metal_marlin.ray",
        description="Metal Marlin on more than one machine.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    address = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    address.add_argument("--address", help="of the cluster, as ray.init takes it")

    serving = commands.add_parser(
        "serve",
        parents=[address],
        help="serve the OpenAI API from replicas",
        usage="%(prog)s [MODEL] [options] [options of `metal-marlin serve`]",
        allow_abbrev=False,
    )
    serving.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at, on every node; 0.0.0.0 lets other machines in [default: %(default)s]",
    )
    serving.add_argument("--port", type=int, default=8000, help="[default: %(default)s]")
    serving.add_argument(
        "--replicas", default="1", metavar="N[-M]", help="how many, or the least and the most [default: %(default)s]"
    )
    serving.add_argument("--cpus", metavar="N", help="CPUs and threads of a replica [default: all of the smallest node]")
    serving.add_argument("--gpus", metavar="N", help="GPUs of a replica, as Ray counts them [default: 0]")
    serving.add_argument(
        "--target-requests", metavar="N", help="requests under way per replica before there are more replicas [default: 16]"
    )
    serving.add_argument(
        "--upscale-delay",
        metavar="SECONDS",
        help="how long there must be too much to do before a replica is added, with --replicas N-M [default: 30]",
    )
    serving.add_argument(
        "--downscale-delay",
        metavar="SECONDS",
        help="how long there must be too little to do before one is taken away, with --replicas N-M [default: 600]",
    )
    serving.add_argument("--max-requests", metavar="N", help="most requests of a replica at a time [default: 64]")
    serving.add_argument("--max-body", metavar="SIZE", help="largest body of a request [default: 16MiB]")
    serving.add_argument(
        "--affinity",
        metavar="N",
        help="requests a replica may have more than others and still get those it knows [default: half of --target-requests]",
    )
    serving.add_argument("--gateways", metavar="N", help="processes that hand requests to replicas [default: 1]")
    serving.add_argument("--drain", metavar="SECONDS", help="for answers under way when a replica is taken away [default: 30]")

    quantizing = commands.add_parser(
        "quantize",
        parents=[address],
        help="quantise a checkpoint on many nodes",
        usage="%(prog)s MODEL OUT --format FORMAT --method mse|rtn [options] [options of `metal-marlin quantize`]",
        allow_abbrev=False,
    )
    quantizing.add_argument("--cpus", type=float, default=1, metavar="N", help="CPUs and threads of a task [default: 1]")
    quantizing.add_argument(
        "--retries",
        type=int,
        default=quantize.DEFAULT_RETRIES,
        metavar="N",
        help="how often a weight file is begun again whose worker has died [default: %(default)s]",
    )

    options, others = parser.parse_known_args(arguments)
    try:
        return _serve(options, others) if options.command == "serve" else _quantize(options, others)
    except pydantic.ValidationError as error:
        for problem in error.errors():
            # What is wrong of several together, or of those of another program, says so itself.
            field = str(problem["loc"][0]) if problem["loc"] else "options"
            option = "" if field == "options" else f"--{field.replace('_', '-')}: "
            print(f"error: {option}{problem['msg'].removeprefix('Value error, ')}", file=sys.stderr)
        return 2
    except (ProgramError, RayError, OSError, ConnectionError, RuntimeError) as error:
        print(str(error) if isinstance(error, ProgramError) else f"error: {error}", file=sys.stderr)
        return 1


def _serve(options: argparse.Namespace, others: list[str]) -> int:
    """Serves until the process is told to end."""
    # The options of this command bear the names of the arguments.
    given = {name: value for name, value in vars(options).items() if name in serve.ServeArgs.model_fields and value is not None}
    args = serve.ServeArgs.model_validate({"options": others, **given})
    ends = threading.Event()
    ray.init(options.address, log_to_driver=False)
    ray_serve.start(http_options={"host": options.host, "port": options.port})
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ends.set())
    serve.run(args)
    print(f"Serving at http://{options.host}:{options.port}/v1 ({args.replicas} replicas)", file=sys.stderr, flush=True)
    ends.wait()
    # Waits for the answers under way.
    ray_serve.delete(serve.APPLICATION)
    return 0


def _quantize(options: argparse.Namespace, others: list[str]) -> int:
    ray.init(options.address, log_to_driver=False)
    report = quantize.quantize(others, cpus=options.cpus, retries=options.retries, progress=quantize.print_progress)
    json.dump(report, sys.stdout)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
