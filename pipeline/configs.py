"""The config files that came with the package: list them, or copy them to edit them (`vmp configs`)."""

import argparse
import shutil
import sys
from pathlib import Path

from pipeline.cli import guarded
from pipeline.config import config_folders, nearest
from pipeline.errors import ConfigError, EnvironmentProblem


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return guarded(_run, arguments)


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vmp configs", description="List the config files, or copy them into a folder to edit them."
    )
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("list", help="list the files (the default)")
    copy = commands.add_parser("copy", help="copy files: vmp configs copy demo configs")
    copy.add_argument("name", metavar="NAME|all", help="for example demo (every stage's), arm/demo.yaml, or all")
    copy.add_argument("folder", type=Path, metavar="DEST", help="the files go to DEST/STAGE/NAME.yaml")
    given = parser.parse_args(arguments)
    files = config_files()
    if given.command != "copy":
        print("\n".join(f"configs/{name}" for name in files))
        return 0
    for name in chosen(given.name, list(files)):
        target = given.folder / name
        if target.exists():
            raise ConfigError(f"{target} exists already and is not overwritten; remove it, or give another DEST")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(files[name], target)
        print(target)
    return 0


def config_files() -> dict[str, Path]:
    """Map STAGE/NAME.yaml to the file of that name, in the order of the names."""
    found: dict[str, Path] = {}
    for folder in config_folders():
        for path in folder.glob("*/*.yaml"):
            found.setdefault(path.relative_to(folder).as_posix(), path)
    if not found:
        raise EnvironmentProblem("this installation has no config files; reinstall the package, or work in a checkout")
    return dict(sorted(found.items()))


def chosen(name: str, files: list[str]) -> list[str]:
    """Select files by `all`, a path such as `arm/demo.yaml`, or the name that stages share, such as `demo`.

    The files that the selected ones name as their `base:` are selected too.

    Raises:
        ConfigError: No file has that name.
    """
    path = Path(name.removeprefix("configs/"))
    found = [file for file in files if name == "all" or file == path.as_posix() or Path(file).stem == name]
    if not found:
        raise ConfigError(
            f"no config file is called {name!r}; the nearest: {', '.join(nearest(name, files)[:4])}"
            " (`vmp configs` lists all)"
        )
    known = config_files()
    bases = [
        f"{Path(file).parent}/{line.partition(':')[2].strip()}"
        for file in found
        for line in known[file].read_text().splitlines()
        if line.startswith("base:")
    ]
    return sorted({*found, *bases})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
