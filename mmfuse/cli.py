"""The `mmfuse` command."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

# sub-command: (module with add_arguments(parser) and run(args) -> exit code, one line of help)
COMMANDS = {
    "info": ("mmfuse.info", "versions, GPU, compiled parts, and each operator's implementations"),
    "explain": ("mmfuse.choices", "which implementation an operator runs for given shapes, and why not the others"),
    "verify": ("mmfuse.bench.verify", "numerics: error of every implementation and of eager against float64"),
    "bench": ("mmfuse.bench.cli", "speed and memory against what you would otherwise run"),
    "tune": ("mmfuse.bench.tune", "measure from which size on each implementation pays on this device, for the choice"),
    "compile-report": ("mmfuse.bench.compile_report", "compile every kernel ahead of time and check its resources"),
    "models": ("mmfuse.models.cli", "the reference models and their presets"),
    "export": ("mmfuse.export.cli", "ONNX export, and the check of an exported file"),
    "demo": ("mmfuse.demo", "accelerate real models, train, measure, export, and report it all in one page"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a sub-command; returns its exit code: 0 only when what it claims holds."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="mmfuse", description="Fused kernels for multimodal models.")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    # only the chosen command's module is imported: `mmfuse --help` needs no torch
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, (module, line) in COMMANDS.items():
        command = commands.add_parser(name, help=line, description=line[0].upper() + line[1:] + ".")
        if name == chosen:
            import_module(module).add_arguments(command)
    args = parser.parse_args(argv)
    if args.version:
        from mmfuse import __version__

        print(__version__)
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    try:
        return import_module(COMMANDS[args.command][0]).run(args)
    except BrokenPipeError:  # the reader left, e.g. `| head`
        sys.stderr.close()
        return 1
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        print(f"mmfuse {args.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
