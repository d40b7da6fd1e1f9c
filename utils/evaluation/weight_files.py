"""Describes and fetches the files with the published weights of feature networks.

torch.hub keeps such files in $TORCH_HOME/hub/checkpoints. The 8 hexadecimal digits at the end of their names are the
beginning of their SHA-256.
"""

import http.client
import os
import socket
import ssl
import urllib.error
from dataclasses import dataclass

import torch

from utils.core.errors import UserError
from utils.core.files import sha256_file

PATIENCE = 60.0  # the longest time in seconds that a server may send nothing


@dataclass(frozen=True)
class WeightFile:
    """A file of published weights. what: the name of the weights in messages. flag: the flag that names another path.
    folder: the address without the file name. If folder is None, the address is taken from torch-fidelity's package.
    instead: flags of a script that make these weights unnecessary."""

    what: str
    file: str
    flag: str
    folder: str | None = "https://download.pytorch.org/models/"
    instead: str = ""

    @property
    def address(self) -> str:
        if self.folder is not None:
            return self.folder + self.file
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3  # takes seconds

        return URL_INCEPTION_V3

    @property
    def place(self) -> str:
        return os.path.join(torch.hub.get_dir(), "checkpoints", self.file)

    @property
    def exists(self) -> bool:
        return os.path.isfile(self.place)

    @property
    def digits(self) -> str:
        """The first hexadecimal digits of the file's SHA-256."""
        return self.file.rpartition("-")[2].partition(".")[0]


WEIGHT_FILES = {
    "vgg": WeightFile("VGG16 weights for LPIPS", "vgg16-397923af.pth", "perceptual_weights"),
    "alexnet": WeightFile(
        "AlexNet weights for LPIPS",
        "alexnet-owt-7be5be79.pth",
        "alexnet_weights",
        instead="--net efficientnet_lite0",
    ),
    "inception": WeightFile(
        "Inception weights",
        "weights-inception-2015-12-05-6726825d.pth",
        "feature_weights",
        folder=None,
        instead="--extractor efficientnet_lite0",
    ),
}


def missing(name: str, given: str | None = None) -> str | None:
    """Return one line that says that weights are missing and how to get them. Return None if the file exists.

    name: a key of WEIGHT_FILES. given: the path that the command line names, or None for the usual place.
    """
    weights = WEIGHT_FILES[name]
    if os.path.isfile(given or weights.place):
        return None
    if given:
        return f"--{weights.flag} {given} is not a file"
    return (
        f"the {weights.what} are missing: `python experiments/get_weights.py {name}` fetches {weights.address} to "
        f"{weights.place}; or name the file with --{weights.flag} PATH"
    ) + (f"; or measure with another network, which needs no download: {weights.instead}" if weights.instead else "")


def fetch(name: str) -> bool:
    """Fetch weights and put the file in its place, unless the place already holds the right file. Returns True after a
    download.

    The file is complete or absent, because it gets its name after its SHA-256 was checked. Raises UserError if the
    network fails or the server sends another file.
    """
    weights = WEIGHT_FILES[name]
    if weights.exists and sha256_file(weights.place).startswith(weights.digits):
        return False
    os.makedirs(os.path.dirname(weights.place), exist_ok=True)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        torch.hub.download_url_to_file(weights.address, weights.place, weights.digits)
    except RuntimeError:  # torch.hub raises RuntimeError for a wrong hash only
        reason = f"the download is incomplete or another file: its SHA-256 does not begin with {weights.digits}"
    except (urllib.error.URLError, http.client.HTTPException, ssl.SSLError, ConnectionError, TimeoutError) as error:
        reason = str(error).strip("<>") or type(error).__name__
    else:
        return True
    finally:
        socket.setdefaulttimeout(before)
    raise UserError(f"{weights.address} cannot be fetched ({reason}): put the file by hand at {weights.place}")
