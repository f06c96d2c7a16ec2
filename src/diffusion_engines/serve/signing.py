"""Whether a target's folder is, to the byte, the one that the owner of a key signed.

A manifest finds damage; whoever can write a folder can write its manifests too. A signature is of
everything in the folder, as OpenSSF Model Signing writes it with a key of one's own: no network, no
account. https://github.com/sigstore/model-transparency
"""

from __future__ import annotations

from pathlib import Path

from diffusion_engines.backends import require
from diffusion_engines.errors import IntegrityError

# Of the target's folder; beside the bundles.
SIGNATURE = "model.sig"


def check_signature(folder: Path, public_key: Path) -> None:
    """Compare a folder with its signature.

    Args:
        folder: all bundles of a target, and the signature in ``model.sig``.
        public_key: of whom it must be, an elliptic curve's in PEM.

    Raises:
        IntegrityError: there is no signature, it is of another key, or of other files.
        HardwareError: the library that reads it is not installed.
    """
    model_signing = require("model_signing", "pip install 'diffusion-engines[signing]'")
    signature = folder.absolute() / SIGNATURE
    for path, what in ((signature, "signature"), (public_key, "public key")):
        if not path.is_file():
            raise IntegrityError(
                f"{folder} cannot be checked: there is no {what}",
                expected=str(path),
                found="no such file",
                fix="sign it with `model_signing sign key` (docs/serving.md), or take the folder\n"
                "and the key from who did",
            )
    # As its command signs: without the signature itself, and what git keeps beside the bundles.
    hashing = model_signing.hashing.Config().set_ignored_paths(paths=[Path(SIGNATURE)])
    verifying = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    try:
        verifying.set_hashing_config(hashing).verify(folder.absolute(), signature)
    except Exception as error:  # of many kinds, as the signature may hold anything
        raise IntegrityError(
            f"{folder} is not what the owner of {public_key} signed",
            expected=f"the files of the signature in {SIGNATURE}, and none besides",
            found=f"{type(error).__name__}: {str(error)[:800]}",
            fix="do not use it; copy the folder again from a place that you trust",
        ) from error
