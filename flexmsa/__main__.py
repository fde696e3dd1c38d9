"""`python -m flexmsa COMMAND`, or `flexmsa COMMAND`: each command is imported only when it runs."""

import argparse
import importlib
import sys

import flexmsa

# Command -> module with `main(argv) -> exit code`, and summary.
COMMANDS = {
    "demo": ("flexmsa.demo", "train a small language model with MSA beside a dense one, and compare them"),
    "convert-demo": (
        "flexmsa.integrations.transformers.demo",
        "train a small dense transformers model, convert it, and compare it with other kinds of sparse attention",
    ),
    "check": ("flexmsa.testing.fuzz", "compare flexmsa on this machine with the definition, on random inputs"),
    "warm-up": ("flexmsa.compiling", "compile the Triton kernels of one shape for this GPU, ahead of the first step"),
    "autotune": (
        "flexmsa.tuning",
        "time the Triton kernels with other tile sizes on this GPU, and save the faster ones",
    ),
}
# Packages that commands need in addition to torch, triton and numpy -> the extra that installs them.
EXTRAS = {"transformers": "transformers", "accelerate": "transformers", "hypothesis": "test", "matplotlib": "plot"}


def main(argv: list[str]) -> int:
    """Run the command that `argv` names with the rest of `argv`; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m flexmsa", description="MiniMax Sparse Attention for PyTorch, from the command line."
    )
    parser.add_argument("--version", action="version", version=f"flexmsa {flexmsa.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (_, summary) in COMMANDS.items():
        # The command's own parser answers --help.
        commands.add_parser(name, help=summary, add_help=False)
    chosen, rest = parser.parse_known_args(argv)
    if chosen.command is None:
        if rest:
            parser.error(f"expected a command before {rest[0]}")
        parser.print_help()
        return 0
    try:
        module = importlib.import_module(COMMANDS[chosen.command][0])
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        print(f"{chosen.command} needs {error.name}: pip install 'flexmsa[{EXTRAS[error.name]}]'", file=sys.stderr)
        return 1
    return module.main(rest)


def run() -> None:
    """The command `flexmsa`."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
