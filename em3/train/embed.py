"""Content embeddings of any items, those that training never saw included, by a trained model of a run."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.general import read_items
from ..encoders import encode_catalogue, load_encoder
from ..files import atomic
from ..jagged import Jagged
from . import arms
from .catalogue_tokens import ENCODERS, STREAMS
from .config import ConfigError
from .run import Run, config_of

FORMATS = (".parquet", ".npy")
CHUNK = 1024


def embed(folder: Path, items_folder: Path, out: Path, arm: str, seed: int | None,
          progress: Callable[[str, int, int, dict[str, float]], None]) -> tuple[int, int]:  # fmt: skip
    """Write the embeddings, whole or not at all; returns their number and width.

    Args:
        folder: of the run.
        items_folder: holds items.parquet or items.csv, as in a catalogue of the general layout.
        out: ``.parquet`` with the columns item and embedding, or ``.npy`` with ``[n, content_dim]`` float32 in the order
            of the table.
        arm, seed: which training of the run; its first seed for None.

    Raises:
        ConfigError: for an arm, seed or file name that does not serve.
        DataError: naming file, row and column.
    """
    if out.suffix not in FORMATS:
        raise ConfigError(f"--out: was {out}, must end in {' or '.join(FORMATS)}")
    config = config_of(folder)
    seed = config.seeds[0] if seed is None else seed
    if arm not in config.arms or not arms.reads_tokens(arm):
        able = [name for name in config.arms if arms.reads_tokens(name)]
        raise ConfigError(f"--arm: was {arm!r}, must be an arm of the run that reads tokens: {', '.join(able) or 'it has none'}")
    if seed not in config.seeds:
        raise ConfigError(f"--seed: was {seed}, must be one of the run's {config.seeds}")
    items = read_items(items_folder)
    run = Run(config, folder, progress)
    model: Any = run.trained(arm, seed).model.eval()
    encoders: dict[str, Any]
    precision = torch.float32
    if isinstance(model, arms.WithEncoders):
        encoders, model = dict(model.tokens.encoders.items()), model.model
    else:
        precision = run.store.dtype  # the model has learnt from tokens that the store had rounded
        kinds = [kind for kind in STREAMS if (folder / ENCODERS / kind).exists()]
        if not kinds:
            raise ConfigError(f"{folder}: holds no encoders, for its tokens came from elsewhere (tokens: {config.tokens})")
        encoders = {kind: load_encoder(folder / ENCODERS / kind) for kind in kinds}
    tokens = encode_catalogue(items, encoders.get("image"), encoders.get("text"),
                              progress=lambda done, total: progress("tokens", done, total, {}))  # fmt: skip
    with torch.no_grad():
        streams = [(tokens[kind][0].to(precision), tokens[kind][1]) for kind in STREAMS if kind in tokens]
        parts = [model.content([_rows(*stream, start, CHUNK) for stream in streams])
                 for start in range(0, len(items.ids), CHUNK)]  # fmt: skip
    found = torch.cat(parts).numpy() if parts else np.zeros((0, config.model.content_dim), np.float32)
    _write(out, items.ids, found)
    return found.shape


def _rows(values: torch.Tensor, offsets: torch.Tensor, start: int, count: int) -> Jagged:
    bounds = offsets[start : start + count + 1]
    return Jagged(values[bounds[0] : bounds[-1]].float(), bounds - bounds[0])


def _write(out: Path, ids: list[str], rows: np.ndarray) -> None:
    content = io.BytesIO()
    if out.suffix == ".npy":
        np.save(content, rows, allow_pickle=False)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {"item": pa.array(ids, pa.string()), "embedding": pa.FixedSizeListArray.from_arrays(rows.ravel(), rows.shape[1])}
        pq.write_table(pa.table(columns), content)
    with atomic(out) as file:
        file.write(content.getbuffer())
