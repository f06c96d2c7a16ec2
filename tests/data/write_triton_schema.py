"""Write the schema of Triton's model configurations beside this file, from package tritonclient.

``pip download --no-deps tritonclient``, then ``python tests/data/write_triton_schema.py WHEEL``
(2.73.0). The schema is NVIDIA's, under the BSD 3-clause licence of the package.
"""

from __future__ import annotations

import ast
import sys
import zipfile
from pathlib import Path

SCHEMA = Path(__file__).with_name("triton_model_config.binpb")


def main(wheel: str) -> None:
    source = zipfile.ZipFile(wheel).read("tritonclient/grpc/model_config_pb2.py")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "AddSerializedFile":
            SCHEMA.write_bytes(ast.literal_eval(node.args[0]))


if __name__ == "__main__":
    main(sys.argv[1])
