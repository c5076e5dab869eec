"""A process from its start to its first window; a program, run by cold_start.py.

Arguments: when the process was asked for (`time.monotonic`), bundle, engine, threads, image, and a
folder for the window's logits, or nothing to stop before they are computed. Prints the
seconds of each stage as JSON.
"""

from __future__ import annotations

import json
import sys
import time


def main(asked: str, bundle: str, engine: str, threads: str, image: str, folder: str = "") -> None:
    stages: dict[str, float] = {}
    last = float(asked)

    def done(stage: str) -> None:
        nonlocal last
        now = time.monotonic()
        stages[stage] = now - last
        last = now

    done("python")
    import mome_sdk

    done("import")
    model = mome_sdk.ModelBundle.load(bundle)
    done("bundle")
    opened = mome_sdk.open_engine(model, engine, threads=int(threads))
    done("engine")

    class FirstWindowError(Exception):
        """Ends the run."""

    class Stop:
        """The engine's face; its first window is the end of the measurement."""

        name, device, precision, batch = opened.name, opened.device, opened.precision, opened.batch
        channels, classes, experts = opened.channels, opened.classes, opened.experts

        def run(self, windows, logits, shares=None, stream=None):  # type: ignore[no-untyped-def]
            done("image")
            if folder:
                import numpy as np

                opened.run(windows, logits)
                np.save(f"{folder}/logits.npy", logits[0])
            raise FirstWindowError

        def close(self) -> None:
            opened.close()

    try:
        mome_sdk.Segmenter(model, Stop(), space="mni", threads=int(threads)).predict(image)
    except FirstWindowError:
        print(json.dumps(stages))


if __name__ == "__main__":
    main(*sys.argv[1:])
