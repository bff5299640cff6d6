"""The `jaxrec` command: finds the command, runs it, turns errors into one line."""

import os
import sys
from collections.abc import Collection, Sequence
from importlib import import_module

from jaxrec.cli.components import import_components
from jaxrec.cli.huge_pages import restart_with_huge_pages
from jaxrec.errors import UserError
from jaxrec.training.interrupt import Interrupted

# Words of the command -> (module:function, what it is for). Modules are imported when used.
COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": (
        "jaxrec.cli.quickstart:main",
        "From nothing to a trained model, its metrics and recommendations.",
    ),
    "data import": ("jaxrec.cli.data:import_", "Prepare a CSV or Parquet file, or a public set."),
    "data list": ("jaxrec.cli.data:list_", "Prepared sets, and public sets that can be fetched."),
    "data stats": ("jaxrec.cli.data:stats", "Describe a prepared set."),
    "data generate": ("jaxrec.cli.data:generate", "Make a set with planted structure."),
    "train": ("jaxrec.cli.train:main", "Train an experiment (a config file)."),
    "evaluate": ("jaxrec.cli.evaluate:main", "Judge a run, or anybody's ranked lists."),
    "recommend": ("jaxrec.cli.recommend:main", "Rank items for a user, a history, or everyone."),
    "similar": ("jaxrec.cli.similar:main", "Items that the model sees as alike."),
    "vectors": ("jaxrec.cli.vectors:main", "Export the item vectors of a run."),
    "export": ("jaxrec.cli.export:main", "Export a run to serve without the model's code."),
    "show": ("jaxrec.cli.show:main", "Curves and metrics of a run."),
}

# Those that compute for longer than a second process start takes.
_HEAVY = ("quickstart", "train", "evaluate", "recommend")


# Before the command: a module or file to be imported first, which registers components.
_IMPORT = "--import"


def console() -> int:
    """`main` for a process of its own, which may start itself once more."""
    if set(split_imports(sys.argv[1:])[1][:1]) & set(_HEAVY):
        restart_with_huge_pages()
    return main()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Orbax, TFDS and absl log through these; none of it is for the user of a command.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        return _run(words)
    except UserError as error:
        print(f"jaxrec: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"jaxrec: {stop}", file=sys.stderr)
        return 128 + stop.signal
    except BrokenPipeError:
        # The reader of our output has left; that is its right.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("jaxrec: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        # JAX's own type is not imported for it: most commands that fail never load JAX.
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        if "No space left" in str(error):
            print("jaxrec: no space left on the disk; make room and try again", file=sys.stderr)
            return 2
        reason = str(error).strip().splitlines()[:1] or ["no more to be had"]
        print(
            f"jaxrec: out of memory ({reason[0]}); smaller batch_size, max_length or width need "
            "less, and --mesh.model N spreads the item table over N devices",
            file=sys.stderr,
        )
        return 2


def split_imports(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is named by `--import` in front of the command, and the words from the command on."""
    imports, rest = [], list(words)
    while rest[:1] == [_IMPORT] and len(rest) > 1:
        imports.append(rest[1])
        del rest[:2]
    return imports, rest


def _run(words: list[str]) -> int:
    imports, words = split_imports(words)
    if words[:1] == [_IMPORT]:
        raise UserError(f"{_IMPORT}: give a module or a Python file that registers components")
    for name in imports:
        import_components(name)
    if not words or words[0] in ("-h", "--help", "help"):
        _print_help()
        return 0 if words else 2
    if words[0] == "--version":
        import jaxrec

        print(f"jaxrec {jaxrec.__version__}")
        return 0
    for count in (2, 1):
        name = " ".join(words[:count])
        if name in COMMANDS:
            module, function = COMMANDS[name][0].split(":")
            code = getattr(import_module(module), function)(words[count:])
            return int(code or 0)
    group = [name for name in COMMANDS if name.split()[0] == words[0]]
    if group and {"-h", "--help"} & set(words[1:2]):
        _print_help(group)
        return 0
    known = ", ".join(group or COMMANDS)
    given = " ".join(words[: 2 if group else 1])
    raise UserError(f"unknown command {given!r}; commands: {known}")


def _print_help(names: Collection[str] = tuple(COMMANDS)) -> None:
    width = max(map(len, names))
    print("usage: jaxrec [--import MODULE] COMMAND [options]; jaxrec COMMAND --help tells more\n")
    for name in names:
        print(f"  {name:<{width}}  {COMMANDS[name][1]}")
    print(
        "\n--import MODULE, or FILE.py: imported first, to register components that a config or "
        "run names."
    )
    print("Data sets are kept in $JAXREC_DATA_DIR (default: a folder in the user's cache).")


if __name__ == "__main__":
    raise SystemExit(console())
