"""A longer fuzz run of the loaders, guided by coverage; optional, needs `pip install atheris`.

    python -m benchmarks.guided target --seconds 600
    python -m benchmarks.guided artifact --seconds 3600 --corpus corpus/artifact

libFuzzer changes valid files (or what the corpus folder has gathered before) so as to reach new
lines. It stops at the first input that ends in anything but a value or an error of the library,
that takes longer than 10 s or more than 4 GB, and writes that input to a file.
"""

import argparse
import sys
import tempfile
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

PATTERNS = {"artifact": "*.artifact", "checkpoint": "*.checkpoint", "target": "*.json"}
LONGEST, MOST_MIB = 10, 4096


def seeds(loader: str, corpus: Path, samples: Path) -> None:
    """Valid inputs to begin with."""
    fuzzing = import_module("benchmarks.fuzzing")
    fuzzing.write_samples(samples)
    found = [path.read_bytes() for path in sorted(samples.glob(PATTERNS.get(loader, "none")))]
    for number, content in enumerate(found or [text.encode() for text in fuzzing.BUDGETS]):
        (corpus / f"valid{number}").write_bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("loader", choices=[*PATTERNS, "budget"])
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--corpus", type=Path)
    options = parser.parse_args()
    atheris: Any = import_module("atheris")
    import_module("torch").set_num_threads(1)
    with atheris.instrument_imports(include=["cgmq_fx"]):
        loaders, error = import_module("benchmarks.fuzzing").LOADERS, import_module("cgmq_fx")

    with tempfile.TemporaryDirectory() as scratch:
        corpus, samples = options.corpus or Path(scratch, "corpus"), Path(scratch, "samples")
        for folder in (corpus, samples):
            folder.mkdir(parents=True, exist_ok=True)
        seeds(options.loader, corpus, samples)
        load = loaders[options.loader].load

        def one(data: bytes) -> None:
            given = data.decode(errors="replace") if options.loader == "budget" else data
            with suppress(error.CgmqError):
                load(given, samples)

        limits = [f"-max_total_time={options.seconds}", f"-timeout={LONGEST}"]
        atheris.Setup(
            [sys.argv[0], *limits, f"-rss_limit_mb={MOST_MIB}", "-max_len=65536", str(corpus)], one
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main()
