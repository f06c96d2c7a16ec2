"""Write the options that each release of trtexec parses, for tests: names, and which take a value.

``python tools/list_trtexec_options.py CHECKOUT`` with a checkout of github.com/NVIDIA/TensorRT:
reads ``samples/common/sampleOptions.cpp`` of each tag below. An option counts when the code looks
it up among the arguments; it takes no value when what it is stored in is declared bool there or in
the header.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

TAGS = ("v8.6.1", "v9.3.0", "v10.0.1", "v10.9.0", "v10.14", "v10.15", "v10.16", "v11.0", "v11.1")
SOURCE = "samples/common/sampleOptions.cpp"
OUTPUT = Path(__file__).parents[1] / "tests" / "data" / "trtexec_options.json"


def main() -> None:
    releases = {tag.removeprefix("v"): options_of(Path(sys.argv[1]), tag) for tag in TAGS}
    content = {"source": f"github.com/NVIDIA/TensorRT, {SOURCE}, tags {', '.join(TAGS)}"}
    OUTPUT.write_text(json.dumps(content | {"releases": releases}, indent=1) + "\n")


def options_of(checkout: Path, tag: str) -> dict[str, list[str]]:
    code, header = (show(checkout, tag, path) for path in (SOURCE, SOURCE.replace(".cpp", ".h")))
    booleans = set(re.findall(r"\bbool (?:const )?(\w+)", code + header))
    options = {}
    for call in re.findall(r"get\w*\(\s*\w*[aA]rg\w*,([^;{]*?)\)+[;\s]", code):
        variable = re.split(r"[.\s]", call.rsplit(",", 1)[-1].strip())[-1]
        for name in re.findall(r'"(--\w+)"', call):
            options[name] = variable not in booleans
    return {
        "flags": sorted(name for name, valued in options.items() if not valued),
        "valued": sorted(name for name, valued in options.items() if valued),
    }


def show(checkout: Path, tag: str, path: str) -> str:
    command = ["git", "-C", str(checkout), "show", f"{tag}:{path}"]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout


if __name__ == "__main__":
    main()
