"""Makes `benchmarks/data/mnist.npz` from a folder with the four original idx.gz files of MNIST.

    python -m benchmarks.make_mnist FOLDER

The sources are checked against `benchmarks/data/SHA256SUMS`. The bytes of the archive depend on its
content and on the deflate implementation alone, so the same zlib makes the same file again.
"""

import argparse
import gzip
import math
import sys
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.mnist import MNIST_FILE, recorded_checksums, sha256

SOURCES = {
    "train_images": "train-images-idx3-ubyte.gz",
    "train_labels": "train-labels-idx1-ubyte.gz",
    "test_images": "t10k-images-idx3-ubyte.gz",
    "test_labels": "t10k-labels-idx1-ubyte.gz",
}
_UINT8_CODE = 8  # of the element type, the third byte of an idx file


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Reads a gzip-compressed idx file of unsigned bytes, in the shape that its header states."""
    content = gzip.decompress(path.read_bytes())
    if len(content) < 4 or content[:3] != bytes([0, 0, _UINT8_CODE]):
        raise ValueError(f"{path} is not an idx file of unsigned bytes")
    data_start = 4 * (1 + content[3])
    shape = tuple(int(n) for n in np.frombuffer(content[4:data_start], dtype=">u4"))
    values = np.frombuffer(content, dtype=np.uint8, offset=data_start)
    if values.size != math.prod(shape):
        raise ValueError(f"{path} holds {values.size} values, but its header states {shape}")
    return values.reshape(shape)


def write_npz(path: Path, arrays: dict[str, npt.NDArray[np.uint8]]) -> None:
    """Writes a compressed npz file whose bytes do not depend on the time of writing."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            # A bare ZipInfo carries the constant date 1980-01-01.
            entry = zipfile.ZipInfo(f"{name}.npy")
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system = 3
            with archive.open(entry, "w") as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)


def read_sources(folder: Path, checksums: dict[str, str]) -> dict[str, npt.NDArray[np.uint8]]:
    """Reads the four sources from `folder`, each checked against its recorded checksum."""
    for file in SOURCES.values():
        if sha256(folder / file) != checksums[file]:
            raise ValueError(f"{folder / file} is not the original: its SHA-256 differs")
    return {name: read_idx(folder / file) for name, file in SOURCES.items()}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 1 if the result differs from the recorded checksum."""
    parser = argparse.ArgumentParser(description="Makes mnist.npz from the original idx files.")
    parser.add_argument("folder", type=Path, help="folder with the four *-ubyte.gz files")
    parser.add_argument("--out", type=Path, default=MNIST_FILE, help="file to write")
    options = parser.parse_args(arguments)
    checksums = recorded_checksums()
    write_npz(options.out, read_sources(options.folder, checksums))
    checksum = sha256(options.out)
    print(f"{checksum}  {options.out}")
    return 0 if checksum == checksums.get(MNIST_FILE.name) else 1


if __name__ == "__main__":
    sys.exit(main())
