"""What `benchmarks.loader` runs in an interpreter that has mosaicml-streaming: `FOLDER write|read BATCH WORKERS AHEAD`.

It imports nothing of this project. `write` turns FOLDER/arrays/*.npz into FOLDER/mds and prints versions; `read` prints
samples a second over one shuffled pass.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import streaming
import torch
from torch.utils.data import DataLoader


def write(folder: Path) -> str:
    arrays = sorted((folder / "arrays").glob("*.npz"))
    with np.load(arrays[0], allow_pickle=False) as first:
        shape = ",".join(str(side) for side in first["moments"].shape[1:])
    columns = {"moments": f"ndarray:float16:{shape}", "tokens": "ndarray:uint16:77"}
    with streaming.MDSWriter(out=str(folder / "mds"), columns=columns, exist_ok=True) as writer:
        for path in arrays:
            with np.load(path, allow_pickle=False) as part:
                for moments, tokens in zip(part["moments"], part["tokens"], strict=True):
                    writer.write({"moments": moments, "tokens": tokens})
    return f"{streaming.__version__} (torch {torch.__version__}, numpy {np.__version__})"


def stack(samples: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    return {
        "moments": torch.from_numpy(np.stack([one["moments"] for one in samples])),
        "tokens": torch.from_numpy(np.stack([one["tokens"].astype(np.int64) for one in samples])),
    }


def read(folder: Path, batch_size: int, workers: int, ahead: int) -> float:
    data = streaming.StreamingDataset(local=str(folder / "mds"), batch_size=batch_size, shuffle=True, shuffle_seed=42)
    loader = DataLoader(
        data,
        batch_size=batch_size,
        num_workers=workers,
        prefetch_factor=ahead if workers else None,
        collate_fn=stack,
        drop_last=True,
    )
    batches = iter(loader)
    next(batches)
    started, samples = time.perf_counter(), 0
    for batch in batches:
        samples += len(batch["moments"])
        float(batch["moments"][0, 0, 0, 0])
    return samples / (time.perf_counter() - started)


def main() -> None:
    folder, what, batch_size, workers, ahead = sys.argv[1:]
    torch.set_num_threads(1)
    if what == "write":
        print(write(Path(folder)))
    else:
        print(read(Path(folder), int(batch_size), int(workers), int(ahead)))


if __name__ == "__main__":
    main()
