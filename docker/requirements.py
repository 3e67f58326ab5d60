"""Prints the dependencies in a pyproject.toml, one per line: the project's own and those of the named extras."""

import sys
import tomllib
from pathlib import Path

path, extras = Path(sys.argv[1]), [name for name in sys.argv[2].split(",") if name]
project = tomllib.loads(path.read_text())["project"]
print(
    "\n".join([*project["dependencies"], *(line for name in extras for line in project["optional-dependencies"][name])])
)
