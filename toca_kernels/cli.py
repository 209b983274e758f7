"""The `toca` command; what its subcommands run lies in apps/."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from . import __version__
from ._backends import backends
from .apps import bench, check, report, sample, tune
from .apps import eval as evaluation
from .config import ToCaConfig
from .flops import BlockShape

_APPS: dict[str, tuple[Any, str]] = {  # a module with add_arguments and run, and its help
    "bench": (bench, "time every op here, beside its peers"),
    "check": (check, "is a model safe to cache: errors and times"),
    "sample": (sample, "draw many samples, resumable, also by torchrun"),
    "eval": (evaluation, "quality and speed of a list of settings"),
    "tune": (tune, "find the settings of a model for a budget"),
    "report": (report, "one HTML page of what a run did"),
}


class _Parser(argparse.ArgumentParser):
    """Refuses in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status, 2 for what the user got wrong."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["aot"]:  # has a parser of its own
            return _aot(arguments[1:])
        args = _parser().parse_args(arguments)
        status: int = args.command(args)
        return status
    except (ValueError, OSError) as error:
        return _refuse(arguments[0], str(error))
    except SystemExit as error:
        if not isinstance(error.code, str):
            raise
        return _refuse(arguments[0], error.code)


def _refuse(command: str, message: str) -> int:
    print(f"toca {command}: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _parser() -> _Parser:
    parser = _Parser(prog="toca", description="Kernels for token-wise feature caching (ToCa).")
    parser.add_argument("--version", action="version", version=f"toca_kernels {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    for name, (app, text) in _APPS.items():
        parser_of = commands.add_parser(name, help=text)
        app.add_arguments(parser_of)
        parser_of.set_defaults(command=app.run)

    commands.add_parser("aot", help="compile the Triton kernels for GPUs that need not be here")

    usable = commands.add_parser("backends", help="what is usable here, and why the rest is not")
    usable.set_defaults(command=_backends)

    plan = commands.add_parser("plan", help="which steps are full, how many tokens, how many FLOPs")
    plan.add_argument(
        "preset", help=f"{', '.join(ToCaConfig.presets())}, or a saved config (.json)"
    )
    plan.add_argument("--steps", type=int, default=50)
    plan.add_argument("--layers", type=int, default=28)
    plan.add_argument("--tokens", type=int, default=256)
    plan.add_argument("--channels", type=int, default=1152)
    plan.add_argument("--heads", type=int, default=16)
    plan.add_argument("--batch", type=int, default=2, help="samples per model call")
    plan.set_defaults(command=_plan)
    return parser


def _aot(arguments: Sequence[str]) -> int:
    try:
        from .apps import aot
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ValueError("Triton is missing: pip install 'toca_kernels[triton]'") from None
    aot.main(arguments)
    return 0


def _backends(args: argparse.Namespace) -> int:
    for name, status in backends().items():
        where = ", ".join(status.devices) if status.available else "not usable"
        print(f"{name:<10} {where:<10} {status.reason}")
    return 0


def _plan(args: argparse.Namespace) -> int:
    """The plan of a model of DiT's structure: attention reused whole, MLP by token."""
    saved = args.preset.endswith(".json")
    config = ToCaConfig.load(args.preset) if saved else ToCaConfig.preset(args.preset)
    plan = config.plan(
        num_steps=args.steps,
        num_layers=args.layers,
        num_tokens=args.tokens,
        modules=("attn", "mlp"),
    )
    flops = plan.flops(BlockShape(batch=args.batch, channels=args.channels, heads=args.heads))
    print(plan.summary())
    print(f"  FLOPs of the blocks, batch {args.batch}: {flops}")
    return 0
