"""Prints the dependencies in a pyproject.toml, one a line: the project's own and those of the extras named."""

import sys
import tomllib
from pathlib import Path

path, extras = Path(sys.argv[1]), [name for name in sys.argv[2].split(",") if name]
project = tomllib.loads(path.read_text())["project"]
print(
    "\n".join([*project["dependencies"], *(line for name in extras for line in project["optional-dependencies"][name])])
)
