"""The OpenAI API from replicas on many nodes, by Ray Serve.

``python -m metal_marlin.ray serve MODEL --replicas 1-4`` starts it; so does ``serve run metal_marlin.ray.serve:app model=MODEL
replicas=1-4``, or a deployment's configuration file with ``import_path: metal_marlin.ray.serve:app``.
"""

# Annotations must be classes when this runs: Ray makes the arguments of `app` what its annotation says.
import os
import re
import shlex
from typing import Any

import ray
from pydantic import BaseModel, ByteSize, ConfigDict, Field, field_validator, model_validator
from ray import serve
from ray.serve.config import RequestRouterConfig

from metal_marlin.ray import program
from metal_marlin.ray.gateway import Gateway
from metal_marlin.ray.replica import Replica
from metal_marlin.ray.router import PrefixRouter

#: Name of the application in Ray Serve.
APPLICATION = "metal-marlin"
API_KEY_VARIABLE = "METAL_MARLIN_API_KEY"

_REPLICAS = re.compile(r"(\d+)(?:-(\d+))?")
#: Options of `metal-marlin serve` that are said otherwise here, since they are not the replica's alone.
_NOT_OF_REPLICAS = {"--host": "http_options", "--port": "http_options", "--drain": "drain", "--max-body": "max_body"}
#: Requests that a gateway hands on at a time; the replicas' limits are what counts.
_GATEWAY_REQUESTS = 10_000
#: Seconds between two looks at a replica or a gateway.
_HEALTH_PERIOD = 2.0


class ServeArgs(BaseModel):
    """What is served, and by how many."""

    model_config = ConfigDict(extra="forbid")

    #: What ``metal-marlin serve`` calls MODEL; the bundled model if nothing is said. A path must be the same on all nodes.
    model: str | None = None
    #: Further arguments of ``metal-marlin serve``, as in a shell or as a list.
    options: list[str] = Field(default_factory=list)
    #: How many replicas: a number, or the least and the most of them, as in ``1-4``, between which Ray goes by the load.
    replicas: str = "1"
    #: CPUs of a replica: what Ray counts, and its threads unless ``options`` say otherwise. If nothing is said, all of the
    #: smallest node.
    cpus: float | None = Field(default=None, gt=0)
    #: GPUs of a replica, as Ray counts them.
    gpus: float = Field(default=0, ge=0)
    #: Requests a replica has under way in the mean before there are more of them.
    target_requests: float = Field(default=16, gt=0)
    #: Seconds that there must be too much to do before a replica is added, and too little before one is taken away; where
    #: ``replicas`` has a least and a most.
    upscale_delay: float = Field(default=30, ge=0)
    downscale_delay: float = Field(default=600, ge=0)
    #: Most requests that a replica has at a time; further ones wait in the gateway.
    max_requests: int = Field(default=64, ge=1)
    #: Most requests that wait in a gateway; further ones are told to come again (429). -1 for no limit.
    max_waiting: int = Field(default=1024, ge=-1)
    #: Requests that a replica may have more than others and still get one whose prompt it knows; 0 goes by load alone. If
    #: nothing is said, half of ``target_requests``, so that a replica that is added gets something to do.
    affinity: float | None = Field(default=None, ge=0)
    #: Processes that hand requests to replicas.
    gateways: int = Field(default=1, ge=1)
    #: Seconds that answers under way have when a replica is taken away.
    drain: float = Field(default=30, ge=0)
    #: Largest body of a request, in bytes or as in ``16MiB``.
    max_body: ByteSize = Field(default=ByteSize(16 << 20), ge=1)

    @field_validator("options", mode="before")
    @classmethod
    def _split(cls, options: object) -> object:
        return shlex.split(options) if isinstance(options, str) else options

    @field_validator("options")
    @classmethod
    def _refuse_others(cls, options: list[str]) -> list[str]:
        for option in options:
            elsewhere = _NOT_OF_REPLICAS.get(option.split("=")[0])
            if elsewhere:
                raise ValueError(
                    f"{option} is no option of a replica; set {elsewhere}, or the option of `python -m metal_marlin.ray serve`"
                )
        return options

    @model_validator(mode="after")
    def _refuse_idle_delays(self) -> "ServeArgs":
        least, most = _bounds(self.replicas)
        for delay in ("upscale_delay", "downscale_delay"):
            if least == most and delay in self.model_fields_set:
                raise ValueError(
                    f"{delay} is for replicas that come and go: give replicas as the least and the most, such as 1-4"
                )
        return self

    @field_validator("replicas", mode="before")
    @classmethod
    def _number(cls, replicas: object) -> object:
        return str(replicas) if isinstance(replicas, int) else replicas

    @field_validator("replicas")
    @classmethod
    def _check_replicas(cls, replicas: str) -> str:
        _bounds(replicas)
        return replicas


def _bounds(replicas: str) -> tuple[int, int]:
    """The least and the most replicas."""
    found = _REPLICAS.fullmatch(replicas)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if most < 1 or least > most:
        raise ValueError(f"`{replicas}` is no number of replicas; wanted one such as 2, or the least and the most, such as 1-4")
    return least, most


def app(args: ServeArgs) -> serve.Application:
    """Builds the application; Ray must have been started.

    Args:
        args: See :class:`ServeArgs`; ``serve run`` makes it of ``key=value``.
    """
    least, most = _bounds(args.replicas)
    cpus = args.cpus if args.cpus is not None else _smallest_node()
    arguments = [*([args.model] if args.model else []), *args.options, "--max-body", str(int(args.max_body))]
    affinity = args.target_requests / 2 if args.affinity is None else args.affinity
    environment = {name: os.environ[name] for name in (API_KEY_VARIABLE,) if name in os.environ}
    scale: dict[str, Any] = {"num_replicas": most}
    if least < most:
        scale = {
            "autoscaling_config": {
                "min_replicas": least,
                "max_replicas": most,
                "target_ongoing_requests": args.target_requests,
                "upscale_delay_s": args.upscale_delay,
                "downscale_delay_s": args.downscale_delay,
            }
        }
    replicas = serve.deployment(
        name="Replica",
        ray_actor_options={"num_cpus": cpus, "num_gpus": args.gpus},
        max_ongoing_requests=args.max_requests,
        max_queued_requests=args.max_waiting,
        health_check_period_s=_HEALTH_PERIOD,
        graceful_shutdown_timeout_s=args.drain,
        # The annotation that type checkers see is that of the stored form.
        request_router_config=RequestRouterConfig(
            request_router_class=PrefixRouter,  # type: ignore[arg-type]
            request_router_kwargs={"affinity": affinity},
        ),
        **scale,
    )(Replica)
    gateway = serve.deployment(
        name="Gateway",
        num_replicas=args.gateways,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_GATEWAY_REQUESTS,
        health_check_period_s=_HEALTH_PERIOD,
        graceful_shutdown_timeout_s=args.drain,
    )(Gateway)
    bound = gateway.bind(replicas.bind(program.with_threads(arguments, cpus), environment), args.max_body)
    assert isinstance(bound, serve.Application)
    return bound


def run(args: ServeArgs, *, name: str = APPLICATION, route_prefix: str = "/") -> None:
    """Starts the application and returns when its replicas answer. Ray, and Ray Serve, must have been started.

    Args:
        args: See :class:`ServeArgs`.
        name: The application's, for Ray's own tools.
        route_prefix: Where the API is: before ``/v1``.

    Raises:
        ProgramError: The servers do not start; the message is what one of them said.
        RuntimeError: Ray cannot start the replicas for another reason.
    """
    try:
        serve.run(app(args), name=name, route_prefix=route_prefix)
    except RuntimeError:
        replicas = serve.status().applications[name].deployments.get("Replica")
        _, of_program, said = (replicas.message if replicas else "").rpartition(f"{program.ProgramError.__name__}: ")
        serve.delete(name)
        if of_program:
            raise program.ProgramError(said.strip()) from None
        raise


def _smallest_node() -> float:
    """CPUs of the node that has the fewest, so that a replica fits on any."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    cpus = [node["Resources"].get("CPU", 0) for node in nodes if node["Alive"]]
    return min((count for count in cpus if count > 0), default=1)
